"""The counters of a process, and a deadline for each of its loops: numbers at fixed offsets of a mapped file.

Other processes read the file without asking its process, which may be stuck or dead. docs/decisions/0014
"""

import mmap
import os
import struct
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Final, NamedTuple
from zlib import crc32

from models.metrics import METRICS, Metric

Series = tuple[str, tuple[str, ...]]  # a metric's name, and the values of its labels

_MAGIC: Final = b"evalstore 1 "
_LOOPS: Final = 128
_LOOP: Final = struct.Struct("d40s")
_HEAD_BYTES: Final = 64


_COUNTED_BY_ALL: Final = frozenset(
    {
        "evalstore_conflicting_results_total",
        "evalstore_merge_states_rebuilt_total",
        "evalstore_database_connections",
        "evalstore_hook_duration_seconds",
        "evalstore_hook_events_total",
        "evalstore_hook_off",
    }
)


def counted_by(role: str) -> list[Metric]:
    """Return the metrics that processes with this role count."""
    return [metric for metric in METRICS if metric.source == role or metric.name in _COUNTED_BY_ALL]


class Schema:
    """The offset of each number. `values` lists the values of open labels, by label."""

    def __init__(self, metrics: Iterable[Metric], values: Mapping[str, Sequence[str]]) -> None:
        self.metrics = {metric.name: metric for metric in metrics}
        self.offsets: dict[Series, int] = {}
        self.is_gauge, self.is_largest = bytearray(), bytearray()
        self.size = 0
        for metric in self.metrics.values():
            for labels in product(*(known or values.get(label, ()) for label, known in metric.labels.items())):
                self.offsets[metric.name, labels] = self.size
                # A histogram has a count for each bucket, one above the last bucket, and the sum.
                width = len(metric.buckets) + 2 if metric.kind == "histogram" else 1
                self.is_gauge += bytes([metric.kind == "gauge"]) * width
                self.is_largest += bytes([metric.across == "max"]) * width
                self.size += width
        self._series: dict[str, list[tuple[Series, int]]] = {name: [] for name in self.metrics}
        for key, place in self.offsets.items():
            self._series[key[0]].append((key, place))
        described = repr([(name, labels, self.metrics[name][1:]) for name, labels in self.offsets])
        self.mark = _MAGIC + b"%08x" % crc32(described.encode())
        self.start = _HEAD_BYTES + _LOOPS * _LOOP.size
        self.bytes = self.start + 8 * self.size

    def series(self, name: str) -> list[tuple[Series, int]]:
        """Return the series of a metric, and their offsets."""
        return self._series[name]

    def matches(self, data: bytes) -> bool:
        """Tell whether `data` has this schema. A truncated file, or a file of another release, does not."""
        return len(data) == self.bytes and data.startswith(self.mark)

    def numbers(self, data: bytes) -> list[float]:
        """Unpack the numbers of a counter file."""
        return list(struct.unpack_from(f"{self.size}d", data, self.start))

    def data(self, numbers: Sequence[float]) -> bytes:
        """Return a counter file with these numbers, and no loops."""
        return self.mark.ljust(self.start, b"\0") + struct.pack(f"{self.size}d", *numbers)


class Loop(NamedTuple):
    """A loop of a process, and its deadline on the monotonic clock."""

    name: str
    deadline: float


def loops(data: bytes) -> Iterator[Loop]:
    """Yield the loops with a deadline in a counter file. A file that is not complete yet has none."""
    if len(data) < _HEAD_BYTES + _LOOPS * _LOOP.size:
        return
    for place in range(_LOOPS):
        due, name = _LOOP.unpack_from(data, _HEAD_BYTES + place * _LOOP.size)
        if due:
            yield Loop(name.rstrip(b"\0").decode(errors="replace"), due)


class Counters:
    """The counters of this process. Thread-safe."""

    def __init__(self, layout: Schema) -> None:
        self.schema = layout
        self._lock = threading.Lock()
        self._here = threading.local()
        self._deadlines_disabled = False
        self._free = list(range(_LOOPS - 1, -1, -1))
        self._memory: bytearray | mmap.mmap = bytearray(layout.data([0.0] * layout.size))
        self._numbers = self._view()

    def _view(self) -> "memoryview[float]":
        return memoryview(self._memory)[self.schema.start :].cast("d")

    def keep_in(self, path: Path) -> None:
        """Move the counters into a new file. Raises OSError; the counters then stay in memory."""
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Reserve the space: a write to a mapped page on a full disk ends the process with SIGBUS.
            os.posix_fallocate(file, 0, self.schema.bytes)
            with self._lock:
                memory = mmap.mmap(file, self.schema.bytes)
                memory[:] = bytes(self._memory)
                self._memory = memory
                self._numbers = self._view()
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(file)

    def data(self) -> bytes:
        """Return a copy of the counter file."""
        with self._lock:
            return bytes(self._memory)

    def add(self, name: str, *labels: str, by: float = 1) -> None:
        """Add to a counter."""
        place = self.schema.offsets[name, labels]
        with self._lock:
            self._numbers[place] += by

    def set(self, name: str, *labels: str, to: float) -> None:
        """Set a gauge."""
        self._numbers[self.schema.offsets[name, labels]] = to

    def get(self, name: str, *labels: str) -> float:
        """Return the value of a counter or gauge."""
        return self._numbers[self.schema.offsets[name, labels]]

    def observe(self, name: str, *labels: str, value: float) -> None:
        """Add a value to a histogram."""
        self.observe_all(name, *labels, values=(value,))

    def observe_all(self, name: str, *labels: str, values: Sequence[float], times: float = 1) -> None:
        """Add values to a histogram, each of them `times` times."""
        place, buckets = self.schema.offsets[name, labels], self.schema.metrics[name].buckets
        with self._lock:
            numbers = self._numbers
            for value in values:
                numbers[place + bisect_left(buckets, value)] += times
            numbers[place + len(buckets) + 1] += sum(values) * times

    def watch_thread(self, name: str) -> None:
        """Register the calling thread as a loop; see `set_deadline`. Above 128 loops, do nothing."""
        with self._lock:
            if getattr(self._here, "place", None) is None and self._free:
                self._here.place = self._free.pop()
                _LOOP.pack_into(self._memory, self._offset(), 0.0, name.encode(errors="replace")[:40])

    def set_deadline(self, within_s: float | None) -> None:
        """Report progress of the calling thread.

        The thread is stuck if it makes no other call for `within_s`. None removes the deadline.
        """
        if getattr(self._here, "place", None) is not None:
            until = 0.0 if within_s is None or self._deadlines_disabled else time.monotonic() + within_s
            with self._lock:
                struct.pack_into("d", self._memory, self._offset(), until)

    def leave_thread(self) -> None:
        """Unregister the calling thread, before it ends."""
        self.set_deadline(None)
        with self._lock:
            if (place := self._here.__dict__.pop("place", None)) is not None:
                self._free.append(place)

    def disable_deadlines(self) -> None:
        """Remove all deadlines, for the shutdown of the process."""
        with self._lock:
            self._deadlines_disabled = True
            for place in range(_LOOPS):
                struct.pack_into("d", self._memory, _HEAD_BYTES + place * _LOOP.size, 0.0)

    def _offset(self) -> int:
        place: int = self._here.place
        return _HEAD_BYTES + place * _LOOP.size
