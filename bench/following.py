"""Measure clients that wait and stream at one process of the HTTP service: `python -m bench.following [--clients 2000]`.

So many clients wait for an evaluation each, and as many stream the changes of one each. Another process finishes 500
evaluations a second. It prints the memory of the service, and the time from a commit to the answer.
"""

import argparse
import asyncio
import multiprocessing
import os
import statistics
import time
from functools import cache
from typing import Any, Final

import psutil
from sqlalchemy import Engine

from bench.http import running, wait_for
from bench.place import Place
from evalstore.local.servers import free_port
from evalstore.storage import database, event_store
from models.events import parse
from models.settings import settings
from tests.factories import unique_event

_KEYS: Final = 25  # a key may have 100 streams
_A_SECOND: Final = 500
_COMMIT: Final = 10  # evaluations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=2000)
    clients = parser.parse_args().clients
    with Place(None) as place:
        port = free_port()
        keys = [f"bench-{number}" for number in range(_KEYS)]
        variables = {**place.environment(), "EVALSTORE_API_PORT": str(port), "EVALSTORE_READ_API_KEYS": ",".join(keys)}
        os.environ.update(variables)
        with running(["-m", "evalstore.api"], **variables) as process:
            wait_for(f"http://127.0.0.1:{port}/health/live")
            asyncio.run(_measure(process.pid, port, keys, clients))


async def _measure(pid: int, port: int, keys: list[str], clients: int) -> None:
    service, context = psutil.Process(pid), multiprocessing.get_context("spawn")
    committed: Any = context.Queue()
    _store([f"e-{number}" for number in range(clients)], "queued")
    print(f"memory at the start: {service.memory_info().rss / 2**20:.0f} MiB")
    answered: dict[str, dict[str, float]] = {"wait": {}, "stream": {}}
    connected = asyncio.Semaphore(0)
    tasks = [
        asyncio.create_task(_client(port, kind, f"e-{number}", keys[number % len(keys)], answered[kind], connected))
        for number in range(clients)
        for kind in answered
    ]
    for _ in tasks:
        await connected.acquire()
    await asyncio.sleep(2)
    print(f"memory with {clients:,} waiting and {clients:,} streaming: {service.memory_info().rss / 2**20:.0f} MiB")
    before = service.cpu_times()
    storing = context.Process(target=_finish, args=(clients, committed))
    storing.start()
    at = {}
    while len(at) < clients:
        at.update(await asyncio.get_running_loop().run_in_executor(None, committed.get))
    await asyncio.wait(tasks, timeout=30)
    storing.join()
    spent = service.cpu_times()
    print(f"memory after: {service.memory_info().rss / 2**20:.0f} MiB")
    spent_s = spent.user + spent.system - before.user - before.system
    print(f"processor time of the service: {spent_s / clients * 1e3:.2f} ms for an evaluation")
    for kind, times in answered.items():
        late = sorted((times[eval_id] - at[eval_id]) * 1e3 for eval_id in times)
        cuts = statistics.quantiles(late, n=100)
        print(f"{kind}: {len(late):,} of {clients:,} answered; commit to answer p50 {cuts[49]:.0f} ms, p99 {cuts[98]:.0f} ms")


async def _client(
    port: int, kind: str, eval_id: str, key: str, answered: dict[str, float], connected: asyncio.Semaphore
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    path = f"/storage/evaluations/{eval_id}?wait=60" if kind == "wait" else f"/storage/stream?eval_id={eval_id}"
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\n\r\n".encode())
    if kind == "wait":
        connected.release()
    else:
        await reader.readuntil(b"\n\n")
        connected.release()
    await reader.readuntil(b'"completed"')
    answered[eval_id] = time.time()
    writer.close()


def _finish(clients: int, committed: Any) -> None:
    begin = time.monotonic()
    for start in range(0, clients, _COMMIT):
        time.sleep(max(0.0, begin + start / _A_SECOND - time.monotonic()))
        eval_ids = [f"e-{number}" for number in range(start, min(clients, start + _COMMIT))]
        committed.put(dict.fromkeys(eval_ids, _store(eval_ids, "completed")))


@cache
def _engine() -> Engine:
    return database.connect(settings())


def _store(eval_ids: list[str], type_: str) -> float:
    """Store an event of each evaluation. Return the time of the commit."""
    required = {"code": "c"} if type_ == "queued" else {"exit_code": 0}
    with _engine().connect() as conn:
        event_store.store(conn, [parse(unique_event(type_, eval_id, **required)) for eval_id in eval_ids])
    return time.time()


if __name__ == "__main__":
    main()
