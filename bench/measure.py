"""The measurements, equal for all sides. No measurement asserts a time."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg

from bench.events import PER_EVALUATION, events
from bench.place import Cpu, Place, Workers
from bench.sides import SIDES, Shape, Side

_WARM: Final = 150
_WARM_SEED: Final = 999_983


@dataclass(frozen=True)
class Rate:
    """The result of one drained queue. `cpu_us` is processor time for each event, of the side's workers and both servers."""

    events: int
    events_per_s: float
    cpu_us: dict[str, float]
    complaint: str = ""
    rss_mib: list[float] = field(default_factory=list)


def rate(  # noqa: PLR0913  each says something of its own
    place: Place,
    side: Side,
    shape: Shape,
    count: int,
    *,
    seed: int,
    ordered: bool = False,
    keep_rows: bool = False,
    sample_s: float | None = None,
    within_s: float = 90.0,
) -> Rate:
    """Drain a full queue. The time runs from the release of the queue to warm, idle workers until the commit of the last row.

    With `sample_s`, sample the memory of the largest worker process at that interval. Raises RuntimeError if a worker dies.
    """
    count -= count % PER_EVALUATION
    eval_ids = sorted({event["eval_id"] for event in events(count, seed=seed, ordered=ordered)})
    place.reset(keep_rows=keep_rows)
    if keep_rows and place.stored(eval_ids).events:
        raise RuntimeError("these events are stored already: another seed")
    place.fill(side, count, seed=seed, ordered=ordered)
    side.hold(place.redis)
    place.settle()
    with warm(place, side, shape, seed) as workers:
        before, start, start_s = place.cpu(workers), time.monotonic(), time.time()
        side.release(place.redis)
        rss = _until(
            lambda: side.waiting(place.redis) == 0,
            workers,
            sample_s,
            give_up=start + within_s,
            every_s=0.02 if side.stores == "nothing" else 0.1,
        )
        stored, last_s = count, time.time()
        if side.stores != "nothing":
            while (totals := place.stored(eval_ids)).events < count and time.monotonic() < start + within_s:
                time.sleep(0.2)
            stored, last_s = totals
        after = place.cpu(workers)
    spent = {name: (after[i] - before[i]) / max(stored, 1) * 1e6 for i, name in enumerate(Cpu._fields)}
    complaint = "" if side.stores == "nothing" else _complaint(place, side, eval_ids, stored, count)
    return Rate(stored, stored / max(last_s - start_s, 1e-3), spent, complaint, [size / 2**20 for size in rss])


@contextmanager
def warm(place: Place, side: Side, shape: Shape, seed: int) -> Iterator[Workers]:
    """Start workers, let them store something, and wait until they are idle."""
    with place.workers(side, shape) as workers:
        warm_seed = _WARM_SEED + seed
        place.fill(side, _WARM, seed=warm_seed)
        eval_ids = sorted({event["eval_id"] for event in events(_WARM, seed=warm_seed)})
        give_up = time.monotonic() + 60
        while side.stores != "nothing" and place.stored(eval_ids).events < _WARM:
            workers.tree()
            if time.monotonic() > give_up:
                raise RuntimeError(f"{side.title} stored nothing within a minute:\n{workers.tail()}")
            time.sleep(0.1)
        workers.wait_until_idle()
        yield workers


def _until(is_so: Callable[[], bool], workers: Workers, sample_s: float | None, *, give_up: float, every_s: float) -> list[int]:
    """Wait for a condition and sample memory meanwhile."""
    samples: list[int] = []
    next_sample = time.monotonic()
    while not is_so() and time.monotonic() < give_up:
        if sample_s and time.monotonic() >= next_sample:
            samples.append(max(workers.rss_bytes()))
            next_sample += sample_s
        time.sleep(every_s)
    return samples


def _complaint(place: Place, side: Side, eval_ids: list[str], stored: int, count: int) -> str:
    """Return what is wrong with the stored rows, or an empty text."""
    if stored != count:
        return f"stored {stored:,} of {count:,} events in time"
    if side.stores == "all":
        expected = count // PER_EVALUATION
        totals = place.totals(eval_ids)
        if (totals.evaluations, totals.complete) != (expected, expected):
            return f"{totals.evaluations:,} records, {totals.complete:,} complete, of {expected:,}"
        if totals.confirmations < expected:
            return f"{totals.confirmations:,} confirmations of {expected:,} evaluations"
    return ""


def tune(place: Place, side: Side, say: Callable[[str], None], *, seconds: float) -> tuple[Shape, float]:
    """Return the shape with the highest rate, and that rate."""
    rates = {}
    for shape in side.shapes:
        done = rate(place, side, shape, int(side.rate * seconds), seed=7)
        rates[shape] = done.events_per_s
        say(f"{side.title}, {shape}: {done.events_per_s:,.0f} events/s {done.complaint}")
    best = max(rates, key=lambda shape: rates[shape])
    return best, rates[best]


def latency(place: Place, side: Side, shape: Shape, *, probes: int, seconds: float) -> dict[str, Any]:
    """Return the milliseconds from `send` to committed and visible, when idle and at 1,000 events/s."""
    place.reset()
    with warm(place, side, shape, 0):
        options = ["--side", side.name, "--probes", str(probes), "--seconds", str(seconds)]
        result: dict[str, Any] = json.loads(place.run(side, "bench.latency", *options))
    return result


def sending(place: Place, *, count: int, rounds: int) -> dict[str, Any]:
    """Return the microseconds that a sender spends on each event."""
    place.reset()
    result: dict[str, Any] = json.loads(place.run(None, "bench.sending", "--count", str(count), "--rounds", str(rounds)))
    return result


def memory(place: Place, shape: Shape, *, count: int) -> dict[str, Any]:
    """Return the memory of the largest worker process in MiB, while it drains a queue of `count` events."""
    done = rate(place, SIDES["evalstore"], shape, count, seed=5, sample_s=0.5, within_s=600)
    samples = done.rss_mib or [0.0]
    fifth = max(1, len(samples) // 5)
    return {
        "events": done.events,
        "events_per_s": done.events_per_s,
        "peak_mib": max(samples),
        "second_fifth_mib": statistics.median(samples[fifth : 2 * fifth] or samples),
        "last_fifth_mib": statistics.median(samples[-fifth:]),
        "complaint": done.complaint,
    }


_OLD_EVENTS: Final = """
INSERT INTO evaluation_events (eval_id, event_id, type, attempt, occurred_at, language, submitter, exit_code, code, output)
SELECT eval_id, gen_random_uuid(), 'evaluation:' || type, 1, at + phase * interval '1 second',
    CASE phase WHEN 0 THEN 'python' END, CASE phase WHEN 0 THEN 'benchmark' END, CASE phase WHEN 2 THEN 0 END,
    CASE phase WHEN 0 THEN 'print(1)'::bytea END, CASE phase WHEN 2 THEN '1'::bytea END
FROM (SELECT md5(i::text) AS eval_id, timestamptz '2025-01-01' + i * interval '1 s' AS at
    FROM generate_series(%s::int, %s::int) AS i),
    (VALUES (0, 'queued'), (1, 'started'), (2, 'completed')) AS phases (phase, type)
"""
_OLD_RECORDS: Final = """
INSERT INTO evaluations (eval_id, status, attempt, version, language, submitter, exit_code, metadata, queued_at, started_at,
    finished_at, code_event_id, result_event_id)
SELECT md5(i::text), 'completed', 1, 3, 'python', 'benchmark', 0, '{}', at, at + interval '1 s', at + interval '2 s',
    gen_random_uuid(), gen_random_uuid()
FROM (SELECT i, timestamptz '2025-01-01' + i * interval '1 s' AS at FROM generate_series(%s::int, %s::int) AS i)
"""
_DROP_KEYS: Final = """
ALTER TABLE evaluation_events DROP CONSTRAINT evaluation_events_pkey; ALTER TABLE evaluations DROP CONSTRAINT evaluations_pkey;
"""
_ADD_KEYS: Final = """
SET maintenance_work_mem = '1GB';
ALTER TABLE evaluation_events ADD PRIMARY KEY (eval_id, event_id); ALTER TABLE evaluations ADD PRIMARY KEY (eval_id);
"""


def store_old(place: Place, first: int, last: int) -> None:
    """Store old evaluations, numbers `first` to `last`, each with its three events. Then refresh the statistics.

    Their ids have the form of the benchmark's ids, so new ids fall between them. Keys and indexes are dropped and rebuilt,
    which is faster.
    """
    with psycopg.connect(place.postgres.url(), autocommit=True) as conn:
        keys = conn.execute(_KEYS).fetchall()
        conn.execute(_DROP_KEYS)
        conn.execute(_OLD_EVENTS, [first, last])
        conn.execute(_OLD_RECORDS, [first, last])
        conn.execute(_ADD_KEYS)
        if conn.execute(_KEYS).fetchall() != keys:
            raise RuntimeError("the migrations make other indexes than this benchmark")
        conn.execute("VACUUM (ANALYZE) evaluation_events, evaluations")
        conn.execute("CHECKPOINT")


_KEYS: Final = """
SELECT indexdef FROM pg_indexes WHERE tablename IN ('evaluations', 'evaluation_events') ORDER BY indexdef
"""
