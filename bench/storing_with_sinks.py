"""Measure what sinks cost storing: processor time of a storing thread and its backend, with and without, batch by batch.

    python -m bench.storing_with_sinks [PAIRS]

With: the index of the event log by time, and the clock of each statement as its default. Without: neither. A runner only reads.
It starts a PostgreSQL with a database for each. The ratio of pairs of batches is the result.
"""

import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from sqlalchemy import Connection

from evalstore.local.servers import Postgres
from evalstore.storage import database, event_store, migrations
from evalstore.storage.log_index import NAME
from models.events import parse
from models.record import EventRow, to_row
from models.settings import settings

_BATCH: Final = 2000


def main() -> None:
    """Print the processor time for each event, with and without, and the quartiles of the ratios."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as folder, Postgres(Path(folder, "postgres")) as postgres:
        for schema in ("with_sinks", "without"):
            migrations.upgrade(postgres.url(), schema=schema)
        engines = [database.engine(postgres.url(), schema=schema) for schema in ("with_sinks", "without")]
        with closing(engines[0].connect()) as with_sinks, closing(engines[1].connect()) as without:
            with without.begin():
                without.exec_driver_sql(f"DROP INDEX {NAME}")
                without.exec_driver_sql("ALTER TABLE evaluation_events ALTER COLUMN recorded_at SET DEFAULT now()")
            times: list[tuple[float, float]] = []
            for number in range(pairs + 10):
                batch = _events(number)
                order = (with_sinks, without) if number % 2 else (without, with_sinks)
                used = {conn: _store(conn, batch) for conn in order}
                times.append((used[with_sinks], used[without]))
        del times[:10]  # warm-up
        low, middle, high = statistics.quantiles([one / other for one, other in times], n=4)
        us = [statistics.median(column) * 1e6 / _BATCH for column in zip(*times, strict=True)]
        print(f"{us[1]:.2f} µs without, {us[0]:.2f} µs with; ratio {middle:.3f} ({low:.3f} to {high:.3f})")


def _store(conn: Connection, batch: list[EventRow]) -> float:
    before = _used_s(conn)
    event_store.store(conn, batch)
    return _used_s(conn) - before


def _events(number: int) -> list[EventRow]:
    made: list[dict[str, Any]] = [
        {
            "type": "evaluation:completed",
            "eval_id": f"e{number}-{at // 2}",
            "event_id": uuid4(),
            "occurred_at": "2026-01-01T00:00:00Z",
            "exit_code": 0,
            "output": "x" * 700,
        }
        for at in range(_BATCH)
    ]
    return [to_row(parse(event)) for event in made]


def _backend(conn: Connection) -> int:
    with conn.begin():
        return int(conn.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())


def _used_s(conn: Connection) -> float:
    on_cpu_ns, *_ = Path(f"/proc/{_backend(conn)}/schedstat").read_text().split()
    return time.thread_time() + int(on_cpu_ns) / 1e9


if __name__ == "__main__":
    settings()
    main()
