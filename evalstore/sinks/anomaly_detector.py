"""Notice what is unusual: in each group of evaluations the failure rate, duration, memory, output size and rate of arrival.

Drift is found by ADWIN (Bifet and Gavaldà, 2007), outliers by their distance from a normal distribution of logarithms. The
number of groups is bounded: a new one is admitted after some evaluations, and takes the place of the one unused for longest.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import exp, log, sqrt
from typing import Any, Final, NamedTuple

from river.drift import ADWIN
from river.proba import Gaussian

from models.anomalies import ANOMALY_DIMENSIONS, digest

# ADWIN's bound on false alarms, for each check of each series.
_DELTA: Final = 1e-5
# ADWIN looks for a change every so many values, in parts of at least so many.
_CLOCK: Final = 16
_SHORTEST_PART: Final = 20
# A series says nothing before so many values.
_WARM_UP: Final = 100
# The distribution forgets values slowly: it weighs at most twice so many.
_MEMORY: Final = 2000
# A value counts for the distribution up to so many standard deviations. Its rest is an outlier's.
_CLIP: Final = 6.0
_OUTLIERS_WITHIN: Final = 200
# The latest values, in chunks of _CLOCK, among which the beginning of a drift is looked for.
_CHUNKS: Final = 32
_IDS: Final = 10
# So many failures more than expected, in standard deviations, among the latest values are a drift.
_BURST: Final = 4 * _CLOCK
_BURST_DEVIATIONS: Final = 7.0
# exp of more is no float.
_LARGEST: Final = 700.0
_CANDIDATES: Final = 10_000
_MINUTE_S: Final = 60
# Minutes without an arrival that are noticed at the next one.
_IDLE_MINUTES: Final = 60


class Metric(NamedTuple):
    """What a series measures. Values are compared as log(value + offset), or as they are where `offset` is None.

    Drift: by at least the factor `drift`, or that difference. Outliers: above the expected value by the factor `outlier`, and
    one of `single` standard deviations, or `many` of `several` deviations among the last values, none below `least`. `floor`
    is the smallest deviation that is believed. Only rises count unless `falls`.
    """

    offset: float | None
    drift: float
    falls: bool = False
    outlier: float = 0.0
    single: float = 0.0
    several: float = 0.0
    many: int = 0
    floor: float = 0.1
    least: float = 0.0

    def scaled(self, value: float) -> float:
        """The value as series compare it."""
        return value if self.offset is None else log(max(0.0, value) + self.offset)

    def unscaled(self, value: float) -> float:
        """The reverse of `scaled`."""
        return value if self.offset is None else max(0.0, exp(min(value, _LARGEST)) - self.offset)

    def is_drift(self, change: float) -> bool:
        """Whether a change of the scaled mean is large enough to report."""
        size = self.drift if self.offset is None else log(self.drift)
        return change >= size or (self.falls and change <= -size)


METRICS: Final = {
    "failure_rate": Metric(None, 0.05),
    "duration_ms": Metric(5.0, 1.3, outlier=3.0, several=5.0, many=5),
    "memory_bytes": Metric(2.0**20, 1.3, outlier=3.0, single=8.0, several=4.5, many=3),
    "output_bytes": Metric(64.0, 2.0, falls=True, outlier=10.0, several=5.0, many=5, least=65_536),
    "arrivals_per_minute": Metric(1.0, 4.0, falls=True, outlier=5.0, single=8.0, several=5.0, many=3, floor=0.4),
}


class Sign(NamedTuple):
    """A value or a trend that is unusual for its group. `eval_ids` show it, the latest last; a restart may lose some."""

    dimension: str
    value: str
    metric: str
    kind: str
    expected: float
    observed: float
    eval_ids: tuple[str, ...]


class Unusual(NamedTuple):
    """The same of one series."""

    kind: str
    expected: float
    observed: float
    eval_ids: tuple[str, ...]


class Group(NamedTuple):
    """A group of evaluations: all of one language, submitter or executor. `key` stands for the name in what is kept."""

    dimension: str
    key: str

    @classmethod
    def of(cls, dimension: str, value: str) -> "Group":
        """The group of a name."""
        return cls(dimension, digest(value))


def adwin() -> ADWIN:
    """A new detector of drift."""
    return ADWIN(delta=_DELTA, clock=_CLOCK, min_window_length=_SHORTEST_PART, grace_period=_WARM_UP)


@dataclass
class Series:
    """The values of a metric in a group.

    `chunks`: count and sum of the latest values, some at a time. `reference`: the level that later ones are compared with where
    a change was too small to report. `left`: the level that the last reported drift left.
    """

    metric: Metric
    drift: ADWIN = field(default_factory=adwin)
    normal: Gaussian = field(default_factory=Gaussian)
    count: int = 0
    chunks: deque[list[float]] = field(default_factory=lambda: deque(maxlen=_CHUNKS))
    outliers: list[int] = field(default_factory=list)
    reference: float | None = None
    left: float | None = None
    ids: deque[str] = field(default_factory=lambda: deque(maxlen=_IDS))
    outlier_ids: deque[str] = field(default_factory=lambda: deque(maxlen=_IDS))

    def add(self, value: float, eval_id: str) -> Unusual | None:
        """Take the next value."""
        scaled = self.metric.scaled(value)
        self.count += 1
        if not self.chunks or self.chunks[-1][0] >= _CLOCK:
            self.chunks.append([0, 0.0])
        self.chunks[-1][0] += 1
        self.chunks[-1][1] += scaled
        self.ids.append(eval_id)
        return self._drifts(scaled) or self._stands_out(scaled, eval_id)

    def _drifts(self, scaled: float) -> Unusual | None:
        width, total = self.drift.width + 1, self.drift.total + scaled
        self.drift.update(scaled)
        if not self.drift.drift_detected and not self._is_burst(width, total):
            return None
        self.drift = adwin()
        before, now = self._levels(width, total)
        before = before if self.reference is None else self.reference
        self.normal, self.reference = Gaussian(), None
        self.chunks.clear()
        self.outliers.clear()
        if not self.metric.is_drift(now - before):
            self.reference = before
            return None
        if self.left is not None and not self.metric.is_drift(now - self.left):
            self.left = None  # back to what it was
            return None
        self.left = before
        return Unusual("drift", self.metric.unscaled(before), self.metric.unscaled(now), tuple(self.ids))

    def _is_burst(self, width: int, total: float) -> bool:
        """Whether failures came so fast that ADWIN, which assumes no distribution, would wait for more of them."""
        if self.metric.offset is not None or self.count % _CLOCK or width < _WARM_UP + _BURST:
            return False
        latest = list(self.chunks)[-_BURST // _CLOCK :]
        count, failures = sum(one[0] for one in latest), sum(one[1] for one in latest)
        rate = (total - failures + 1) / (width - count + 2)
        return (failures - count * rate) / sqrt(count * rate * (1 - rate)) > _BURST_DEVIATIONS

    def _levels(self, width: int, total: float) -> tuple[float, float]:
        """The mean before and after the most marked change within the latest values."""
        found, most = (total / width, total / width), -1.0
        after, sum_after = 0.0, 0.0
        for count, part in reversed(self.chunks):
            after, sum_after = after + count, sum_after + part
            if after >= width:
                break
            before, now = (total - sum_after) / (width - after), sum_after / after
            weight = abs(now - before) * sqrt(after * (width - after) / width)
            if weight > most:
                found, most = (before, now), weight
        return found

    def _stands_out(self, scaled: float, eval_id: str) -> Unusual | None:
        if not self.metric.outlier:
            return None
        normal, metric = self.normal, self.metric
        spread, mean = max(normal.sigma, metric.floor), normal.mu
        is_known = normal.n_samples >= _WARM_UP
        normal.update(min(scaled, mean + _CLIP * spread) if is_known else scaled)
        if normal.n_samples >= 2 * _MEMORY:
            self.normal = Gaussian._from_state(_MEMORY, normal.mu, normal.sigma**2, ddof=1)  # noqa: SLF001 - as river restores it
        deviations = (scaled - mean) / spread
        is_far = scaled - mean >= log(metric.outlier) and deviations >= metric.several
        if not is_known or not is_far or metric.unscaled(scaled) < metric.least:
            return None
        self.outliers = [one for one in self.outliers if one > self.count - _OUTLIERS_WITHIN][1 - metric.many :]
        self.outliers.append(self.count)
        self.outlier_ids.append(eval_id)
        if len(self.outliers) < metric.many and not (metric.single and deviations >= metric.single):
            return None
        ids = tuple(self.outlier_ids)[-len(self.outliers) :]
        return Unusual("outlier", metric.unscaled(mean), metric.unscaled(scaled), ids)


@dataclass
class Model:
    """All series of a group. `used`: the number of the last evaluation that was in it."""

    series: dict[str, Series] = field(default_factory=dict)
    minute: int | None = None
    arrivals: int = 0
    used: int = 0

    def add(self, name: str, value: float, eval_id: str) -> Unusual | None:
        """Take a value of a metric; see `Series.add`."""
        if name not in self.series:
            self.series[name] = Series(METRICS[name])
        return self.series[name].add(value, eval_id)

    def arrive(self, at: float, eval_id: str) -> Iterator[Unusual]:
        """Count an arrival; yield what is unusual about the minutes that ended before it."""
        minute = int(at // _MINUTE_S)
        if self.minute is None:
            self.minute = minute
        elif minute > self.minute:
            idle = min(minute - self.minute - 1, _IDLE_MINUTES)
            for count in (self.arrivals, *[0] * idle):
                if found := self.add("arrivals_per_minute", count, eval_id):
                    yield found
            self.minute, self.arrivals = minute, 0
        self.arrivals += 1


class Detector:
    """The models of all groups. `changed` and `removed`: since the caller cleared them."""

    def __init__(self, max_groups: int, min_evaluations: int) -> None:
        self._max_groups, self._min_evaluations = max_groups, min_evaluations
        self.models = {dimension: OrderedDict[Group, Model]() for dimension in ANOMALY_DIMENSIONS}
        self._candidates = OrderedDict[Group, int]()
        self.seen = 0
        self.changed = set[Group]()
        self.removed = set[Group]()

    def load(self, group: Group, model: Model) -> None:
        """Go on with a model. Give models in the order of `used`."""
        self.models[group.dimension][group] = model
        self.seen = max(self.seen, model.used)

    def arrive(self, dimension: str, value: str, at: float, eval_id: str) -> Iterator[Sign]:
        """Count an evaluation that arrives, at a time in seconds."""
        if model := self._model(dimension, value):
            yield from (Sign(dimension, value, "arrivals_per_minute", *found) for found in model.arrive(at, eval_id))

    def finish(self, dimension: str, value: str, values: Mapping[str, float], eval_id: str) -> Iterator[Sign]:
        """Take the values of an evaluation that ended."""
        if model := self._model(dimension, value):
            for name, one in values.items():
                if found := model.add(name, one, eval_id):
                    yield Sign(dimension, value, name, *found)

    def _model(self, dimension: str, value: str) -> Model | None:
        group, models = Group.of(dimension, value), self.models[dimension]
        self.seen += 1
        if group in models:
            models.move_to_end(group)
        elif self._is_admitted(group):
            models[group] = Model()
            self.removed.discard(group)
            while len(models) > self._max_groups:
                oldest, _ = models.popitem(last=False)
                self.removed.add(oldest)
                self.changed.discard(oldest)
        else:
            return None
        models[group].used = self.seen
        self.changed.add(group)
        return models[group]

    def _is_admitted(self, group: Group) -> bool:
        """Count an evaluation of a group without a model. Names that senders make up have few evaluations each."""
        count = self._candidates.pop(group, 0) + 1
        if count >= self._min_evaluations:
            return True
        self._candidates[group] = count
        if len(self._candidates) > _CANDIDATES:
            self._candidates.popitem(last=False)
        return False

    def forget(self, eval_id: str) -> None:
        """Name this evaluation in no sign any more."""
        for models in self.models.values():
            for model in models.values():
                for one in model.series.values():
                    for ids in (one.ids, one.outlier_ids):
                        while eval_id in ids:
                            ids.remove(eval_id)


def values_of(fields: Mapping[str, Any], size: int | None) -> dict[str, float]:
    """The values that an ending event gives. `size`: bytes of output."""
    is_failure = fields["type"] != "evaluation:completed" or fields.get("exit_code", 0) != 0
    found: dict[str, float] = {"failure_rate": float(is_failure)}
    for name in ("duration_ms", "memory_bytes"):
        if fields.get(name) is not None:
            found[name] = float(fields[name])
    if size is not None:
        found["output_bytes"] = float(size)
    return found
