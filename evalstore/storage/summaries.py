"""Sums over evaluations: counts by status, passes, scores, and how durations and memory are distributed. No SQL.

A distribution is a count for each bin of DDSketch (Masson, Rim, Lee: "DDSketch", VLDB 2019): a bin holds the values between two
powers of _GAMMA, so a quantile is within ACCURACY of a value that has this rank. Distributions of parts add up to that of the
whole, and what a change takes away is subtracted exactly. docs/decisions/0045
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Context, Decimal
from itertools import accumulate
from typing import Any, Final, NamedTuple

import msgspec

from models.webhooks import STATUSES

ACCURACY: Final = 0.009
_GAMMA: Final = (1 + ACCURACY) / (1 - ACCURACY)
_LOG_GAMMA: Final = math.log(_GAMMA)
# Above the number of bins that positive doubles fill on each side of 1: the bins of negative values are below zero.
_OFFSET: Final = 100_000
_QUANTILES: Final = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
# Enough digits for the exact sum of any finite doubles.
_EXACT: Final = Context(prec=800)
COLUMNS: Final = (*STATUSES, "passed", "scores", "score_sum", "durations", "memory")

_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(dict[int, int])


class Fact(NamedTuple):
    """What an evaluation adds to sums now. `hour`: of its end; None while it has none."""

    run_id: str | None
    submitter: str | None
    language: str | None
    executor_id: str | None
    status: str
    hour: datetime | None
    passed: bool
    score: float | None
    duration_ms: float | None
    memory_bytes: int | None


def bin_of(value: float) -> int:
    """Return the bin of a finite value. Bins ascend with the values."""
    if value == 0:
        return 0
    at = math.ceil(math.log(abs(value)) / _LOG_GAMMA) + _OFFSET
    return at if value > 0 else -at


def _value_of(at: int) -> float:
    if at == 0:
        return 0.0
    try:
        value = 2 * math.exp((abs(at) - _OFFSET) * _LOG_GAMMA) / (_GAMMA + 1)
    except OverflowError:
        value = math.inf
    return math.copysign(min(value, 1.7976931348623157e308), at)


class Summary:
    """The sums over some evaluations. Those of a difference may be negative."""

    __slots__ = ("counts", "durations", "memory", "passed", "score_sum", "scores")

    def __init__(self) -> None:
        self.counts = Counter[str]()
        self.passed = self.scores = 0
        self.score_sum = Decimal(0)
        self.durations = Counter[int]()
        self.memory = Counter[int]()

    @property
    def evaluations(self) -> int:
        """The number of evaluations."""
        return sum(self.counts.values())

    @property
    def unfinished(self) -> int:
        """The number of evaluations that are queued or running."""
        return self.counts["queued"] + self.counts["running"]

    def count(self, fact: Fact, sign: int = 1) -> None:
        """Add an evaluation, or take it away with the sign -1."""
        self.counts[fact.status] += sign
        if fact.passed:
            self.passed += sign
        if fact.score is not None:
            self.scores += sign
            self.score_sum = _EXACT.add(self.score_sum, Decimal(repr(fact.score)) * sign)
        if fact.duration_ms is not None:
            self.durations[bin_of(fact.duration_ms)] += sign
        if fact.memory_bytes is not None:
            self.memory[bin_of(fact.memory_bytes)] += sign

    def add(self, other: "Summary") -> None:
        """Add the sums of other evaluations."""
        self.passed += other.passed
        self.scores += other.scores
        self.score_sum = _EXACT.add(self.score_sum, other.score_sum)
        self.counts.update(other.counts)
        self.durations.update(other.durations)
        self.memory.update(other.memory)

    def row(self) -> tuple[Any, ...]:
        """Return the values of COLUMNS."""
        counts = [self.counts[status] for status in STATUSES]
        bins = [_ENCODER.encode({at: n for at, n in some.items() if n}) for some in (self.durations, self.memory)]
        return (*counts, self.passed, self.scores, self.score_sum, *bins)

    def add_row(self, row: Sequence[Any]) -> None:
        """Add the sums in the values of COLUMNS."""
        *counts, passed, scores, score_sum, durations, memory = row
        for status, n in zip(STATUSES, counts, strict=True):
            if n:
                self.counts[status] += n
        self.passed += passed
        self.scores += scores
        self.score_sum = _EXACT.add(self.score_sum, score_sum)
        _merge(self.durations, durations)
        _merge(self.memory, memory)

    def as_json(self) -> dict[str, Any]:
        """Return the sums as a JSON object.

        `pass_rate` is the share of those that passed among those that ended, without the cancelled ones; null where there are
        none. A lost evaluation ended. An evaluation passed if it completed with the exit code 0.
        """
        judged = sum(self.counts[status] for status in ("completed", "failed", "timed_out", "lost"))
        return {
            "evaluations": self.evaluations,
            "by_status": {status: self.counts[status] for status in STATUSES},
            "pass_rate": self.passed / judged if judged else None,
            "mean_score": float(self.score_sum / self.scores) if self.scores else None,
            "duration_ms": _quantiles(self.durations),
            "memory_bytes": _quantiles(self.memory),
        }


def _merge(bins: Counter[int], stored: bytes) -> None:
    found = _DECODER.decode(stored)
    if bins:
        Counter.update(bins, found)
    else:
        dict.update(bins, found)


def _quantiles(bins: Mapping[int, int]) -> dict[str, float | None]:
    ordered = sorted(bins)
    reached = list(accumulate(map(bins.__getitem__, ordered)))
    if not reached or reached[-1] <= 0:
        return dict.fromkeys(_QUANTILES)
    ranks = {name: math.ceil(share * reached[-1]) for name, share in _QUANTILES.items()}
    return {name: _value_of(ordered[bisect_left(reached, rank)]) for name, rank in ranks.items()}
