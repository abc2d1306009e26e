"""Measure the console's pages beside many evaluations: `python -m bench.console [EVALUATIONS]`.

It starts servers and a service of its own, and prints for each page the median and the 95th percentile of the time until its
last byte, and its compressed size. A page has 150 ms and 100 kB. It also counts what open overviews cost PostgreSQL. It needs
the packages of the tests.
"""

import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import psycopg

from bench.finding import fill
from evalstore.local.servers import Postgres, Valkey
from evalstore.storage import database, dead_letters, migrations
from tests import console
from tests.integration.conftest import ADMIN, Api

_EVALUATIONS: Final = 10_000_000
_LETTERS: Final = 10_000
_TIMES: Final = 60
_WARM: Final = 3
_OPEN_S: Final = 20.0
_FILTERS: Final = ("/evaluations?status=failed", "/evaluations?run_id=run-7", "/runs/run-7", "/compare?a=run-7&b=run-8")


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else _EVALUATIONS
    with (
        tempfile.TemporaryDirectory() as folder,
        Postgres(Path(folder, "pg")) as postgres,
        Valkey(Path(folder, "valkey")) as valkey,
    ):
        address = postgres.url("evalstore")
        migrations.upgrade(address)
        engine = database.engine(address)
        with engine.connect() as conn:
            fill(conn, count)
            console.store(conn)
            ids = console.fill(conn, valkey.url(0))
            dead_letters.write(conn, console.letters(_LETTERS))
        engine.dispose()
        environment = {"EVALSTORE_DATABASE_URL": address, "EVALSTORE_REDIS_URL": valkey.url(0)}
        api = Api(Path(folder, "api"), environment)
        api.start()
        try:
            client = signed_in(api)
            print(f"{'page':42} {'median':>9} {'p95':>9} {'compressed':>11}")
            for path in [*console.paths(ids), *_FILTERS]:
                measure(client, path)
            for pages in (1, 100):
                measure_overviews(api, address, pages)
        finally:
            api.stop()


def signed_in(api: Api) -> httpx.Client:
    client = api.client(None)
    answer = client.post("/console/login", data={"key": ADMIN})
    if answer.status_code != 303:
        raise RuntimeError(answer.text)
    return client


def measure(client: httpx.Client, path: str) -> None:
    """Print the times and the size of a page."""
    times, size = [], 0
    for number in range(_TIMES + _WARM):
        began = time.perf_counter()
        with client.stream("GET", f"/console{path}", headers={"Accept-Encoding": "gzip"}) as answer:
            size = sum(map(len, answer.iter_raw()))
        answer.raise_for_status()
        if number >= _WARM:
            times.append(1000 * (time.perf_counter() - began))
    times.sort()
    print(f"{path or '/':42.42} {times[len(times) // 2]:6.1f} ms {times[int(len(times) * 0.95)]:6.1f} ms {size / 1000:8.1f} kB")


def measure_overviews(api: Api, address: str, count: int) -> None:
    """Print the transactions of PostgreSQL while so many overviews are open."""
    with psycopg.connect(address, autocommit=True) as conn, overviews(api, count):
        time.sleep(3)
        before = _transactions(conn)
        time.sleep(_OPEN_S)
        print(f"{count} open overviews: {(_transactions(conn) - before) / _OPEN_S:.1f} transactions a second")


@contextmanager
def overviews(api: Api, count: int) -> Iterator[None]:
    """Keep the streams of so many overviews open."""
    done, client = threading.Event(), signed_in(api)
    cookies = dict(client.cookies)

    def follow() -> None:
        with httpx.Client(base_url=api.url, cookies=cookies, timeout=30) as own, own.stream("GET", "/console/live") as answer:
            for _ in answer.iter_raw():
                if done.is_set():
                    return

    threads = [threading.Thread(target=follow, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join(timeout=10)


def _transactions(conn: psycopg.Connection[Any]) -> int:
    conn.execute("SELECT pg_stat_clear_snapshot()")
    ((number,),) = conn.execute("SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()").fetchall()
    return int(number)


if __name__ == "__main__":
    main()
