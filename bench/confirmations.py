"""Measure the cost and the delay of confirmations: `python -m bench.confirmations [--rounds 5] [--seconds 15]`.

Cost: normal workers alternate with workers without confirmations, at full queues. Delay: from the commit, as PostgreSQL records
it, until a blocking reader of the stream has the confirmation. The delay is measured when idle, and at 1,000 events/s.
"""

import argparse
import json
import random
import statistics
import sys
import threading
import time
from dataclasses import replace
from typing import Any, Final

import msgspec
import psycopg
import redis

from bench import measure
from bench.events import events
from bench.latency import summary
from bench.place import Place
from bench.sides import SIDES, Shape
from models.settings import settings
from tasks import store_evaluation

_SIDE: Final = SIDES["evalstore"]
_SILENT: Final = replace(
    _SIDE,
    title="without confirmations",
    command=lambda shape: [part.replace("worker.tasks", "bench.sides.silent") for part in _SIDE.command(shape)],
)
_COMMITTED: Final = """
SELECT event_id::text, extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8 FROM evaluation_events WHERE eval_id = ANY(%s)
"""
_PER_S: Final = 1000


class Reader(threading.Thread):
    """Notes the time at which each event's confirmation arrives."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.came: dict[str, float] = {}
        self._client = redis.Redis.from_url(url)

    def run(self) -> None:
        last: bytes | str = "$"
        while True:
            reply: Any = self._client.xread({"evalstore:confirmations": last}, count=1000, block=1000)
            now, entries = time.time(), reply[0][1] if reply else []
            last = entries[-1][0] if entries else last
            for _, fields in entries:
                for event_id in msgspec.json.decode(fields[b"confirmation"])["event_ids"]:
                    self.came.setdefault(event_id, now)


def cost(place: Place, shape: Shape, rounds: int, count: int) -> dict[str, Any]:
    """Return events/s and processor time for each event, with and without confirmations, in alternating rounds."""
    results: dict[str, list[measure.Rate]] = {"with": [], "without": []}
    for number in range(rounds):
        for name, side in (("with", _SIDE), ("without", _SILENT)):
            done = measure.rate(place, side, shape, count, seed=number)
            results[name].append(done)
            spent = {part: round(us, 1) for part, us in done.cpu_us.items()}
            print(f"{name}: {done.events_per_s:,.0f} events/s, µs of CPU an event: {spent}", flush=True)
    rates = {name: statistics.median(rate.events_per_s for rate in each) for name, each in results.items()}
    cpu = {name: statistics.median(sum(rate.cpu_us.values()) for rate in each) for name, each in results.items()}
    return {
        "events_per_s": rates,
        "cpu_us": cpu,
        "cost_by_rate": 1 - rates["with"] / rates["without"],
        "cost_by_cpu": 1 - cpu["without"] / cpu["with"],
    }


def delivered(place: Place, shape: Shape, *, probes: int, seconds: float) -> dict[str, Any]:
    """Return the milliseconds from commit to read."""
    place.reset()
    with measure.warm(place, _SIDE, shape, 0):
        result: dict[str, Any] = json.loads(
            place.run(_SIDE, "bench.confirmations", "--send", "--probes", str(probes), "--seconds", str(seconds))
        )
    return result


def send(probes: int, seconds: float) -> None:
    """Send events in a separate process with the run's environment, and print when each confirmation came."""
    reader = Reader(settings().redis_url.get_secret_value())
    reader.start()
    idle = list(events(probes, seed=201))
    for event in idle:
        time.sleep(random.uniform(0.1, 0.3))  # noqa: S311
        store_evaluation.send(event)
    loaded = list(events(int(seconds * _PER_S), seed=202))
    start = time.perf_counter()
    for number, event in enumerate(loaded):
        if (ahead := start + number / _PER_S - time.perf_counter()) > 0:
            time.sleep(ahead)
        store_evaluation.send(event)
    give_up = time.monotonic() + 10
    while len(reader.came) < len(idle) + len(loaded) and time.monotonic() < give_up:
        time.sleep(0.1)
    print(json.dumps({"idle": _summary(idle, reader.came), "loaded": _summary(loaded, reader.came)}))


def _summary(sent: list[dict[str, Any]], came: dict[str, float]) -> dict[str, float]:
    with psycopg.connect(settings().database_url.get_secret_value()) as conn:
        committed = dict(conn.execute(_COMMITTED, [sorted({event["eval_id"] for event in sent})]).fetchall())
    taken = [came[event_id] - at for event_id, at in committed.items() if event_id in came]
    return summary(taken, len(sent) - len(taken))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.confirmations", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--events", type=int, default=150_000, help="in each round's queue")
    parser.add_argument("--probes", type=int, default=150)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--send", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.send:
        send(arguments.probes, arguments.seconds)
        return 0
    with Place(None) as place:
        print(json.dumps(place.describe()))
        results = {"delivered": delivered(place, _SIDE.shapes[0], probes=arguments.probes, seconds=arguments.seconds)}
        print(json.dumps(results["delivered"], indent=2), flush=True)
        results["cost"] = cost(place, _SIDE.shapes[0], arguments.rounds, arguments.events)
    print(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
