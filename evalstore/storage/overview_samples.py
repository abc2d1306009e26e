"""A sample a minute of the numbers that the console draws, kept for a day. They survive restarts of every process."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple

from psycopg.types.json import Jsonb
from sqlalchemy import Connection

from evalstore.storage import database, sink_cursors

_MOST_DEAD: Final = 100_000
_DEAD: Final = f"SELECT count(*) FROM (SELECT FROM dead_letters WHERE state = 'dead' LIMIT {_MOST_DEAD}) counted"
_ADD: Final = """
INSERT INTO overview_samples (at, numbers) VALUES (date_trunc('minute', now()), %s)
ON CONFLICT (at) DO UPDATE SET numbers = excluded.numbers
"""
_FORGET: Final = "DELETE FROM overview_samples WHERE at < now() - interval '25 hours'"


def add(conn: Connection, numbers: Mapping[str, float]) -> dict[str, float]:
    """Keep `numbers` with those of the database as the sample of this minute. Remove old samples. Return the sample. Commit.

    Raises DatabaseOutage (retry).
    """
    lag_s = max((sink.lag_s for sink in sink_cursors.statuses(conn)), default=0.0)
    with database.errors(), conn.begin():
        raw = database.driver(conn)
        ((dead,),) = raw.execute(_DEAD.encode()).fetchall()
        sample = {**numbers, "dead": dead, "sink_lag_s": round(lag_s, 1)}
        raw.execute(_ADD, [Jsonb(sample)])
        raw.execute(_FORGET)
    return sample


class Sample(NamedTuple):
    """The numbers of a minute."""

    at: datetime
    numbers: dict[str, Any]


def last_day(conn: Connection) -> list[Sample]:
    """Return the samples of the last 24 hours, oldest first. Raises DatabaseOutage (retry)."""
    query = "SELECT at, numbers FROM overview_samples WHERE at > now() - interval '24 hours' ORDER BY at"
    with database.errors(), conn.begin():
        return [Sample(*row) for row in database.driver(conn).execute(query).fetchall()]
