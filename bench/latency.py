"""Measure the delay from `send` to commit, in a sender's process: `python -m bench.latency --side NAME`. Print milliseconds as
JSON."""

import argparse
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Final

import psycopg

from bench.events import events
from models.settings import settings

_PER_S: Final = 1000
_PROBE_EVERY: Final = 29  # An evaluation has three events, and 29 is no multiple of 3: every kind is probed.
_PATIENCE_S: Final = 10.0
_SEEN: Final = "SELECT event_id::text FROM evaluation_events WHERE eval_id = ANY(%s)"


def idle(send: Callable[[dict[str, Any]], None], conn: psycopg.Connection[Any], probes: int) -> list[float]:
    """Send one event at a time, some time after the previous event was stored."""
    taken = []
    for event in events(probes, seed=101):
        time.sleep(random.uniform(0.1, 0.4))  # noqa: S311
        start = time.perf_counter()
        send(event)
        while event["event_id"] not in {row[0] for row in conn.execute(_SEEN, [[event["eval_id"]]])}:
            if time.perf_counter() > start + _PATIENCE_S:
                break
            time.sleep(0.0002)
        taken.append(time.perf_counter() - start)
    return taken


class Probes(threading.Thread):
    """Polls for some of the events during the load, until all are visible or the time is up."""

    def __init__(self, conn: psycopg.Connection[Any]) -> None:
        super().__init__(daemon=True)
        self.conn = conn
        self.sent: dict[str, tuple[str, float]] = {}
        self.taken: list[float] = []
        self.done = threading.Event()

    def run(self) -> None:
        give_up = float("inf")
        while (self.sent or not self.done.is_set()) and time.perf_counter() < give_up:
            if self.done.is_set():
                give_up = min(give_up, time.perf_counter() + _PATIENCE_S)
            waiting = dict(self.sent)
            seen = (
                {row[0] for row in self.conn.execute(_SEEN, [[eval_id for eval_id, _ in waiting.values()]])} if waiting else ()
            )
            now = time.perf_counter()
            for event_id in seen:
                if event_id in waiting:
                    self.taken.append(now - waiting[event_id][1])
                    del self.sent[event_id]
            time.sleep(0.0005 if waiting else 0.001)


def loaded(send: Callable[[dict[str, Any]], None], probes: Probes, seconds: float) -> float:
    """Send at an even pace, however long storing takes. Return the rate reached, in events/s."""
    count = int(seconds * _PER_S)
    probes.start()
    start = time.perf_counter()
    for number, event in _paced(count, start):
        if number % _PROBE_EVERY == 0:
            probes.sent[event["event_id"]] = (event["eval_id"], time.perf_counter())
        send(event)
    took = time.perf_counter() - start
    probes.done.set()
    probes.join()
    return count / took


def _paced(count: int, start: float) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, event in enumerate(events(count, seed=102)):
        if (ahead := start + number / _PER_S - time.perf_counter()) > 0:
            time.sleep(ahead)
        yield number, event


def summary(taken: list[float], missing: int = 0) -> dict[str, float]:
    """Summarise the delays. An event not seen in time counts with the time waited, so its delay is a lower bound."""
    ms = sorted([*(seconds * 1000 for seconds in taken), *[_PATIENCE_S * 1000] * missing])
    return {
        "p50_ms": statistics.median(ms),
        "p99_ms": ms[min(len(ms) - 1, int(len(ms) * 0.99))],
        "worst_ms": ms[-1],
        "probes": len(ms),
        "missing": missing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", required=True)
    parser.add_argument("--probes", type=int, default=150)
    parser.add_argument("--seconds", type=float, default=15)
    arguments = parser.parse_args()
    send = import_module(f"bench.sides.{arguments.side}").send
    with psycopg.connect(settings().database_url.get_secret_value(), autocommit=True) as conn:
        results: dict[str, Any] = {"idle": summary(idle(send, conn, arguments.probes))}
        probes = Probes(conn)
        sent_per_s = loaded(send, probes, arguments.seconds)
        results["loaded"] = summary(probes.taken, len(probes.sent)) | {"sent_per_s": sent_per_s}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
