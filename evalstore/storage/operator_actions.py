"""Record the changes of operators: who, when, why and what. Each row is written in the transaction of its change."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from sqlalchemy import Connection

from evalstore.storage import database


class Intent(NamedTuple):
    """Who wants which action, and why. `filter` is the selection, as names and values."""

    verb: str
    actor: str
    reason: str | None
    filter: Mapping[str, Any]


_WRITE: Final = """
INSERT INTO operator_actions (actor, verb, reason, filter, count, redrive, details) VALUES (%s, %s, %s, %s, %s, %s, %s)
"""


def write(
    cursor: psycopg.Cursor[Any],
    intent: Intent,
    count: int,
    *,
    redrive: UUID | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Insert the action in the transaction of `cursor`, which the caller commits."""
    values = [intent.actor, intent.verb, intent.reason, Jsonb(dict(intent.filter)), count, redrive, Jsonb(dict(details or {}))]
    cursor.execute(_WRITE, values)


def note(conn: Connection, intent: Intent, count: int, *, details: Mapping[str, Any] | None = None) -> None:
    """Record an action that has its own transactions, before or after them. Commit. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        write(cursor, intent, count, details=details)


_LATEST: Final = """
SELECT at, actor, verb, reason, filter, count, redrive, details FROM operator_actions ORDER BY at DESC, id DESC LIMIT %s
"""


def latest(conn: Connection, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the newest actions first. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=dict_row) as cursor:
        return cursor.execute(_LATEST, [limit]).fetchall()


class Filter(NamedTuple):
    """Which actions; None: all."""

    actor: str | None = None
    verb: str | None = None


_PAGE: Final = """
SELECT id, at, actor, verb, reason, filter, count, redrive, details FROM operator_actions
WHERE (%(actor)s::text IS NULL OR actor = %(actor)s) AND (%(verb)s::text IS NULL OR verb = %(verb)s)
    AND (%(at)s::timestamptz IS NULL OR (at, id) < (%(at)s, %(id)s))
ORDER BY at DESC, id DESC LIMIT %(limit)s
"""


def page(conn: Connection, chosen: Filter, limit: int, before: tuple[datetime, int] | None = None) -> list[dict[str, Any]]:
    """Return the newest actions first, or those before a position. Raises DatabaseOutage (retry)."""
    at, action_id = before or (None, None)
    values = {**chosen._asdict(), "at": at, "id": action_id, "limit": limit}
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=dict_row) as cursor:
        return cursor.execute(_PAGE, values).fetchall()
