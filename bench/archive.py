"""Measure a run of the archive in a large table: `python -m bench.archive [--rows N] [--due 1000]`.

The first run has only due content. The second run has N evaluations more, whose content is in the database and not due. For
each it prints the seconds, the processor time and the pages that PostgreSQL read, the milliseconds of a run without due
content, and the pages that the search for due content reads. The ratios at the end should be near 1.
"""

import argparse
import os
import statistics
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import psycopg
from sqlalchemy import Engine

from evalstore.local.servers import Postgres
from evalstore.storage import archive, database, migrations
from evalstore.storage.archive import Archive
from models.settings import Settings

_FILL = """
INSERT INTO evaluations (eval_id, status, attempt, version, metadata, finished_at, result_event_id)
SELECT 'f' || n, 'completed', 1, 1, '{}', now(), md5(n::text)::uuid FROM generate_series(%(first)s::int, %(last)s::int) n;
"""
_FILL_CONTENTS = """
INSERT INTO contents (eval_id, event_id, kind, size, sha256, data)
SELECT 'f' || n, md5(n::text)::uuid, 'output', 4097 + n %% 900000, sha256(n::text::bytea), 'not read'
FROM generate_series(%(first)s::int, %(last)s::int) n
"""
_DUE = """
INSERT INTO contents (eval_id, event_id, kind, size, sha256, data, occurred_at)
VALUES (%s, gen_random_uuid(), 'output', %s, sha256(%b), %b, %s)
"""
_EVALUATION = """
INSERT INTO evaluations (eval_id, status, attempt, version, metadata, finished_at) VALUES (%s, 'completed', 1, 1, '{}', %s)
"""
_SERVER = {"fsync": "off", "full_page_writes": "off", "shared_buffers": "256MB", "max_wal_size": "8GB", "autovacuum": "off"}


def make_due(conn: psycopg.Connection, count: int, size: int) -> None:
    """Make half of the contents due by size, and half due by age."""
    for number in range(count):
        name, is_old = f"d{time.time_ns()}", number % 2
        data = os.urandom(5000 if is_old else size)
        finished_at = datetime.now(UTC) - timedelta(days=30 if is_old else 0)
        conn.execute(_EVALUATION, [name, finished_at])
        conn.execute(_DUE, [name, len(data), data, data, finished_at])
    conn.commit()


class Cost(NamedTuple):
    """The cost of moving due content, of a run without due content, and of the search alone.

    Processor time is of this process.
    """

    seconds: float
    processor_s: float
    pages: int
    idle_ms: float
    idle_pages: int


def pages_so_far(engine: Engine) -> int:
    """Return the number of pages that PostgreSQL has read in this database, from its cache or the disk."""
    with engine.connect() as conn, conn.begin():
        raw = database.driver(conn)
        raw.execute("SELECT pg_stat_force_next_flush()")
    with engine.connect() as conn, conn.begin():
        query = "SELECT blks_hit + blks_read FROM pg_stat_database WHERE datname = current_database()"
        ((pages,),) = database.driver(conn).execute(query).fetchall()
    return int(pages)


def measure(engine: Engine, at: Archive, what: str, due: int) -> Cost:
    before = pages_so_far(engine)
    begin = time.perf_counter(), time.process_time()
    with engine.connect() as conn:
        moved = archive.run_once(conn, at, datetime.now(UTC)).moved
    taken = time.perf_counter() - begin[0], time.process_time() - begin[1]
    pages = pages_so_far(engine) - before
    if moved != due:
        raise SystemExit(f"{moved:,} moved instead of {due:,}")
    idle: list[float] = []
    with engine.connect() as conn:
        for _ in range(9):
            start = time.perf_counter()
            archive.run_once(conn, at, datetime.now(UTC))
            idle.append((time.perf_counter() - start) * 1000)
        searched = 0
        for query in archive.due(at):
            with conn.begin():
                raw = database.driver(conn)
                raw.execute(archive.PLAN)
                explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}".encode()
                ((((plan,)),),) = raw.execute(explain, archive.values(at, datetime.now(UTC))).fetchall()
                searched += plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"]
    cost = Cost(*taken, pages, statistics.median(idle), searched)
    print(
        f"{what}: {moved:,} moved in {cost.seconds:.2f} s, {cost.processor_s:.2f} s of the processor, {cost.pages:,} pages; "
        f"a run that finds nothing: {cost.idle_ms:.1f} ms, {cost.idle_pages:,} pages"
    )
    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--due", type=int, default=1000)
    parser.add_argument("--bytes", type=int, default=1_100_000, help="of each content that is due by its size")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="evalstore-bench-", dir="/var/tmp") as name,
        Postgres(Path(name) / "pg", settings=_SERVER) as server,
    ):
        migrations.upgrade(server.url("evalstore"))
        engine = database.engine(server.url("evalstore"), statement_timeout_s=0)
        at = Archive.of(Settings(object_store_url=f"file://{name}/objects", archive_after_days=7))

        def measure_due(what: str) -> Cost:
            with psycopg.connect(server.url("evalstore")) as conn:
                make_due(conn, arguments.due, arguments.bytes)
            return measure(engine, at, what, arguments.due)

        measure_due("to be warm")
        alone = measure_due("nothing else stored")
        start = time.perf_counter()
        with psycopg.connect(server.url("evalstore"), autocommit=True) as conn:
            for first in range(1, arguments.rows + 1, 500_000):
                values = {"first": first, "last": min(first + 499_999, arguments.rows)}
                conn.execute(_FILL, values)
                conn.execute(_FILL_CONTENTS, values)
            conn.execute("VACUUM ANALYZE")
        print(f"{arguments.rows:,} evaluations made in {time.perf_counter() - start:.0f} s")
        beside = measure_due(f"beside {arguments.rows:,} evaluations")
        engine.dispose()
        print(f"{arguments.due:,} due beside {arguments.rows:,} others cost, divided by what they cost alone:")
        for figure, ours, theirs in zip(Cost._fields, beside, alone, strict=True):
            print(f"  {figure:<12} {ours / theirs:.2f}" if theirs else f"  {figure:<12} {ours:,} and {theirs:,}")


if __name__ == "__main__":
    main()
