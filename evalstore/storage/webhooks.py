"""Subscriptions of webhooks: the table `webhooks`. Deliveries are in `evalstore.storage.webhook_deliveries`."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID, uuid4

from psycopg.rows import class_row
from sqlalchemy import Connection

from evalstore.storage import database, operator_actions, webhook_deliveries
from evalstore.storage.operator_actions import Intent
from models.errors import EvalstoreError
from models.webhooks import Subscription, now

LIMIT: Final = 1000


class TooManyWebhooks(EvalstoreError):
    """There are as many subscriptions as there may be."""


class Webhook(NamedTuple):
    """A subscription as it is kept, without its secrets."""

    id: UUID
    url: str
    event_types: list[str]
    statuses: list[str]
    run_id: str | None
    submitter: str | None
    state: str
    created_by: str
    created_at: datetime
    delivered: int
    failed: int
    pending: int
    delivered_at: datetime | None
    last_error: str | None
    failing_since: datetime | None
    disabled_at: datetime | None
    previous_valid_until: datetime | None


_COLUMNS: Final = ", ".join(f"w.{name}" for name in Webhook._fields if name != "pending")
# Counting stops where a number says no more.
_SELECT: Final = f"""
SELECT {_COLUMNS}, (
    SELECT count(*) FROM (
        SELECT FROM webhook_deliveries d WHERE d.webhook_id = w.id AND d.state = 'pending' LIMIT 10000) counted
) AS pending FROM webhooks w
"""


def all_webhooks(conn: Connection) -> list[Webhook]:
    """Every subscription, the oldest first. Raises DatabaseOutage (retry)."""
    return _read(conn, f"{_SELECT} ORDER BY w.created_at, w.id", [])


def get(conn: Connection, webhook_id: UUID) -> Webhook | None:
    """The subscription of an id. Raises DatabaseOutage (retry)."""
    return next(iter(_read(conn, f"{_SELECT} WHERE w.id = %s", [webhook_id])), None)


def between(conn: Connection, low: UUID, high: UUID) -> list[UUID]:
    """The first two ids of a range. Raises DatabaseOutage (retry)."""
    return [one.id for one in _read(conn, f"{_SELECT} WHERE w.id BETWEEN %s AND %s ORDER BY w.id LIMIT 2", [low, high])]


def _read(conn: Connection, query: str, values: Sequence[Any]) -> list[Webhook]:
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=class_row(Webhook)) as cursor:
        return cursor.execute(query.encode(), values).fetchall()


_CREATE: Final = """
INSERT INTO webhooks (id, url, event_types, statuses, run_id, submitter, secret, created_by, next_at)
SELECT %(id)s, %(url)s, %(event_types)s, %(statuses)s, %(run_id)s, %(submitter)s, %(secret)s, %(created_by)s, now()
WHERE (SELECT count(*) FROM webhooks) < %(limit)s
"""


def create(conn: Connection, subscription: Subscription, secret: str, intent: Intent) -> UUID:
    """Add a subscription, from the next commit on; return its id. Commits. Raises TooManyWebhooks, DatabaseOutage (retry)."""
    webhook_id = uuid4()
    values = subscription._asdict() | {"id": webhook_id, "secret": secret, "created_by": intent.actor, "limit": LIMIT}
    values |= {name: list(values[name]) for name in ("event_types", "statuses")}
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        if cursor.execute(_CREATE, values).rowcount != 1:
            raise TooManyWebhooks(f"there are {LIMIT:,} webhooks already; remove some")
        operator_actions.write(cursor, intent, 1, details={"webhook": str(webhook_id)})
    return webhook_id


def delete(conn: Connection, webhook_id: UUID, intent: Intent) -> bool:
    """Remove a subscription and its deliveries; False if there is none. Commits. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        if cursor.execute("DELETE FROM webhooks WHERE id = %s", [webhook_id]).rowcount != 1:
            return False
        cursor.execute("DELETE FROM webhook_deliveries WHERE webhook_id = %s", [webhook_id])
        operator_actions.write(cursor, intent, 1)
    return True


_ROTATE: Final = """
UPDATE webhooks SET previous_secret = secret, previous_valid_until = %(until)s, secret = %(secret)s WHERE id = %(id)s
"""


def rotate(conn: Connection, webhook_id: UUID, secret: str, overlap_s: float, intent: Intent) -> datetime | None:
    """Sign with a new secret, and also with the present one for `overlap_s`.

    Return until when both are valid, None if there is no such subscription. Commits. Raises DatabaseOutage (retry).
    """
    until = now() + timedelta(seconds=overlap_s)
    return until if _change(conn, _ROTATE, {"id": webhook_id, "secret": secret, "until": until}, intent) else None


_ENABLE: Final = """
UPDATE webhooks SET state = 'active', disabled_at = NULL, failing_since = NULL, failures = 0, next_at = now() WHERE id = %(id)s
"""


def enable(conn: Connection, webhook_id: UUID, intent: Intent) -> bool:
    """Deliver again to a disabled subscription, beginning with what is pending. False if there is none.

    Commits. Raises DatabaseOutage (retry).
    """
    return _change(conn, _ENABLE, {"id": webhook_id}, intent, promotes=True)


def _change(conn: Connection, statement: str, values: Mapping[str, Any], intent: Intent, *, promotes: bool = False) -> bool:
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        if cursor.execute(statement.encode(), values).rowcount != 1:
            return False
        if promotes:
            webhook_deliveries.promote_all(cursor, values["id"])
        operator_actions.write(cursor, intent, 1)
    return True


_STATISTICS: Final = """
SELECT count(*) FILTER (WHERE state = 'active' AND failing_since IS NULL),
    count(*) FILTER (WHERE state = 'active' AND failing_since IS NOT NULL),
    count(*) FILTER (WHERE state = 'disabled'),
    coalesce(sum(delivered), 0), coalesce(sum(failed), 0),
    (SELECT count(*) FROM (SELECT FROM webhook_deliveries WHERE state = 'pending' LIMIT 100000) counted),
    (SELECT coalesce(max(extract(epoch FROM now() - oldest.created_at)), 0) FROM webhooks w
        CROSS JOIN LATERAL (
            SELECT created_at FROM webhook_deliveries d
            WHERE d.webhook_id = w.id AND d.state = 'pending' AND d.is_next ORDER BY d.next_at, d.seq LIMIT 1) oldest
        WHERE w.state = 'active' AND w.failing_since IS NULL)
FROM webhooks
"""


class Statistics(NamedTuple):
    """Subscriptions by state; attempts of all of them by outcome."""

    healthy: int
    failing: int
    disabled: int
    delivered: int
    failed: int
    pending: int
    oldest_due_s: float


def statistics(conn: Connection) -> Statistics:
    """Numbers for metrics. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        (row,) = cursor.execute(_STATISTICS).fetchall()
    *counts, oldest_due_s = row
    healthy, failing, disabled, delivered, failed, pending = map(int, counts)
    return Statistics(healthy, failing, disabled, delivered, failed, pending, float(oldest_due_s))
