"""The state that the overview shows, from one probe for all open pages of this process.

A page that is open asks nothing of PostgreSQL: a task reads the state every INTERVAL_S while at least one page listens.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, Final, NamedTuple

from evalstore.storage import overview_samples
from evalstore.storage.overview_samples import Sample
from evalstore.telemetry.backend_stats import CachedProbe
from evalstore.telemetry.status_probe import Snapshot, StatusProbe
from models.settings import Settings

INTERVAL_S: Final = 2.0
_STATE_S: Final = 60.0  # longer than any probe waits
_STALE_S: Final = 60.0
_PATIENCE_S: Final = 0.1
_SAMPLES_S: Final = 20.0  # a sample comes each minute


class Live(NamedTuple):
    """The state at a moment. `samples` are those of the last day. `arriving_per_s` is None until two moments are known."""

    snapshot: Snapshot
    samples: list[Sample]
    arriving_per_s: float | None


class LiveState:
    """For one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._probe = StatusProbe(settings)
        self._samples_probe: CachedProbe[list[Sample]] = self._probe.probe(overview_samples.last_day)
        self._samples: list[Sample] = []
        self._samples_until = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="evalstore-overview")
        self._listeners = 0
        self._task: asyncio.Task[None] | None = None
        self._latest: Live | None = None
        self._read_at = 0.0
        self._changed = asyncio.Condition()
        self._reading: asyncio.Task[Live] | None = None

    async def current(self) -> Live:
        """Return the state. Callers share one reading.

        A slow probe must not make a page slow: for up to _STALE_S the last state is returned while a reading takes longer.
        """
        loop = asyncio.get_running_loop()
        latest, age_s = self._latest, loop.time() - self._read_at
        if latest is not None and age_s < INTERVAL_S:
            return latest
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read_in_thread())
        reading = asyncio.shield(self._reading)
        if latest is None or age_s > _STALE_S:
            return await reading
        done, _ = await asyncio.wait([reading], timeout=_PATIENCE_S)
        return reading.result() if done else latest

    async def _read_in_thread(self) -> Live:
        loop = asyncio.get_running_loop()
        self._latest = await loop.run_in_executor(self._thread, self._read)
        self._read_at = loop.time()
        return self._latest

    def _read(self) -> Live:
        snapshot = self._probe.snapshot()
        if time.monotonic() >= self._samples_until:
            self._samples_until = time.monotonic() + _SAMPLES_S
            self._samples = self._samples_probe.get() or self._samples
        return Live(snapshot, self._samples, _arriving(self._latest, snapshot))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Read the state regularly until the block ends."""
        self._listeners += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self._listeners -= 1

    async def _run(self) -> None:
        while self._listeners:
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._read_in_thread())
            await asyncio.shield(self._reading)
            async with self._changed:
                self._changed.notify_all()
            await asyncio.sleep(INTERVAL_S)

    async def changes(self) -> AsyncIterator[Live]:
        """Yield each new state. For use within `listening`."""
        while True:
            async with self._changed:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_STATE_S):
                        await self._changed.wait()
            if self._latest is not None:
                yield self._latest

    def close(self) -> None:
        """Stop reading, and close the connections."""
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._probe.close()


def _waiting(snapshot: Snapshot) -> int | None:
    if "queues" not in snapshot:
        return None
    return sum(int(queue[state]) for queue in snapshot["queues"] for state in ("ready", "inflight", "delayed"))


def _arriving(before: Live | None, snapshot: Snapshot) -> float | None:
    """Return the events that arrive a second: those that are stored, and the growth of the queues."""
    if before is None:
        return None
    then, now = _waiting(before.snapshot), _waiting(snapshot)
    at: datetime = snapshot["at"]
    seconds = (at - before.snapshot["at"]).total_seconds()
    if then is None or now is None or not 0 < seconds < 10 * INTERVAL_S:
        return None
    per_s: float = snapshot["events_per_s"] + (now - then) / seconds
    return round(max(0.0, per_s), 1)


def as_json(live: Live) -> dict[str, Any]:
    """Return the state as a JSON object."""
    return {**live.snapshot, "arriving_per_s": live.arriving_per_s}
