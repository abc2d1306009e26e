"""Measure `evalstore replay` over 100,000 evaluations, 100 of them corrupted, while events are stored.

    python -m bench.replay [EVALUATIONS]

It also compares the rate of replay with that of storing, each in one process, in turns. It starts a PostgreSQL of its own.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil
import psycopg
from psycopg.rows import dict_row
from sqlalchemy import Engine

from evalstore.local.servers import Postgres
from evalstore.storage import database, event_store, migrations, replay
from models.record import to_row
from tests.integration.test_replay import COLUMNS, corrupt, events_of

_BATCH: Final = 600  # evaluations
_CORRUPTED: Final = 100
_LOAD_PER_S: Final = 5000
_TURNS: Final = 3


def main() -> None:
    """Print what was found, and the rates."""
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder, Postgres(Path(folder, "postgres")) as postgres:
        url = postgres.url()
        migrations.upgrade(url)
        engine = database.engine(url)
        print(f"stored: {_store(engine, postgres, 'e', 0, number)}")
        with psycopg.connect(url, autocommit=True, row_factory=dict_row) as plain:
            plain.execute("VACUUM (ANALYZE)")
            columns = [*COLUMNS, "merge_state", "merge_version"]
            for at in range(_CORRUPTED):
                corrupt(plain, f"e{at * (number // _CORRUPTED):09}", columns[at % len(columns)])
        corrupted = {f"e{at * (number // _CORRUPTED):09}" for at in range(_CORRUPTED)}
        with _load(url) as stored:
            for word, is_corrupted in (("--check", True), ("--write", True), ("--check", False)):
                before, began = stored.value, time.perf_counter()
                found = _replay(url, word)
                took = time.perf_counter() - began
                expected = corrupted if is_corrupted else set()
                is_exact = {one["eval_id"] for one in found["differences"]} == expected
                print(
                    f"{word}: {found['evaluations']:,} evaluations, {found['different']} different, "
                    f"exactly the corrupted ones: {is_exact}, in {took:.1f} s, "
                    f"while {(stored.value - before) / took:,.0f} events/s were stored"
                )
        _compare(engine, postgres, number)
        engine.dispose()


def _store(engine: Engine, postgres: Postgres, prefix: str, first: int, number: int) -> "_Rate":
    """Store evaluations with three events each, in one process."""
    batches = [range(start, min(start + _BATCH, first + number)) for start in range(first, first + number, _BATCH)]
    took = cpu = 0.0
    with engine.connect() as conn:
        for batch in batches:
            rows = [to_row(one) for at in batch for one in events_of(f"{prefix}{at:09}", at)]
            began, spent = time.perf_counter(), _cpu_s(postgres)
            event_store.store(conn, rows)
            took, cpu = took + time.perf_counter() - began, cpu + _cpu_s(postgres) - spent
    return _Rate(number * 3 / took, cpu / number / 3 * 1e6)


class _Rate(NamedTuple):
    events_per_s: float
    cpu_us: float


def _cpu_s(postgres: Postgres) -> float:
    """Return the processor time of this process and of PostgreSQL."""
    servers = [psutil.Process(postgres.pid), *psutil.Process(postgres.pid).children()]
    times = [server.cpu_times() for server in servers]
    return time.process_time() + float(sum(one.user + one.system for one in times))


def _compare(engine: Engine, postgres: Postgres, number: int) -> None:
    """Print the rates of one process for storing and for replay, in turns."""
    part = number // 10
    for turn in range(_TURNS):
        stored = _store(engine, postgres, "t", turn * part, part)
        began, spent, done, after = time.perf_counter(), _cpu_s(postgres), 0, ""
        with engine.connect() as conn:
            while done < part and (compared := replay.compare(conn, replay.Selection(), after)):
                done, after = done + compared.evaluations, compared.last
        replayed = _Rate(done * 3 / (time.perf_counter() - began), (_cpu_s(postgres) - spent) / done / 3 * 1e6)
        print(
            f"turn {turn + 1}: replay {replayed.events_per_s:,.0f} events/s ({replayed.cpu_us:.1f} µs of processor time each), "
            f"storing {stored.events_per_s:,.0f} ({stored.cpu_us:.1f} µs): {replayed.events_per_s / stored.events_per_s:.2f}"
        )


def _replay(url: str, *words: str) -> dict[str, Any]:
    env = {**os.environ, "EVALSTORE_DATABASE_URL": url}
    command = [sys.executable, "-m", "evalstore.cli.app", "replay", "--all", *words, "-o", "json"]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@contextmanager
def _load(url: str) -> Iterator[Any]:
    """Store events in another process until the end of the block. Yields their number."""
    stored, stop = multiprocessing.Value("q", 0), multiprocessing.Event()
    process = multiprocessing.Process(target=_go_on, args=(url, stored, stop))
    process.start()
    try:
        yield stored
    finally:
        stop.set()
        process.join()


def _go_on(url: str, stored: Any, stop: Any) -> None:
    engine = database.engine(url)
    began, batch = time.monotonic(), _LOAD_PER_S // 10 // 3
    with engine.connect() as conn:
        while not stop.is_set():
            at = stored.value // 3
            event_store.store(conn, [one for number in range(at, at + batch) for one in events_of(f"load{number:09}", number)])
            stored.value += batch * 3
            time.sleep(max(0.0, began + stored.value / _LOAD_PER_S - time.monotonic()))
    engine.dispose()


if __name__ == "__main__":
    main()
