"""Measure the processor time of observability: `python -m bench.seeing`.

It measures the start of a worker and its endpoint, and each scrape. Then one thread stores batches and relays their
confirmations: without traces, with one event in ten traced, and with every event traced. The cases alternate, so small
differences show on a busy machine.
"""

import gc
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final
from uuid import uuid4

import psutil

from bench.collector import collecting
from bench.events import events
from bench.place import ROOT, Place
from evalstore.local.servers import free_port

_EVENTS: Final = 1998
_ROUNDS: Final = 30
_SCRAPES: Final = 8
_SHARES: Final = {"off": 0.0, "one in ten": 0.1, "on": 1.0}


def main() -> None:
    with Place(None) as place:
        _start(place)
        with collecting() as environment:
            _store(place, environment)


def _start(place: Place) -> None:
    with _worker(place) as (master, port):
        while True:
            with suppress(OSError):
                _scrape(port)
                break
            time.sleep(0.05)
        time.sleep(2)
        tree = [master, *master.children(recursive=True)]
        endpoint = next(
            process for process in tree if any(at.laddr and at.laddr.port == port for at in process.net_connections("tcp"))
        )
        print(f"start of two processes and their endpoint: {sum(map(_cpu_ms, tree)):,.0f} ms")
        print(f"of that the endpoint with its first scrape: {_cpu_ms(endpoint):,.0f} ms; it holds ", end="")
        print(f"{endpoint.memory_full_info().uss / 2**20:.0f} MiB of its own")
        spent = []
        for _ in range(_SCRAPES):
            time.sleep(2.1)  # Answers of the servers are cached for two seconds.
            before = _cpu_ms(endpoint)
            _scrape(port)
            spent.append(_cpu_ms(endpoint) - before)
        print(f"a scrape: {statistics.median(spent):.1f} ms")


@contextmanager
def _worker(place: Place) -> Iterator[tuple[psutil.Process, int]]:
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        variables = {"EVALSTORE_METRICS_PORT": str(port), "EVALSTORE_RUNTIME_DIR": folder}
        command = [sys.executable, "-m", "dramatiq", "worker.tasks", "--processes", "2", "--threads", "2"]
        environment = place.environment() | variables
        with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
            yield psutil.Process(process.pid), port
            process.terminate()


def _scrape(port: int) -> None:
    urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read()


def _cpu_ms(process: psutil.Process) -> float:
    """Return the processor time in nanoseconds of all threads, also of ended threads, from Linux's clock for the process."""
    return time.clock_gettime((~process.pid << 3) | 2) * 1e3


def _store(place: Place, environment: dict[str, str]) -> None:
    os.environ.update(place.environment() | environment)
    from worker import confirmation_relay, tracing  # noqa: PLC0415 - they read the environment
    from worker.batches import Batch, Delivery  # noqa: PLC0415
    from worker.tasks import broker, connections, store  # noqa: PLC0415

    traces = tracing.traces()
    gc.freeze()
    gc.set_threshold(100_000, 10, 10)  # As in a worker.
    spent: dict[str, list[tuple[float, float, float]]] = {name: [] for name in _SHARES}
    place.reset()
    for number in range(_ROUNDS):
        for name in list(_SHARES) if number % 2 else reversed(_SHARES):
            batch = Batch([Delivery(*message) for message in _messages(random.getrandbits(64), _SHARES[name])])
            tracing.traces = (lambda: None) if name == "off" else (lambda: traces)  # type: ignore[assignment]
            start = time.thread_time()
            store(batch)
            stored = time.thread_time()
            with connections.engine.connect() as conn:
                confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters)
            relayed, sending = time.thread_time(), time.process_time()
            if traces and name != "off":
                traces.flush()
            spent[name].append((stored - start, relayed - stored, time.process_time() - sending))
    print(f"\nµs an event, median of {_ROUNDS} batches of {_EVENTS:,}: stored, confirmations relayed, spans sent")
    for name, each in spent.items():
        print(f"traces {name}: ", *(f"{statistics.median(part) / _EVENTS * 1e6:6.2f}" for part in zip(*each, strict=True)))


def _messages(seed: int, sampled: float) -> Iterator[tuple[bytes, bytes]]:
    from bench.sides.evalstore import message  # noqa: PLC0415 - as above

    chance = random.Random(seed)  # noqa: S311
    for event in events(_EVENTS, seed=seed):
        redis_id, options = str(uuid4()), dict[str, Any]()
        if sampled:
            options["traceparent"] = f"00-{uuid4().hex}-{uuid4().hex[:16]}-0{int(chance.random() < sampled)}"
        yield redis_id.encode(), message(event, {"redis_message_id": redis_id, **options})


if __name__ == "__main__":
    main()
