"""Measure lists, runs and statistics beside many evaluations, and what they cost the storing of events.

    python -m bench.finding [EVALUATIONS [EVENTS]]

It starts a PostgreSQL of its own. Times are medians of one run. The cost is processor time of this process and of PostgreSQL in
turns: storing EVENTS into a database without the indexes, and into one with them, followed by a round of the statistics.
"""

import statistics as medians
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Final

import psutil
from sqlalchemy import Connection, text

from bench.events import events
from evalstore.local.servers import Postgres
from evalstore.sinks.statistics import catch_up
from evalstore.storage import database, event_store, list_indexes, listing, migrations, runs, statistics
from evalstore.storage.listing import Filter
from models.events import parse

_RUN: Final = 10_000
_PAGES: Final = 1_000
_LIMIT: Final = 100
_TIMES: Final = 30
_BATCH: Final = 2_000
_TURNS: Final = 5

# Records as 300 a commit, over 30 days, in runs of 10,000; every hundredth failed.
_FILL: Final = """
INSERT INTO evaluations (eval_id, status, attempt, version, run_id, language, submitter, executor_id, exit_code, duration_ms,
    memory_bytes, score, metadata, queued_at, started_at, finished_at, created_at, updated_at)
SELECT md5(n::text), CASE WHEN n % 100 = 0 THEN 'failed' ELSE 'completed' END, 1, 3, 'run-' || n / :run, 'python',
    'submitter-' || n % 50, 'executor-' || n % 100, n % 2, 1 + random() * 10000, (1000000 * (1 + random() * 100))::bigint,
    random(), jsonb_build_object('team', 'team-' || n % 40, 'image', 'python:3.13-slim', 'command', repeat(md5(n::text), 10)),
    at, at, at, at, at
FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) n,
    LATERAL (SELECT now() - interval '30 days' + (n / 300) * (interval '30 days' / (:count / 300 + 1)) AS at) t
"""
_CHUNK: Final = 100_000


def main() -> None:
    """Print medians, plans and costs."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    stored = int(sys.argv[2]) if len(sys.argv) > 2 else 60_000
    with tempfile.TemporaryDirectory() as folder, Postgres(Path(folder, "postgres")) as postgres:
        migrations.upgrade(postgres.url(), indexed_metadata=["team"])
        engine = database.engine(postgres.url(), statement_timeout_s=0)
        with engine.connect() as conn:
            _fill(conn, count)
            _measure_lists(conn)
            _measure_sums(conn)
        engine.dispose()
        _measure_cost(postgres, stored)


def _fill(conn: Connection, count: int) -> None:
    began = time.monotonic()
    for first in range(0, count, _CHUNK):
        with conn.begin():
            values = {"first": first, "last": min(count, first + _CHUNK) - 1, "count": count, "run": _RUN}
            conn.execute(text(_FILL), values)
    filled = time.monotonic()
    conn.commit()
    with database.errors():
        raw = database.driver(conn)
        raw.autocommit = True
        raw.execute("VACUUM ANALYZE evaluations")
        raw.autocommit = False
    swept = time.monotonic()
    catch_up(conn)
    print(f"{count:,} evaluations in {filled - began:.0f} s; counted in {time.monotonic() - swept:.0f} s")


def _median_ms(work: Callable[[], object], times: int = _TIMES) -> float:
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(1000 * (time.perf_counter() - began))
    return medians.median(found)


def _measure_lists(conn: Connection) -> None:
    lists = {
        "run": Filter(run_id="run-3"),
        "submitter": Filter(submitter="submitter-7"),
        "executor": Filter(executor_id="executor-7"),
        "failed": Filter(statuses=("failed", "timed_out", "lost")),
        "metadata": Filter(metadata={"team": "team-7"}),
        "time": Filter(),
        "eval_id": Filter(eval_id_prefix="a"),
        "run and status": Filter(run_id="run-3", statuses=("failed",)),
        "run by score": Filter(run_id="run-3", sort="score"),
    }
    for name, chosen in lists.items():
        after = None
        page = listing.page(conn, chosen, limit=_LIMIT)
        number = 1
        while number < _PAGES and page.following is not None:
            number, after = number + 1, page.following
            page = listing.page(conn, chosen, limit=_LIMIT, after=after)
        first = _median_ms(lambda chosen=chosen: listing.page(conn, chosen, limit=_LIMIT))  # type: ignore[misc]
        late = _median_ms(lambda chosen=chosen, after=after: listing.page(conn, chosen, limit=_LIMIT, after=after))  # type: ignore[misc]
        scans = "; ".join(_plan_of(conn, chosen, after))
        print(f"list by {name}: first page {first:.1f} ms, page {number} {late:.1f} ms; {scans}")


def _plan_of(conn: Connection, chosen: Filter, after: Any) -> Iterator[str]:
    """Yield the scans of the page's last statement, with the blocks that it read."""
    plan = listing.explain(conn, chosen, limit=_LIMIT, after=after)
    yield f"{plan['Shared Hit Blocks'] + plan['Shared Read Blocks']} blocks"
    waiting = [plan]
    while waiting:
        node = waiting.pop()
        waiting += node.get("Plans", [])
        if "Scan" in node["Node Type"]:
            yield f"{node['Node Type']} {node.get('Index Name', '')} {node['Actual Rows']} rows"


def _measure_sums(conn: Connection) -> None:
    print(f"a run of {_RUN:,}: {_median_ms(lambda: runs.get(conn, 'run-3')):.1f} ms")
    print(f"a page of runs: {_median_ms(lambda: runs.page(conn, runs.RunFilter(), limit=_LIMIT)):.1f} ms")
    now = datetime.now(UTC)
    asked = statistics.Query(now - timedelta(days=30), now, "hour")
    print(
        f"30 days by hour: {len(statistics.read(conn, asked))} rows, {_median_ms(lambda: statistics.read(conn, asked)):.1f} ms"
    )
    by_submitter = statistics.Query(now - timedelta(days=30), now, "day", "submitter")
    print(f"30 days by day and submitter: {_median_ms(lambda: statistics.read(conn, by_submitter), 5):.1f} ms")


def _measure_cost(postgres: Postgres, count: int) -> None:
    urls = []
    admin = database.engine(postgres.url("postgres"), statement_timeout_s=0)
    for name in ("without", "with"):
        with admin.connect() as conn:
            database.driver(conn).autocommit = True
            database.driver(conn).execute(f"CREATE DATABASE {name}_indexes".encode())
        urls.append(postgres.url(f"{name}_indexes"))
        migrations.upgrade(urls[-1])
    engines = [database.engine(url, statement_timeout_s=0) for url in urls]
    with engines[0].connect() as plain, engines[1].connect() as full:
        with plain.begin():  # as before these indexes
            for name in list_indexes.FIXED:
                plain.execute(text(f"DROP INDEX {name}"))
            plain.execute(
                text("CREATE INDEX evaluations_open ON evaluations (updated_at) WHERE status IN ('queued', 'running')")
            )
        spent: dict[str, list[float]] = {"without": [], "with": [], "statistics": []}
        for turn in range(_TURNS + 1):
            made = [{**event, **({"run_id": f"run-{turn}"} if "code" in event else {})} for event in events(count, seed=turn)]
            parsed = [parse(event) for event in made]
            measured = {
                "without": _processor_s(postgres, lambda parsed=parsed: _store(plain, parsed)),  # type: ignore[misc]
                "with": _processor_s(postgres, lambda parsed=parsed: _store(full, parsed)),  # type: ignore[misc]
                "statistics": _processor_s(postgres, lambda: catch_up(full)),
            }
            for name, seconds in measured.items() if turn else ():
                spent[name].append(seconds / count * 1e6)
    for engine in (admin, *engines):
        engine.dispose()
    costs = {name: medians.median(found) for name, found in spent.items()}
    extra = costs["with"] + costs["statistics"] - costs["without"]
    print({name: f"{cost:.1f} µs an event" for name, cost in costs.items()})
    print(f"indexes and statistics cost {extra:.1f} µs an event, {extra / costs['without']:.1%} of storing without Redis")


def _store(conn: Connection, parsed: list[Any]) -> None:
    remaining = iter(parsed)
    while batch := list(islice(remaining, _BATCH)):
        event_store.store(conn, batch)


def _processor_s(postgres: Postgres, work: Callable[[], object]) -> float:
    """Return the processor time of `work` in this process and in PostgreSQL."""
    postmaster = psutil.Process(int(Path(postgres.data, "postmaster.pid").read_text().split()[0]))

    def used() -> float:
        found = time.process_time()
        for process in [postmaster, *postmaster.children(recursive=True)]:
            times = process.cpu_times()
            found += times.user + times.system + (times.children_user + times.children_system if process == postmaster else 0)
        return found

    before = used()
    work()
    return used() - before


if __name__ == "__main__":
    main()
