"""Statistics of finished evaluations, by hour, day or month of `finished_at` in UTC, and by one dimension."""

from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from sqlalchemy import Connection

from evalstore.storage import database, rollups
from evalstore.storage.rollups import DIMENSIONS
from evalstore.storage.summaries import COLUMNS, Fact, Summary
from evalstore.storage.visibility import EVERYTHING, Visibility

Bucket = Literal["hour", "day", "month", "all"]
GroupBy = Literal["status", "language", "submitter", "executor", "run"]
MOST_BUCKETS: Final = 10_000
# Rows of the answer, and stored rows or evaluations that are read for it.
MOST_ROWS: Final = 10_000
_MOST_READ: Final = 200_000


class TooMuch(Exception):
    """The answer would be too large; `field` is the parameter to narrow."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field, self.problem = field, problem


@dataclass(frozen=True)
class Query:
    """What is asked for. `since` and `until` are rounded outwards to whole buckets; `value` restricts to one of `group_by`."""

    since: datetime
    until: datetime
    bucket: Bucket = "day"
    group_by: GroupBy | None = None
    value: str | None = None
    visibility: Visibility = EVERYTHING


def floor(at: datetime, bucket: Bucket) -> datetime:
    """Return the start of the bucket that holds a time."""
    at = at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    if bucket in {"day", "month"}:
        at = at.replace(hour=0)
    return at.replace(day=1) if bucket == "month" else at


def _next(start: datetime, bucket: Bucket) -> datetime:
    if bucket == "month":
        return (start + timedelta(days=32)).replace(day=1)
    return start + timedelta(days=1) if bucket == "day" else start + timedelta(hours=1)


def span(asked: Query) -> tuple[datetime, datetime]:
    """Return the range of whole buckets that holds the range asked for. Raises TooMuch."""
    if asked.until <= asked.since:
        raise TooMuch("until", "expected a time after since")
    size = {"hour": 3600, "day": 86_400, "month": 28 * 86_400, "all": 86_400 * 366}[asked.bucket]
    try:
        first, last = floor(asked.since, asked.bucket), floor(asked.until, asked.bucket)
        until = last if last == asked.until else _next(last, asked.bucket)
    except OverflowError:
        raise TooMuch("until", "expected a time before the year 9999") from None
    if (until - first).total_seconds() / size > MOST_BUCKETS:
        raise TooMuch("since", f"the range has more than {MOST_BUCKETS:,} buckets: narrow it, or take larger ones")
    return first, until


_READ: Final = f"""
SELECT hour, value, {", ".join(COLUMNS)} FROM statistics WHERE dimension = %s AND hour >= %s AND hour < %s
"""


def read(conn: Connection, asked: Query) -> list[dict[str, Any]]:
    """Return a row for each bucket and value that has evaluations, by bucket and by number, the most first.

    A restricted key gets statistics of the evaluations that it may see, computed from these. Raises TooMuch, DatabaseOutage
    (retry).
    """
    since, until = span(asked)
    sums: defaultdict[tuple[datetime, str | None], Summary] = defaultdict(Summary)
    add = _add_evaluations if asked.visibility.is_restricted else _add_rows
    add(conn, asked, since, until, sums)
    if len(sums) > MOST_ROWS:
        raise TooMuch("group_by", f"the answer has more than {MOST_ROWS:,} rows: narrow the range, or ask for one value")
    rows = sorted(sums.items(), key=lambda item: (item[0][0], -item[1].evaluations, item[0][1] or ""))
    return [_row(asked, bucket, value, summary) for (bucket, value), summary in rows if summary.evaluations]


def _row(asked: Query, bucket: datetime, value: str | None, summary: Summary) -> dict[str, Any]:
    group: dict[str, Any] = {asked.group_by: value} if asked.group_by else {}
    return {"bucket": None if asked.bucket == "all" else bucket, **group, **summary.as_json()}


_Sums = defaultdict[tuple[datetime, str | None], Summary]


def _start(asked: Query, since: datetime, hour: datetime) -> datetime:
    return since if asked.bucket == "all" else floor(hour, asked.bucket)


def _add_rows(conn: Connection, asked: Query, since: datetime, until: datetime, sums: _Sums) -> None:
    query, values = _READ, list[Any]([asked.group_by or "", since, until])
    if asked.group_by and asked.value is not None:
        query, values = f"{query} AND value_key = %s", [*values, rollups.value_key(asked.value)]
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        rows = cursor.execute(f"{query} LIMIT %s".encode(), [*values, _MOST_READ + 1]).fetchall()
    if len(rows) > _MOST_READ:
        raise TooMuch("since", "the range holds too many values: narrow it, or ask for one value")
    for hour, value, *columns in rows:
        sums[_start(asked, since, hour), value].add_row(columns)


def _add_evaluations(conn: Connection, asked: Query, since: datetime, until: datetime, sums: _Sums) -> None:
    column = DIMENSIONS[asked.group_by] if asked.group_by else "NULL::text"
    conditions, values = asked.visibility.conditions()
    if asked.visibility.submitter is not None:  # as the index has it
        conditions, values = [*conditions, "left(submitter, 200) = %s"], [*values, asked.visibility.submitter[:200]]
    if asked.group_by and asked.value is not None:
        conditions, values = [*conditions, f"{column} = %s"], [*values, asked.value]
    query = f"""
SELECT {column}, run_id, submitter, language, executor_id, status, date_bin('1 hour', finished_at, '2000-01-01 00:00:00Z'),
    coalesce(status = 'completed' AND exit_code = 0, false), score, duration_ms, memory_bytes
FROM evaluations WHERE finished_at >= %s AND finished_at < %s AND {" AND ".join(conditions)} LIMIT %s
"""
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        rows = cursor.execute(query.encode(), [since, until, *values, _MOST_READ + 1]).fetchall()
    if len(rows) > _MOST_READ:
        raise TooMuch("since", f"the key sees more than {_MOST_READ:,} evaluations in the range: narrow it")
    for value, *fact in rows:
        found = Fact(*fact)
        if found.hour is not None:
            sums[_start(asked, since, found.hour), value].count(found)
