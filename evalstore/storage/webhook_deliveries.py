"""Deliveries of webhooks: persisted before the sink's cursor advances, then claimed, sent and settled one by one.

Of a subscription and an evaluation only the first pending delivery is sent (`is_next`). Every transaction that changes which
one this is locks the subscription's row first, subscriptions in the order of their ids.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import NAMESPACE_URL, UUID, uuid4, uuid5

import psycopg
from psycopg.rows import class_row
from sqlalchemy import Connection

from evalstore.storage import database, operator_actions
from evalstore.storage.operator_actions import Intent
from models.confirmations import CREATED, ERASED, UPDATED
from models.record import rfc3339
from models.webhooks import TEST, Subscription, body

# Above so many failures in a row the subscription's backoff decides when to try, no longer that of each delivery.
_RECEIVER_FAILURES: Final = 3
_PRUNED: Final = 5000
# Before every other delivery.
_FIRST: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Confirmation(NamedTuple):
    """A committed change of an evaluation. `status` is None where it is not known any more: the record's present one counts."""

    eval_id: str
    version: int
    status: str | None
    event_ids: tuple[str, ...]
    event_types: tuple[str, ...]
    recorded_at: str


class Claimed(NamedTuple):
    """A delivery to send now. `attempts` includes this one, and names it when it is settled."""

    webhook_id: UUID
    url: str
    secret: str
    previous_secret: str | None
    eval_id: str
    id: UUID
    attempts: int
    body: bytes


class Settled(NamedTuple):
    """The outcome of an attempt. `error` is None where the receiver took the delivery."""

    claimed: Claimed
    status_code: int | None
    error: str | None
    is_gone: bool = False


class Delivery(NamedTuple):
    """A delivery as the history shows it."""

    id: UUID
    webhook_id: UUID
    type: str
    eval_id: str | None
    version: int
    state: str
    attempts: int
    status_code: int | None
    error: str | None
    created_at: datetime
    next_at: datetime | None
    finished_at: datetime | None


class Retries(NamedTuple):
    """Seconds: of the first pause, which doubles with each failure, of the longest one, and until it is given up."""

    first_s: float = 5
    longest_s: float = 6 * 3600
    give_up_s: float = 3 * 86_400


_SUBSCRIPTIONS: Final = "SELECT id, url, event_types, statuses, run_id, submitter FROM webhooks WHERE state = 'active'"
# Stands in place of `eval_id` before the name of a run or an anomaly. No `eval_id` begins like this.
_SUBJECT: Final = "/"
_RECORDS: Final = "SELECT eval_id, status, run_id, submitter FROM evaluations WHERE eval_id = ANY(%s::text[])"
_LOCK: Final = "SELECT id FROM webhooks WHERE id = ANY(%s) AND state = 'active' ORDER BY id FOR NO KEY UPDATE"
_INSERT: Final = """
INSERT INTO webhook_deliveries (eval_id, id, webhook_id, type, version, body, next_at, created_at)
VALUES (%(eval_id)s, %(id)s, %(webhook_id)s, %(type)s, %(version)s, %(body)b, %(next_at)s, %(now)s) ON CONFLICT DO NOTHING
"""
_PROMOTE: Final = """
UPDATE webhook_deliveries d SET is_next = true
FROM unnest(%s::uuid[], %s::text[]) AS pair (webhook_id, eval_id)
CROSS JOIN LATERAL (
    SELECT h.eval_id, h.id, h.is_next FROM webhook_deliveries h
    WHERE h.webhook_id = pair.webhook_id AND h.eval_id = pair.eval_id AND h.state = 'pending' ORDER BY h.seq LIMIT 1
) head
WHERE NOT head.is_next AND d.eval_id = head.eval_id AND d.id = head.id
"""
_PROMOTE_ALL: Final = """
UPDATE webhook_deliveries d SET is_next = true
FROM (
    SELECT DISTINCT ON (eval_id) eval_id, id FROM webhook_deliveries
    WHERE webhook_id = %s AND state = 'pending' ORDER BY eval_id, seq
) head
WHERE d.eval_id = head.eval_id AND d.id = head.id AND NOT d.is_next
"""


def persist(conn: Connection, confirmations: Sequence[Confirmation], now: datetime) -> int:
    """Queue these for every subscription that they match; return how many deliveries that makes.

    The same confirmation makes one delivery, however often it comes. Commits. Raises DatabaseOutage (retry).
    """
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        subscriptions = _subscriptions(cursor)
        if not subscriptions:
            return 0
        eval_ids = list({one.eval_id for one in confirmations})
        records = {eval_id: rest for eval_id, *rest in cursor.execute(_RECORDS, [eval_ids])}
        rows = [
            _row(webhook_id, one, type_, status, run_id, now)
            for one in confirmations
            for type_, status, run_id, submitter in [_described(one, records.get(one.eval_id))]
            for webhook_id, subscription in subscriptions.items()
            if subscription.matches((type_, *one.event_types), status, run_id, submitter)
        ]
        return _insert(cursor, rows)


def notify(conn: Connection, confirmation: Mapping[str, Any], now: datetime) -> int:
    """Queue a confirmation that holds no event for every subscription that it matches; return how many deliveries that makes.

    The same confirmation makes one delivery, however often it comes. Commits. Raises DatabaseOutage (retry).
    """
    type_, eval_id, at = confirmation["type"], confirmation.get("eval_id"), confirmation.get("recorded_at") or rfc3339(now)
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        subscriptions = _subscriptions(cursor)
        if not subscriptions:
            return 0
        (record,) = cursor.execute(_RECORDS, [[eval_id]]).fetchall()[:1] or [(eval_id, None, None, None)]
        _, status, run_id, submitter = record
        if confirmation.get("dimension") == "submitter":
            submitter = confirmation["value"]
        message = body(type_, at, confirmation)
        rows = [
            {
                "eval_id": eval_id or _SUBJECT + str(confirmation.get("run_id") or confirmation.get("anomaly_id")),
                "id": uuid5(NAMESPACE_URL, f"evalstore:webhook:{webhook_id}:{message.decode()}"),
                "webhook_id": webhook_id,
                "type": type_,
                "version": confirmation.get("version", 0),
                "body": message,
                "next_at": now,
                "now": now,
            }
            for webhook_id, one in subscriptions.items()
            if one.matches((type_,), confirmation.get("status", status), confirmation.get("run_id", run_id), submitter)
        ]
        return _insert(cursor, rows)


def _subscriptions(cursor: psycopg.Cursor[Any]) -> dict[UUID, Subscription]:
    return {
        webhook_id: Subscription(url, tuple(types), tuple(statuses), run_id, submitter)
        for webhook_id, url, types, statuses, run_id, submitter in cursor.execute(_SUBSCRIPTIONS)
    }


def _described(one: Confirmation, record: Sequence[Any] | None) -> tuple[str, str | None, str | None, str | None]:
    """The type of a confirmation, and the evaluation's status, run and submitter."""
    status, run_id, submitter = record or (None, None, None)
    is_created = one.version == len(one.event_ids)
    return CREATED if is_created else UPDATED, one.status or status, run_id, submitter


def _row(
    webhook_id: UUID, one: Confirmation, type_: str, status: str | None, run_id: str | None, now: datetime
) -> dict[str, Any]:
    data = {
        "type": type_,
        "eval_id": one.eval_id,
        "version": one.version,
        "status": status,
        **({"run_id": run_id} if run_id is not None else {}),
        "event_ids": one.event_ids,
        "event_types": one.event_types,
        "recorded_at": one.recorded_at,
    }
    return {
        "eval_id": one.eval_id,
        "id": uuid5(NAMESPACE_URL, f"evalstore:webhook:{webhook_id}:{one.eval_id}:{one.version}"),
        "webhook_id": webhook_id,
        "type": type_,
        "version": one.version,
        "body": body(type_, one.recorded_at, data),
        "next_at": now,
        "now": now,
    }


def _insert(cursor: psycopg.Cursor[Any], rows: Sequence[Mapping[str, Any]]) -> int:
    """Queue deliveries, but for subscriptions that were removed or disabled meanwhile."""
    wanted = list({row["webhook_id"] for row in rows})
    locked = {webhook_id for (webhook_id,) in cursor.execute(_LOCK, [wanted])} if wanted else set()
    kept = [row for row in rows if row["webhook_id"] in locked]
    if kept:
        cursor.executemany(_INSERT, kept)
        _promote(cursor, ((row["webhook_id"], row["eval_id"]) for row in kept))
    return len(kept)


def _promote(cursor: psycopg.Cursor[Any], pairs: Iterable[tuple[UUID, str]]) -> None:
    distinct = list(dict.fromkeys(pairs))
    cursor.execute(_PROMOTE, [[webhook_id for webhook_id, _ in distinct], [eval_id for _, eval_id in distinct]])


def promote_all(cursor: psycopg.Cursor[Any], webhook_id: UUID) -> None:
    """Make the first pending delivery of each evaluation the next one, in the caller's transaction."""
    cursor.execute(_PROMOTE_ALL, [webhook_id])


_FORGET: Final = "DELETE FROM webhook_deliveries WHERE eval_id = %s RETURNING webhook_id"


def erase(conn: Connection, eval_id: str, now: datetime) -> int:
    """Remove all deliveries of an evaluation, and queue the confirmation of its erasure; return to how many.

    Subscriptions that filter by status, run or submitter get it where they were to get anything of the evaluation lately:
    the record that would tell is gone. Commits. Raises DatabaseOutage (retry).
    """
    data = {"type": ERASED, "eval_id": eval_id, "recorded_at": rfc3339(now)}
    message = body(ERASED, rfc3339(now), data)
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        subscriptions = _subscriptions(cursor)
        cursor.execute(_LOCK, [list(subscriptions)])
        had = {webhook_id for (webhook_id,) in cursor.execute(_FORGET, [eval_id])}
        rows = [
            {
                "eval_id": eval_id,
                "id": uuid4(),
                "webhook_id": webhook_id,
                "type": ERASED,
                "version": 0,
                "body": message,
                "next_at": now,
                "now": now,
            }
            for webhook_id, one in subscriptions.items()
            if not one.event_types or ERASED in one.event_types
            if webhook_id in had or (one.run_id, one.submitter, one.statuses) == (None, None, ())
        ]
        return _insert(cursor, rows)


_CLAIM: Final = """
WITH due AS MATERIALIZED (
    SELECT w.id AS webhook_id, w.url, w.secret,
        CASE WHEN w.previous_valid_until > %(now)s THEN w.previous_secret END AS previous_secret, q.eval_id, q.id
    FROM webhooks w
    LEFT JOIN unnest(%(known)s::uuid[], %(rooms)s::int[]) AS known (webhook_id, room) ON known.webhook_id = w.id
    CROSS JOIN LATERAL (
        SELECT d.eval_id, d.id FROM webhook_deliveries d
        WHERE d.webhook_id = w.id AND d.state = 'pending' AND d.is_next AND d.next_at <= %(now)s
        ORDER BY d.next_at, d.seq LIMIT coalesce(known.room, 1) FOR UPDATE SKIP LOCKED
    ) q
    WHERE w.state = 'active' AND w.next_at <= %(now)s LIMIT %(most)s
)
UPDATE webhook_deliveries d
SET attempts = d.attempts + 1, first_attempt_at = coalesce(d.first_attempt_at, %(now)s),
    next_at = %(now)s + make_interval(secs => %(lease_s)s)
FROM due WHERE d.eval_id = due.eval_id AND d.id = due.id
RETURNING due.webhook_id, due.url, due.secret, due.previous_secret, d.eval_id, d.id, d.attempts, d.body
"""


def claim(conn: Connection, rooms: Mapping[UUID, int], most: int, lease_s: float, now: datetime) -> list[Claimed]:
    """Take deliveries that are due. Another process may take them `lease_s` from now unless they are settled.

    `rooms`: how many more a subscription may get; one where it is not named. Commits. Raises DatabaseOutage (retry).
    """
    values = {"now": now, "known": list(rooms), "rooms": list(rooms.values()), "most": most, "lease_s": lease_s}
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=class_row(Claimed)) as cursor:
        return cursor.execute(_CLAIM, values).fetchall()


_RETURN: Final = """
UPDATE webhook_deliveries d SET next_at = %s FROM unnest(%s::text[], %s::uuid[], %s::int[]) AS taken (eval_id, id, attempts)
WHERE d.eval_id = taken.eval_id AND d.id = taken.id AND d.attempts = taken.attempts AND d.state = 'pending'
"""


def unclaim(conn: Connection, claimed: Sequence[Claimed], now: datetime) -> None:
    """Let any process send these at once. Commits. Raises DatabaseOutage."""
    values = [now, [one.eval_id for one in claimed], [one.id for one in claimed], [one.attempts for one in claimed]]
    with database.errors(), conn.begin():
        database.driver(conn).execute(_RETURN, values)


_LOCK_ALL: Final = "SELECT FROM webhooks WHERE id = ANY(%s) ORDER BY id FOR NO KEY UPDATE"
_TAKEN: Final = """
WITH taken AS (
    UPDATE webhooks SET failures = 0, failing_since = NULL, last_error = NULL, next_at = least(next_at, %(now)s),
        delivered = delivered + 1, delivered_at = %(now)s WHERE id = %(webhook_id)s
)
UPDATE webhook_deliveries SET state = 'delivered', is_next = false, finished_at = %(now)s, status_code = %(status_code)s,
    error = NULL
WHERE eval_id = %(eval_id)s AND id = %(id)s AND attempts = %(attempts)s AND state = 'pending'
"""
_PAUSE: Final = "make_interval(secs => least(%(first_s)s * 2.0 ^ least({}, 30), %(longest_s)s) * %(jitter)s)"
# Attempts that were under way together are one failure of the receiver.
_NOT_TAKEN: Final = f"""
WITH receiver AS (
    UPDATE webhooks SET last_error = %(error)s, failed = failed + 1, failing_since = coalesce(failing_since, %(now)s),
        failures = failures + (next_at <= %(now)s)::int,
        next_at = CASE WHEN next_at <= %(now)s THEN %(now)s + {_PAUSE.format("failures")} ELSE next_at END,
        state = CASE WHEN %(is_gone)s OR failing_since <= %(given_up)s THEN 'disabled' ELSE state END,
        disabled_at = CASE WHEN %(is_gone)s OR failing_since <= %(given_up)s THEN %(now)s ELSE disabled_at END
    WHERE id = %(webhook_id)s AND %(eval_id)s::text <> '' RETURNING failures
)
UPDATE webhook_deliveries SET status_code = %(status_code)s, error = %(error)s,
    state = CASE WHEN {{given_up}} THEN 'failed' ELSE state END,
    is_next = NOT {{given_up}}, finished_at = CASE WHEN {{given_up}} THEN %(now)s END,
    next_at = %(now)s + CASE WHEN (SELECT failures FROM receiver) >= {_RECEIVER_FAILURES} THEN interval '0'
        ELSE {_PAUSE.format("attempts - 1")} END
WHERE eval_id = %(eval_id)s AND id = %(id)s AND attempts = %(attempts)s AND state = 'pending'
""".format(given_up="(first_attempt_at <= %(given_up)s OR eval_id = '')")


def settle(conn: Connection, outcomes: Sequence[Settled], retries: Retries, jitter: float, now: datetime) -> list[UUID]:
    """Note the outcomes of attempts, and when what failed is tried again. Return the subscriptions that this disables.

    A subscription is disabled once the receiver is gone (410), or has taken nothing for `retries.give_up_s`. A delivery that
    alone fails for so long is given up. Commits. Raises DatabaseOutage (the deliveries may be sent again).
    """
    shared = {**retries._asdict(), "given_up": now - timedelta(seconds=retries.give_up_s), "jitter": jitter, "now": now}
    ids = list({one.claimed.webhook_id for one in outcomes})
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        cursor.execute(_LOCK_ALL, [ids])
        # Failures first: a receiver that took something works.
        for statement, is_taken in ((_NOT_TAKEN, False), (_TAKEN, True)):
            values = [
                {**shared, **one.claimed._asdict(), **one._asdict(), "claimed": None}
                for one in outcomes
                if (one.error is None) is is_taken
            ]
            cursor.executemany(statement.encode(), values)
        _promote(cursor, ((one.claimed.webhook_id, one.claimed.eval_id) for one in outcomes))
        disabled = cursor.execute(_DISABLED, [ids, now]).fetchall()
    return [webhook_id for (webhook_id,) in disabled]


_DISABLED: Final = "SELECT id FROM webhooks WHERE id = ANY(%s) AND state = 'disabled' AND disabled_at = %s"
_PRUNE: Final = """
DELETE FROM webhook_deliveries WHERE (eval_id, id) IN (
    SELECT d.eval_id, d.id FROM webhook_deliveries d
    WHERE d.created_at < %(before)s AND (d.state <> 'pending'
        OR NOT EXISTS (SELECT FROM webhooks w WHERE w.id = d.webhook_id AND w.state = 'active'))
    ORDER BY d.created_at LIMIT %(limit)s
)
"""


def prune(conn: Connection, before: datetime) -> int:
    """Delete settled deliveries of before a time, and those that a disabled subscription left. Return how many.

    Commits. Raises DatabaseOutage (retry).
    """
    with database.errors(), conn.begin():
        return database.driver(conn).execute(_PRUNE, {"before": before, "limit": _PRUNED}).rowcount


_HISTORY: Final = """
SELECT id, webhook_id, type,
    CASE WHEN eval_id <> '' AND NOT starts_with(eval_id, '/') THEN eval_id END AS eval_id,
    version, state, attempts, status_code, error, created_at,
    CASE WHEN state = 'pending' THEN greatest(next_at, created_at) END AS next_at, finished_at
FROM webhook_deliveries
WHERE webhook_id = %(webhook_id)s AND (%(state)s::text IS NULL OR state = %(state)s::text)
    AND (%(id)s::uuid IS NULL OR id = %(id)s::uuid)
ORDER BY seq DESC LIMIT %(limit)s
"""


def history(
    conn: Connection, webhook_id: UUID, *, limit: int = 100, state: str | None = None, delivery_id: UUID | None = None
) -> list[Delivery]:
    """The newest deliveries of a subscription first. Raises DatabaseOutage (retry)."""
    values = {"webhook_id": webhook_id, "limit": limit, "state": state, "id": delivery_id}
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=class_row(Delivery)) as cursor:
        return cursor.execute(_HISTORY, values).fetchall()


_TRY_NOW: Final = "UPDATE webhooks SET next_at = least(next_at, %s) WHERE id = %s AND state = 'active'"
_AGAIN: Final = """
UPDATE webhook_deliveries SET state = 'pending', is_next = false, seq = DEFAULT, attempts = 0, first_attempt_at = NULL,
    next_at = %s, finished_at = NULL
WHERE webhook_id = %s AND id = %s AND state <> 'pending' RETURNING eval_id
"""


def queue_test(conn: Connection, webhook_id: UUID, intent: Intent, now: datetime) -> UUID | None:
    """Queue a delivery that holds no evaluation, and is tried once; None unless the subscription is active.

    Commits. Raises DatabaseOutage (retry).
    """
    delivery_id = uuid4()
    data = {"type": TEST, "webhook_id": str(webhook_id), "recorded_at": rfc3339(now)}
    row = {"eval_id": "", "id": delivery_id, "webhook_id": webhook_id, "type": TEST, "version": 0, "now": now}
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        if cursor.execute(_TRY_NOW, [now, webhook_id]).rowcount != 1:
            return None
        _insert(cursor, [row | {"body": body(TEST, rfc3339(now), data), "next_at": _FIRST}])
        operator_actions.write(cursor, intent, 1)
    return delivery_id


def redeliver(conn: Connection, webhook_id: UUID, delivery_id: UUID, intent: Intent, now: datetime) -> bool:
    """Send a settled delivery once more, after what is pending of its evaluation. False unless there is one and its
    subscription is active.

    Commits. Raises DatabaseOutage (retry).
    """
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        if cursor.execute(_TRY_NOW, [now, webhook_id]).rowcount != 1:
            return False
        found = cursor.execute(_AGAIN, [now, webhook_id, delivery_id]).fetchall()
        if found:
            _promote(cursor, [(webhook_id, found[0][0])])
            operator_actions.write(cursor, intent, 1)
    return bool(found)
