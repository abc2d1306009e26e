"""Measure what an event costs if its evaluation has a long history: `python -m bench.history` prints JSON.

One measurement compares one event for an evaluation with 3 events and for one with 100,000. The other runs agents that send a
heartbeat a second, a day into their runs, and watches the delay of everybody else's events.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
import psycopg
import redis
from uuid_utils import uuid7

from bench.measure import warm
from bench.place import Place
from bench.sides import SIDES, Shape
from evalstore.storage import database, event_store, rebuild
from models.events import parse
from tasks.actor import store_evaluation
from tasks.broker import SendingBroker

_BEGIN: Final = datetime(2026, 1, 31, tzinfo=UTC)
_PADDING: Final = "x" * 1700  # With the other fields the JSON of an event has 2 KB.
_STREAM: Final = "evalstore:confirmations"
_BATCH: Final = 2000
_OTHERS_PER_S: Final = 50
_PATIENCE_S: Final = 60.0


class Confirmed(threading.Thread):
    """Reads confirmations, and remembers when each event was confirmed. It takes nothing from PostgreSQL."""

    def __init__(self, client: redis.Redis) -> None:
        super().__init__(daemon=True)
        self._client, self._changed = client, threading.Condition()
        self.at: dict[str, float] = {}
        self._stopping = False

    def run(self) -> None:
        last: Any = self._client.xrevrange(_STREAM, count=1)
        position = last[0][0] if last else b"0"
        while not self._stopping:
            found: Any = self._client.xread({_STREAM: position}, block=200)
            now = time.perf_counter()
            for position, entry in [one for _, entries in found for one in entries]:  # noqa: B007 - the last one is kept
                ids = msgspec.json.decode(entry[b"confirmation"])["event_ids"]
                with self._changed:
                    self.at |= dict.fromkeys(ids, now)
                    self._changed.notify_all()

    def wait(self, event_id: str) -> float:
        """Return when an event was confirmed. Raises RuntimeError after a minute."""
        with self._changed:
            if not self._changed.wait_for(lambda: event_id in self.at, _PATIENCE_S):
                raise RuntimeError(f"no confirmation of an event within {_PATIENCE_S:g} s")
            return self.at.pop(event_id)

    def stop(self) -> None:
        """Stop reading."""
        self._stopping = True
        self.join()


def _step(eval_id: str, number: int, **fields: Any) -> dict[str, Any]:
    at = _BEGIN + timedelta(seconds=number)
    event_id = str(uuid7())  # Senders fill in a UUIDv7 too.
    return {"type": "evaluation:started", "eval_id": eval_id, "event_id": event_id, "occurred_at": at.isoformat(), **fields}


def _wide(eval_id: str, number: int) -> dict[str, Any]:
    return _step(eval_id, number, metadata={"step": number, "note": _PADDING})


def long_and_short(place: Place, shape: Shape, *, events: int = 100_000, turns: int = 10, each: int = 100) -> dict[str, Any]:
    """Return milliseconds and processor time of one event, for a long evaluation and for ones with three events, in turns."""
    place.reset()
    short = [f"short-{number}" for number in range(turns * each)]
    given = [_wide(eval_id, number) for eval_id in short for number in range(3)]
    given += [_wide("long", number) for number in range(events)]
    engine = database.engine(place.postgres.url())
    with engine.connect() as conn:
        for start in range(0, len(given), _BATCH):
            event_store.store(conn, [parse(one) for one in given[start : start + _BATCH]])
    engine.dispose()
    _refresh(place)
    taken: dict[str, list[float]] = {"short": [], "long": []}
    cpu: dict[str, list[float]] = {"short": [0.0, 0.0], "long": [0.0, 0.0]}
    broker = SendingBroker(url=place.valkey.url(), middleware=[])
    with warm(place, SIDES["evalstore"], shape, 77) as workers:
        confirmed = Confirmed(place.redis)
        confirmed.start()
        for turn in range(turns):
            for name in ("short", "long") if turn % 2 else ("long", "short"):
                before = place.cpu(workers)
                for at in range(turn * each, (turn + 1) * each):
                    event = _wide("long" if name == "long" else short[at], events + at)
                    began = time.perf_counter()
                    broker.enqueue(store_evaluation.message(event))
                    taken[name].append(confirmed.wait(event["event_id"]) - began)
                after = place.cpu(workers)
                cpu[name] = [cpu[name][i] + after[i] - before[i] for i in range(2)]
        confirmed.stop()
    broker.close()
    return {
        name: {
            "p50_ms": statistics.median(taken[name]) * 1000,
            "worker_us": cpu[name][0] / len(taken[name]) * 1e6,
            "postgres_us": cpu[name][1] / len(taken[name]) * 1e6,
            "events": len(taken[name]),
        }
        for name in taken
    }


_HEARTBEATS: Final = """
INSERT INTO evaluation_events (eval_id, event_id, type, attempt, occurred_at, executor_id)
SELECT %(eval_id)s, uuidv7((n - %(beats)s) * interval '1 s'), 'evaluation:started', 1,
    timestamptz '2026-01-30' + n * interval '1 s', 'agent'
FROM generate_series(1, %(beats)s) AS n
"""
_RECORD: Final = """
INSERT INTO evaluations (eval_id, status, attempt, version, metadata) VALUES (%(eval_id)s, 'running', 1, %(beats)s, '{}')
"""


def fleet(
    place: Place, shape: Shape, *, agents: int = 20, beats: int = 86_400, turns: int = 5, turn_s: float = 8
) -> dict[str, Any]:
    """Return the delay of other events in turns: without agents, with agents that just began, and with agents that ran a day.

    Also return the memory of the largest worker process.
    """
    place.reset()
    names = [f"agent-{number}" for number in range(agents)]
    engine = database.engine(place.postgres.url())
    with psycopg.connect(place.postgres.url(), autocommit=True) as raw, engine.connect() as conn:
        for eval_id in names:
            raw.execute(_HEARTBEATS, {"eval_id": eval_id, "beats": beats})
            raw.execute(_RECORD, {"eval_id": eval_id, "beats": beats})
            rebuild.rebuild(conn, eval_id)
    engine.dispose()
    _refresh(place)
    cases = {"without": [], "new": [f"new-{number}" for number in range(agents)], "with": names}
    delays: dict[str, list[float]] = {case: [] for case in cases}
    memory: list[float] = []
    broker = SendingBroker(url=place.valkey.url(), middleware=[])
    with warm(place, SIDES["evalstore"], shape, 78) as workers:
        confirmed = Confirmed(place.redis)
        confirmed.start()
        for turn in range(turns):
            for case in cases if turn % 2 else reversed(cases):
                with _heartbeats(place, cases[case], beats * (turn + 2)):
                    delays[case] += _others(broker, confirmed, f"{case}-{turn}", turn_s)
                memory.append(max(workers.rss_bytes()) / 2**20)
        confirmed.stop()
    broker.close()
    return {
        "agents": agents,
        "heartbeats_each": beats,
        **{f"{case}_p50_ms": statistics.median(each) * 1000 for case, each in delays.items()},
        **{f"{case}_p99_ms": sorted(each)[int(len(each) * 0.99)] * 1000 for case, each in delays.items()},
        "rss_first_mib": memory[0],
        "rss_last_mib": memory[-1],
        "rss_peak_mib": max(memory),
    }


@contextmanager
def _heartbeats(place: Place, agents: list[str], first: int) -> Iterator[None]:
    """Send a heartbeat of each agent a second, each at its own moment, until the end of the block."""
    stop = threading.Event()

    def send() -> None:
        broker = SendingBroker(url=place.valkey.url(), middleware=[])
        start, number = time.perf_counter(), 0
        while not stop.wait(max(0.0, start + number / len(agents) - time.perf_counter())):
            event = _step(agents[number % len(agents)], first + number // len(agents), executor_id="agent")
            broker.enqueue(store_evaluation.message(event))
            number += 1
        broker.close()

    thread = threading.Thread(target=send)
    if agents:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if agents:
            thread.join()


def _others(broker: SendingBroker, confirmed: Confirmed, name: str, seconds: float) -> list[float]:
    """Send other events at an even pace; return their delays."""
    sent: dict[str, float] = {}
    start = time.perf_counter()
    for at in range(int(seconds * _OTHERS_PER_S)):
        if (ahead := start + at / _OTHERS_PER_S - time.perf_counter()) > 0:
            time.sleep(ahead)
        event = _wide(f"other-{name}-{at}", at)
        sent[event["event_id"]] = time.perf_counter()
        broker.enqueue(store_evaluation.message(event))
    return [confirmed.wait(event_id) - began for event_id, began in sent.items()]


def _refresh(place: Place) -> None:
    with psycopg.connect(place.postgres.url(), autocommit=True) as conn:
        conn.execute("VACUUM (ANALYZE) evaluation_events, evaluations")
        conn.execute("TRUNCATE confirmations")
        conn.execute("CHECKPOINT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small amounts; the numbers mean nothing")
    small: dict[str, Any] = {"events": 2000, "turns": 2, "each": 10} if parser.parse_args().quick else {}
    few: dict[str, Any] = {"agents": 3, "beats": 500, "turns": 2, "turn_s": 2} if small else {}
    shape = SIDES["evalstore"].shapes[0]
    with Place(None) as place:
        print(json.dumps({"history": long_and_short(place, shape, **small), "fleet": fleet(place, shape, **few)}, indent=2))


if __name__ == "__main__":
    main()
