"""Run `make bench`: measure evalstore and its alternatives, and write the results."""

import argparse
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import psycopg
import redis

from bench import measure, report
from bench.collector import collecting
from bench.place import ROOT, Place
from bench.scraper import scraping
from bench.sides import SIDES, Shape, Side

MEASURES: Final = ("rate", "latency", "send", "processes", "stored", "memory", "tracing", "watching")


class Sizes(NamedTuple):
    """The amounts of a run. `rate_s` is the duration of a round for each side, in seconds."""

    rounds: int
    rate_s: float
    tune_s: float
    probes: int
    loaded_s: float
    sends: int
    memory_events: int
    stored: tuple[int, ...]
    processes: tuple[int, ...]


FULL: Final = Sizes(3, 6.0, 2.5, 150, 15.0, 5_000, 500_000, (1_000_000,), (1, 2, 4))
LARGE: Final = FULL._replace(memory_events=1_000_000, stored=(1_000_000, 10_000_000))
QUICK: Final = Sizes(1, 0.7, 0.0, 10, 2.0, 1_000, 30_000, (20_000,), (1, 2))


class Run:
    """A run: its servers, the selected measurements, and the results so far."""

    def __init__(self, place: Place, sides: list[Side], sizes: Sizes, events: int | None) -> None:
        self.place, self.sides, self.sizes, self.events = place, sides, sizes, events
        self.begun = time.monotonic()
        self.shapes = {side.name: side.shapes[0] for side in SIDES.values()}
        self.rates = {side.name: side.rate for side in SIDES.values()}
        self.found: dict[str, Any] = {"machine": place.describe(), "sizes": sizes._asdict()}

    def say(self, text: str) -> None:
        took = int(time.monotonic() - self.begun)
        print(f"[{took // 60:3d}:{took % 60:02d}] {text}", flush=True)

    def count(self, side: Side) -> int:
        """Return the number of events that keep a side busy for one round."""
        return self.events or max(300, int(self.rates[side.name] * self.sizes.rate_s))

    def attempt(self, name: str, what: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Return the result of a measurement, or None if it fails. The other measurements go on."""
        try:
            return what(*arguments, **named)
        except (RuntimeError, psycopg.Error, redis.RedisError) as error:
            self.say(f"{name}: {error}")
            self.found.setdefault("failures", {})[name] = str(error)[-1000:]
            return None

    def all(self, measures: list[str]) -> None:
        """Run all selected measurements and add their results to `found`."""
        self.say(f"{self.found['machine']}")
        if self.sizes.tune_s and {"rate", "latency"} & {*measures}:
            self.tune()
        for name in measures:
            self.attempt(name, getattr(self, name))
        self.found |= {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "minutes": round((time.monotonic() - self.begun) / 60, 1),
            "shapes": {side.name: str(self.shapes[side.name]) for side in self.sides},
            "titles": {side.name: f"({side.letter}) {side.title}" for side in self.sides},
        }

    def tune(self) -> None:
        """Find the best shape of each side. Of peers with the same letter keep the best."""
        best: dict[str, Side] = {}
        tuned: dict[str, float] = {}
        for side in self.sides:
            shape = self.attempt(side.title, measure.tune, self.place, side, self.say, seconds=self.sizes.tune_s)
            if shape:
                self.shapes[side.name], self.rates[side.name] = shape
                tuned[side.name] = self.rates[side.name]
                if side.letter not in best or tuned[side.name] > tuned[best[side.letter].name]:
                    best[side.letter] = side
        self.found["tuned"] = tuned
        self.sides = list(best.values())

    def rate(self) -> None:
        results: dict[str, list[dict[str, Any]]] = {side.name: [] for side in self.sides}
        for number in range(self.sizes.rounds):
            for side in self.sides:
                done = self.attempt(side.title, self._drained, side, self.shapes[side.name], number)
                if done:
                    results[side.name].append(vars(done))
                    self.say(f"round {number + 1}, {side.title}: {_told(done)}")
        self.found["rate"] = {name: each for name, each in results.items() if each}

    def _drained(self, side: Side, shape: Shape, seed: int, **options: Any) -> measure.Rate:
        return measure.rate(self.place, side, shape, self.count(side), seed=seed, **options)

    def latency(self) -> None:
        self.found["latency"] = {}
        for side in self.sides:
            if side.name in {"evalstore", "stock"}:
                result = self.attempt(side.title, self._latency, side)
                self.found["latency"][side.name] = result
                self.say(f"latency of {side.title}: {result}")

    def _latency(self, side: Side) -> dict[str, Any]:
        sizes = self.sizes
        return measure.latency(self.place, side, self.shapes[side.name], probes=sizes.probes, seconds=sizes.loaded_s)

    def send(self) -> None:
        self.found["send"] = measure.sending(self.place, count=self.sizes.sends, rounds=max(3, self.sizes.rounds))
        self.say(f"sending: {self.found['send']}")

    def processes(self) -> None:
        side, rates = SIDES["evalstore"], {}
        for processes in self.sizes.processes:
            shape = Shape(processes, side.shapes[0].threads)
            done = [self._drained(side, shape, seed) for seed in range(min(2, self.sizes.rounds))]
            rates[processes] = statistics.median(rate.events_per_s for rate in done)
            self.say(f"{processes} processes: {rates[processes]:,.0f} events/s")
        self.found["processes"] = rates

    def tracing(self) -> None:
        """Measure the storing rate with all events traced, with one in ten traced, and with none."""
        with collecting() as environment:
            tenth = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.1"}
            cases = {"off": {}, "of one event in ten": environment | tenth, "on": environment}
            side = SIDES["evalstore"]
            self.found["tracing"] = self._turns("traces", 200, {name: (side, more) for name, more in cases.items()})

    def watching(self) -> None:
        """Measure the storing rate with metrics, scrapes and logs, and without them."""
        side = SIDES["evalstore"]
        bare = replace(
            side, command=lambda shape: [*side.command(shape)[:2], "bench.sides.uncounted", *side.command(shape)[3:]]
        )
        with scraping() as environment:
            cases = {"off": (bare, {"EVALSTORE_METRICS_PORT": "0"}), "on": (side, environment)}
            self.found["watching"] = self._turns("metrics and logs", 300, cases)

    def _turns(self, what: str, seed: int, cases: dict[str, tuple[Side, dict[str, str]]]) -> dict[str, list[dict[str, Any]]]:
        """Run rounds of each case in alternating order. The number of rounds makes a difference of a few per cent visible."""
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
        for number in range(2 * self.sizes.rounds):
            for name in list(cases) if number % 2 else reversed(cases):
                side, self.place.more = cases[name]
                try:
                    done = self._drained(side, self.shapes["evalstore"], seed + number)
                finally:
                    self.place.more = {}
                results[name].append(vars(done))
                self.say(f"round {number + 1}, {what} {name}: {_told(done)}")
        return results

    def stored(self) -> None:
        side, before = SIDES["evalstore"], 0
        results: list[dict[str, Any]] = []
        for old in (0, *self.sizes.stored):
            if old:
                self.say(f"making {old - before:,} more evaluations of before")
                if not before:
                    self.place.reset()
                measure.store_old(self.place, before + 1, old)
                before = old
            for ordered in (False, True):
                # Earlier rows stay, so each round uses another seed: the same events would be duplicates.
                seeds = range(100 + len(results) * 10, 100 + len(results) * 10 + self.sizes.rounds)
                done = [self._drained(side, self.shapes[side.name], seed, ordered=ordered, keep_rows=old > 0) for seed in seeds]
                per_s = statistics.median(rate.events_per_s for rate in done)
                results.append({"before": old, "ordered": ordered, "events_per_s": per_s, "complaint": done[0].complaint})
                self.say(f"{old:,} evaluations stored, {'ascending' if ordered else 'random'} ids: {per_s:,.0f} events/s")
        self.found["stored"] = results

    def memory(self) -> None:
        self.say(f"draining {self.sizes.memory_events:,} events and watching memory")
        self.found["memory"] = measure.memory(self.place, self.shapes["evalstore"], count=self.sizes.memory_events)
        self.say(f"memory: {self.found['memory']}")


def _told(done: measure.Rate) -> str:
    cpu = ", ".join(f"{name} {us:,.0f}" for name, us in done.cpu_us.items())
    return f"{done.events_per_s:,.0f} events/s ({done.events:,} events; µs of CPU an event: {cpu}) {done.complaint}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="two minutes to see that everything runs; the numbers mean nothing"
    )
    parser.add_argument("--large", action="store_true", help="with ten million evaluations stored before, and a longer queue")
    parser.add_argument("--sides", default=",".join(SIDES), help="separated by commas; default: %(default)s")
    parser.add_argument("--measures", default=",".join(MEASURES), help="separated by commas; default: %(default)s")
    parser.add_argument("--rounds", type=int, help="of each side, alternating")
    parser.add_argument("--events", type=int, help="in each queue; default: as many as keep the side busy for seconds")
    parser.add_argument("--peers", type=Path, help="the Python of an environment with Celery, RQ, arq, taskiq and SAQ")
    parser.add_argument("--out", type=Path, help="where to write JSON; default: bench/results/<date>.json, and the docs page")
    arguments = parser.parse_args()
    names, measures = arguments.sides.split(","), arguments.measures.split(",")
    if wrong := [*({*names} - {*SIDES}), *({*measures} - {*MEASURES})]:
        parser.error(f"no such side or measure: {', '.join(wrong)}")
    sizes = QUICK if arguments.quick else LARGE if arguments.large else FULL
    sizes = sizes._replace(rounds=arguments.rounds) if arguments.rounds else sizes
    sides = [side for side in SIDES.values() if side.name in names and (arguments.peers or not side.is_peer)]

    try:
        with Place(arguments.peers.absolute() if arguments.peers else None) as place:
            run = Run(place, sides, sizes, arguments.events)
            run.all(measures)
    except KeyboardInterrupt:
        print("stopped; nothing is written", file=sys.stderr)
        return 128 + signal.SIGINT
    run.found["quick"] = arguments.quick
    is_kept = not arguments.out and not arguments.quick
    if arguments.out or is_kept:
        out = arguments.out or ROOT / "bench/results" / f"{datetime.now(UTC):%Y-%m-%d}.json"
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(run.found, indent=2) + "\n", encoding="utf-8")
    table = report.table(run.found)
    print(table)
    if failures := run.found.get("failures"):
        print(f"not everything could be measured: {'; '.join(failures)}", file=sys.stderr)
        return 1
    if is_kept:
        report.write(ROOT / "docs/performance.md", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
