"""Measure what sending an event costs the sender: `python -m bench.sending`. Print microseconds as JSON.

Plain Dramatiq sends one unchecked message in each round trip. evalstore checks each event first, and can send many together.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import redis

from bench.events import events
from bench.sides import stock
from models.settings import settings
from tasks import store_evaluation, store_evaluations

_TOGETHER: Final = 1000


def _stock(batch: list[dict[str, Any]]) -> None:
    for event in batch:
        stock.store_evaluation.send(event)


def _evalstore(batch: list[dict[str, Any]]) -> None:
    for event in batch:
        store_evaluation.send(event)


def _bulk(batch: list[dict[str, Any]]) -> None:
    for first in range(0, len(batch), _TOGETHER):
        store_evaluations(batch[first : first + _TOGETHER])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ways: dict[str, Callable[[list[dict[str, Any]]], None]] = {"stock": _stock, "evalstore": _evalstore, "bulk": _bulk}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with redis.Redis.from_url(settings().redis_url.get_secret_value()) as client:
        for number in range(options.rounds + 1):
            for name, send in ways.items():
                batch = list(events(options.count if number else 100, seed=number))
                client.flushall()
                cpu, wall = time.process_time(), time.perf_counter()
                send(batch)
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                if number:  # The first round opens connections and fills caches.
                    taken[name].append((cpu / len(batch) * 1e6, wall / len(batch) * 1e6))
    results = {
        name: {"cpu_us": statistics.median(cpu for cpu, _ in each), "wall_us": statistics.median(wall for _, wall in each)}
        for name, each in taken.items()
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
