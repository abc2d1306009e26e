"""List evaluations: filtered and sorted, by page or all at once.

A list by run, submitter, executor, status other than `completed`, indexed metadata, or prefix of `eval_id` reads its own index,
in the order of the list. All other filters are applied to what that index gives, or the index on `created_at`. Records of one
commit share `created_at` and are sorted by `eval_id` at reading. list_indexes.py

A page read by cursor examines at most SCAN evaluations. So it may hold fewer evaluations than requested, even none, and still
have a next cursor. Its duration does not depend on the filter or on the size of the table. A page read by number examines as
many evaluations as needed, for at most PATIENCE_S: a filter without matches cannot keep the database busy. So does a page that
is sorted by a value, which reads its whole run.
"""

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple

from psycopg.errors import QueryCanceled
from sqlalchemy import Connection

from evalstore.storage import database, list_indexes
from evalstore.storage.list_indexes import PREFIX_CHARACTERS
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

Sort = Literal["created_at", "eval_id", "duration_ms", "memory_bytes", "score"]
# Sorted by these, evaluations without the value come last.
BY_VALUE: Final = ("duration_ms", "memory_bytes", "score")


class Position(NamedTuple):
    """The evaluation after which a list goes on. `key` is what the list is sorted by, None if that is `eval_id` alone."""

    key: datetime | float | None
    eval_id: str


class RunTooLarge(Exception):
    """Sorting the run by a value takes too long."""


@dataclass(frozen=True)
class Filter:
    """A filter for lists, and their order. `since` is inclusive, `until` exclusive; both apply to `created_at`."""

    statuses: Sequence[str] = ()
    language: str | None = None
    submitter: str | None = None
    executor_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    oldest_first: bool = False
    run_id: str | None = None
    eval_id_prefix: str | None = None
    sort: Sort | None = None
    visibility: Visibility = EVERYTHING

    @property
    def sorted_by(self) -> Sort:
        """What the list is sorted by: without `sort` by time, or by `eval_id` if it is filtered by that."""
        return self.sort or ("created_at" if self.eval_id_prefix is None else "eval_id")


class Page(NamedTuple):
    """Evaluations, and the position of the next page. The position is None at the end of the list."""

    rows: list[dict[str, Any]]
    following: Position | None


class _Condition(NamedTuple):
    sql: str
    values: tuple[Any, ...]


class _Plan(NamedTuple):
    """How to read a list: the parts that together hold the candidates, in order by an index each, and the other conditions."""

    parts: list[list[_Condition]]
    rest: list[_Condition]


def _long(column: str, value: str) -> list[_Condition]:
    """Return conditions for text that the index holds the beginning of."""
    beginning = value[:PREFIX_CHARACTERS]
    return [_Condition(f"left({column}, {PREFIX_CHARACTERS}) = %s", (beginning,)), _Condition(f"{column} = %s", (value,))]


def _metadata(key: str, value: str) -> list[_Condition]:
    expression = list_indexes.metadata_expression(key).as_string().replace("%", "%%")
    whole = _Condition("metadata ->> %s = %s", (key, value))
    return [_Condition(f"{expression} = %s", (value[:PREFIX_CHARACTERS],)), whole]


def _range(chosen: Filter) -> list[_Condition]:
    """Return the conditions that the index on `created_at` answers as well as the others."""
    found = [_Condition("created_at >= %s", (chosen.since,))] if chosen.since is not None else []
    return [*found, _Condition("created_at < %s", (chosen.until,))] if chosen.until is not None else found


def _plan(chosen: Filter, indexes: Collection[str]) -> _Plan:
    filters: dict[str, list[_Condition]] = {}
    if (run_id := chosen.run_id) is not None:
        filters["evaluations_by_run"] = [_Condition("run_id = %s", (run_id,))]
    if (submitter := chosen.submitter if chosen.submitter is not None else chosen.visibility.submitter) is not None:
        filters["evaluations_by_submitter"] = _long("submitter", submitter)
    if chosen.executor_id is not None:
        filters["evaluations_by_executor"] = _long("executor_id", chosen.executor_id)
    for key, value in chosen.metadata.items():
        filters[list_indexes.metadata_index(key)] = _metadata(key, value)
    statuses = [_Condition("status = ANY(%s)", (list(chosen.statuses),))] if chosen.statuses else []
    others = [_Condition("language = %s", (chosen.language,))] if chosen.language is not None else []
    conditions, values = chosen.visibility.conditions()
    others += [_Condition(condition, (value,)) for condition, value in zip(conditions, values, strict=True)]
    times = _range(chosen)
    if (prefix := chosen.eval_id_prefix) is not None:
        prefixed = [_Condition("eval_id >= %s AND eval_id < %s", (prefix, f"{prefix}\x7f"))]
        if chosen.sorted_by == "eval_id":
            return _Plan([prefixed], [*statuses, *others, *times, *(one for some in filters.values() for one in some)])
        others += prefixed
    if chosen.sorted_by == "eval_id":
        return _Plan([[]], [*statuses, *others, *times, *(one for some in filters.values() for one in some)])
    best = next((name for name in filters if name in indexes), None)
    if best is not None:
        first = filters.pop(best)
        return _Plan([[*first, *times]], [*statuses, *others, *(one for some in filters.values() for one in some)])
    rest = [*others, *(one for some in filters.values() for one in some)]
    is_few = chosen.statuses and "completed" not in chosen.statuses and chosen.sorted_by == "created_at"
    if is_few and "evaluations_by_status" in indexes:
        # A literal, so that the planner sees that the partial index holds all of them.
        return _Plan([[_Condition(f"status = '{status}'", ()), *times] for status in sorted({*chosen.statuses})], rest)
    return _Plan([times], [*statuses, *rest])


def _key(chosen: Filter) -> str | None:
    if chosen.sorted_by in BY_VALUE:
        last = "Infinity" if chosen.oldest_first else "-Infinity"
        return f"coalesce({chosen.sorted_by}::float8, '{last}')"
    return None if chosen.sorted_by == "eval_id" else "created_at"


def _order(chosen: Filter, key: str | None) -> str:
    direction = "ASC" if chosen.oldest_first else "DESC"
    return f" ORDER BY {f'{key} {direction}, ' if key else ''}eval_id {direction}"


def _compare(chosen: Filter, operator: str, position: Position) -> _Condition:
    key = _key(chosen)
    if key is None:
        return _Condition(f"eval_id {operator} %s", (position.eval_id,))
    return _Condition(f"({key}, eval_id) {operator} (%s, %s)", (position.key, position.eval_id))


def _query(
    select: str, chosen: Filter, parts: Sequence[Sequence[_Condition]], rest: Sequence[_Condition], most: int | None
) -> tuple[str, list[Any]]:
    """Return a statement that reads at most so many rows of each part, and puts them in order."""
    key = _key(chosen)
    queries, values = list[str](), list[Any]()
    for part in parts:
        conditions = [*part, *rest]
        where = f" WHERE {' AND '.join(condition.sql for condition in conditions)}" if conditions else ""
        limit = "" if most is None else " LIMIT %s"
        queries.append(f"{select.format(key=key or 'NULL::timestamptz')}{where}{_order(chosen, key)}{limit}")
        values += [value for condition in conditions for value in condition.values]
        values += [] if most is None else [most]
    if len(queries) == 1:
        return queries[0], values
    joined = " UNION ALL ".join(f"({query})" for query in queries)
    return f"SELECT * FROM ({joined}) parts{_order(chosen, key and 'created_at')}", values


# The parts are read by their indexes, also if the planner's estimate suggests another plan: without the cost of pages, only the
# number of rows counts, and an index that holds just the matches reads the fewest.
BEGIN: Final = (
    "SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; SET LOCAL max_parallel_workers_per_gather = 0;"
    " SET LOCAL random_page_cost = 0; SET LOCAL seq_page_cost = 0"
)


def page(conn: Connection, chosen: Filter, *, limit: int, after: Position | None = None, scan: int | None = None) -> Page:
    """Return matching evaluations among the next `scan` (default SCAN) after a position.

    Raises RunTooLarge, DatabaseOutage (retry).
    """
    if chosen.sorted_by in BY_VALUE:
        return _sorted_page(conn, chosen, limit, after)
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        cursor.execute(BEGIN, binary=False)
        plan = _plan(chosen, list_indexes.existing_in(cursor))
        scanned: Position | None = None
        if plan.rest:
            most = scan or SCAN
            further = _beyond(chosen, after)
            query, values = _query("SELECT {key} AS created_at, eval_id FROM evaluations", chosen, plan.parts, further, most)
            cursor.execute(f"SELECT * FROM ({query}) candidates OFFSET %s LIMIT 1".encode(), [*values, most - 1])
            bound = cursor.fetchone()
            scanned = Position(*bound) if bound else None
        query, values = _statement(chosen, plan, limit, after, scanned)
        rows = cursor.execute(query.encode(), values).fetchall()
    return _page(chosen, rows, limit, scanned)


def _beyond(chosen: Filter, after: Position | None) -> list[_Condition]:
    return [] if after is None else [_compare(chosen, ">" if chosen.oldest_first else "<", after)]


def _statement(
    chosen: Filter, plan: _Plan, limit: int, after: Position | None, scanned: Position | None = None
) -> tuple[str, list[Any]]:
    further = _beyond(chosen, after)
    if scanned is not None:
        further.append(_compare(chosen, "<=" if chosen.oldest_first else ">=", scanned))
    query, values = _query(_SELECT, chosen, plan.parts, [*plan.rest, *further], limit + 1)
    return f"SELECT * FROM ({query}) page LIMIT %s", [*values, limit + 1]


def explain(conn: Connection, chosen: Filter, *, limit: int, after: Position | None = None) -> dict[str, Any]:
    """Run the statement of a page, and return PostgreSQL's plan of it with the rows and blocks that it read."""
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        cursor.execute(BEGIN)
        query, values = _statement(chosen, _plan(chosen, list_indexes.existing_in(cursor)), limit, after)
        ((found,),) = cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}".encode(), values).fetchall()
    plan: dict[str, Any] = found[0]["Plan"]
    return plan


def _page(chosen: Filter, rows: Sequence[tuple[Any, ...]], limit: int, scanned: Position | None = None) -> Page:
    records = [readable(dict(zip(COLUMNS, row, strict=True))) for row in rows[:limit]]
    return Page(records, _position(chosen, records[-1]) if len(rows) > limit else scanned)


def _position(chosen: Filter, record: Mapping[str, Any]) -> Position:
    if chosen.sorted_by in BY_VALUE:
        value = record[chosen.sorted_by]
        last = float("inf") if chosen.oldest_first else float("-inf")
        return Position(last if value is None else float(value), record["eval_id"])
    return Position(None if chosen.sorted_by == "eval_id" else record["created_at"], record["eval_id"])


def _sorted_page(conn: Connection, chosen: Filter, limit: int, after: Position | None) -> Page:
    rows = _in_time(conn, *_statement(chosen, _plan(chosen, list_indexes.existing(conn)), limit, after))
    if rows is None:
        raise RunTooLarge
    return _page(chosen, rows, limit)


def numbered_page(conn: Connection, chosen: Filter, *, limit: int, offset: int) -> Page | None:
    """Return the page that starts at `offset`. If the search takes too long, search only the first LOOKED evaluations.

    In that case return None for an `offset` above zero. Raises RunTooLarge, DatabaseOutage (retry).
    """
    plan = _plan(chosen, list_indexes.existing(conn))
    query, values = _query(_SELECT, chosen, plan.parts, plan.rest, offset + limit + 1)
    rows = _in_time(conn, f"SELECT * FROM ({query}) page OFFSET %s LIMIT %s", [*values, offset, limit + 1])
    if rows is None:
        return None if offset else page(conn, chosen, limit=limit, scan=LOOKED)
    return _page(chosen, rows, limit)


class Total(NamedTuple):
    """The number of matches, or the planner's estimate of it."""

    evaluations: int
    is_estimate: bool


def count(conn: Connection, chosen: Filter, *, up_to: int = COUNTED, patience_s: float | None = None) -> Total:
    """Count the evaluations. Return an estimate if there are more than `up_to`, or if that takes longer than `patience_s`,
    by default PATIENCE_S.

    Raises DatabaseOutage (retry).
    """
    plan = _plan(chosen, list_indexes.existing(conn))
    conditions = [[*part, *plan.rest] for part in plan.parts]
    wheres = [" AND ".join(condition.sql for condition in some) or "true" for some in conditions]
    where = " OR ".join(f"({one})" for one in wheres)
    values = [value for some in conditions for condition in some for value in condition.values]
    query = f"SELECT count(*) FROM (SELECT 1 FROM evaluations WHERE {where} LIMIT %s) c"
    counted = _in_time(conn, query, [*values, up_to + 1], patience_s)
    if counted is not None and counted[0][0] <= up_to:
        return Total(int(counted[0][0]), is_estimate=False)
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        ((plans,),) = cursor.execute(f"EXPLAIN (FORMAT JSON) SELECT FROM evaluations WHERE {where}".encode(), values).fetchall()
    estimate = int(plans[0]["Plan"]["Plan Rows"])
    return Total(max(estimate, up_to) if counted else estimate, is_estimate=True)


def _in_time(conn: Connection, query: str, values: list[Any], patience_s: float | None = None) -> list[tuple[Any, ...]] | None:
    """Return the rows, or None if the query takes longer than `patience_s`, by default PATIENCE_S."""
    timeout_s = PATIENCE_S if patience_s is None else patience_s
    try:
        with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
            cursor.execute(f"SET LOCAL statement_timeout = {int(timeout_s * 1000)}".encode(), binary=False)
            return cursor.execute(query.encode(), values).fetchall()
    except DatabaseOutage as error:
        if not isinstance(error.__cause__, QueryCanceled):
            raise
        return None


def export(conn: Connection, chosen: Filter) -> Generator[list[dict[str, Any]]]:
    """Yield all evaluations of one snapshot in lists of up to 1,000, through a server-side cursor.

    Holds the connection until the generator is exhausted or closed. Raises DatabaseOutage (start again).
    """
    plan = _plan(chosen, list_indexes.existing(conn))
    query, values = _query(_SELECT, chosen, plan.parts, plan.rest, None)
    with database.errors(), conn.begin():
        raw = database.driver(conn)
        raw.execute("SET LOCAL cursor_tuple_fraction = 1.0")
        with raw.cursor("evalstore_export", binary=True) as cursor:
            cursor.execute(query.encode(), values)
            while rows := cursor.fetchmany(_CHUNK):
                yield [readable(dict(zip(COLUMNS, row, strict=True))) for row in rows]
