"""List evaluations: filtered, in order of creation, by page or all at once.

All lists use one index on `created_at`. Records of one commit share that time and are sorted by `eval_id` at reading. Another
index would make each stored event dearer, and lists are rare.

A page read by cursor examines at most SCAN evaluations. So it may hold fewer evaluations than requested, even none, and still
have a next cursor. Its duration does not depend on the filter or on the size of the table. A page read by number examines as
many evaluations as needed, for at most PATIENCE_S: a filter without matches cannot keep the database busy.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, NamedTuple

from psycopg.errors import QueryCanceled
from sqlalchemy import Connection

from evalstore.storage import database
from evalstore.storage.records import readable
from evalstore.storage.visibility import EVERYTHING, Visibility
from models.errors import DatabaseOutage
from models.record import RecordRow

SCAN: Final = 5_000
LOOKED: Final = 200_000
PATIENCE_S: Final = 5.0
COUNTED: Final = 1_000_000
_CHUNK: Final = 1_000

COLUMNS: Final = (*(name for name in RecordRow._fields if not name.endswith("_event_id")), "created_at", "updated_at")
_SELECT: Final = f"SELECT {', '.join(COLUMNS)} FROM evaluations"


class Position(NamedTuple):
    """The evaluation after which a list goes on."""

    created_at: datetime
    eval_id: str


@dataclass(frozen=True)
class Filter:
    """A filter for lists. `since` is inclusive, `until` exclusive; both apply to `created_at`."""

    statuses: Sequence[str] = ()
    language: str | None = None
    submitter: str | None = None
    executor_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    oldest_first: bool = False
    visibility: Visibility = EVERYTHING

    @property
    def is_selective(self) -> bool:
        """Tell whether the filter may skip any number of evaluations between two matches."""
        return bool(
            self.statuses
            or self.language
            or self.submitter
            or self.executor_id
            or self.metadata
            or self.visibility.is_restricted
        )


class Page(NamedTuple):
    """Evaluations, and the position of the next page. The position is None at the end of the list."""

    rows: list[dict[str, Any]]
    following: Position | None


def _where(chosen: Filter, after: Position | None = None, up_to: Position | None = None) -> tuple[str, list[Any]]:
    beyond, within = (">", "<=") if chosen.oldest_first else ("<", ">=")
    conditions: list[str] = []
    values: list[Any] = []

    def add(condition: str, *parameters: Any) -> None:
        conditions.append(condition)
        values.extend(parameters)

    if chosen.statuses:
        add("status = ANY(%s)", list(chosen.statuses))
    for column in ("language", "submitter", "executor_id"):
        if (value := getattr(chosen, column)) is not None:
            add(f"{column} = %s", value)
    for key, value in chosen.metadata.items():
        add("metadata ->> %s = %s", key, value)
    visible, parameters = chosen.visibility.conditions()
    conditions += visible
    values += parameters
    if chosen.since is not None:
        add("created_at >= %s", chosen.since)
    if chosen.until is not None:
        add("created_at < %s", chosen.until)
    if after is not None:
        add(f"(created_at, eval_id) {beyond} (%s, %s)", *after)
    if up_to is not None:
        add(f"(created_at, eval_id) {within} (%s, %s)", *up_to)
    return (f" WHERE {' AND '.join(conditions)}" if conditions else ""), values


def _order(chosen: Filter) -> str:
    direction = "ASC" if chosen.oldest_first else "DESC"
    return f" ORDER BY created_at {direction}, eval_id {direction}"


# Read by the index on the order, also if the planner's estimate for a filter suggests another plan.
_BEGIN: Final = (
    "SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; SET LOCAL max_parallel_workers_per_gather = 0"
)


def page(conn: Connection, chosen: Filter, *, limit: int, after: Position | None = None, scan: int | None = None) -> Page:
    """Return matching evaluations among the next `scan` (default SCAN) after a position. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        cursor.execute(_BEGIN, binary=False)
        scanned: Position | None = None
        if chosen.is_selective:
            span = Filter(since=chosen.since, until=chosen.until, oldest_first=chosen.oldest_first)
            where, values = _where(span, after)
            query = f"SELECT created_at, eval_id FROM evaluations{where}{_order(chosen)} OFFSET %s LIMIT 1"
            cursor.execute(query.encode(), [*values, (scan or SCAN) - 1])
            bound = cursor.fetchone()
            scanned = Position(*bound) if bound else None
        where, values = _where(chosen, after, scanned)
        cursor.execute(f"{_SELECT}{where}{_order(chosen)} LIMIT %s".encode(), [*values, limit + 1])
        rows = [readable(dict(zip(COLUMNS, row, strict=True))) for row in cursor]
    if len(rows) > limit:
        rows = rows[:limit]
        return Page(rows, Position(rows[-1]["created_at"], rows[-1]["eval_id"]))
    return Page(rows, scanned)


def numbered_page(conn: Connection, chosen: Filter, *, limit: int, offset: int) -> Page | None:
    """Return the page that starts at `offset`. If the search takes too long, search only the first LOOKED evaluations.

    In that case return None for an `offset` above zero. Raises DatabaseOutage (retry).
    """
    where, values = _where(chosen)
    rows = _in_time(conn, f"{_SELECT}{where}{_order(chosen)} LIMIT %s OFFSET %s", [*values, limit + 1, offset])
    if rows is None:
        return None if offset else page(conn, chosen, limit=limit, scan=LOOKED)
    records = [readable(dict(zip(COLUMNS, row, strict=True))) for row in rows[:limit]]
    return Page(records, Position(records[-1]["created_at"], records[-1]["eval_id"]) if len(rows) > limit else None)


def count(conn: Connection, chosen: Filter) -> int | None:
    """Count the evaluations, up to COUNTED. Return None if that takes too long. Raises DatabaseOutage (retry)."""
    where, values = _where(chosen)
    query = f"SELECT count(*) FROM (SELECT FROM evaluations{where} LIMIT %s) AS counted"
    counted = _in_time(conn, query, [*values, COUNTED])
    return None if counted is None else int(counted[0][0])


def _in_time(conn: Connection, query: str, values: list[Any]) -> list[tuple[Any, ...]] | None:
    """Return the rows, or None if the query takes longer than PATIENCE_S."""
    try:
        with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
            cursor.execute(f"SET LOCAL statement_timeout = {int(PATIENCE_S * 1000)}".encode(), binary=False)
            return cursor.execute(query.encode(), values).fetchall()
    except DatabaseOutage as error:
        if not isinstance(error.__cause__, QueryCanceled):
            raise
        return None


def export(conn: Connection, chosen: Filter) -> Generator[list[dict[str, Any]]]:
    """Yield all evaluations of one snapshot in lists of up to 1,000, through a server-side cursor.

    Holds the connection until the generator is exhausted or closed. Raises DatabaseOutage (start again).
    """
    where, values = _where(chosen)
    query = f"{_SELECT}{where}{_order(chosen)}"
    with database.errors(), conn.begin():
        raw = database.driver(conn)
        raw.execute("SET LOCAL cursor_tuple_fraction = 1.0")
        with raw.cursor("evalstore_export", binary=True) as cursor:
            cursor.execute(query.encode(), values)
            while rows := cursor.fetchmany(_CHUNK):
                yield [readable(dict(zip(COLUMNS, row, strict=True))) for row in rows]
