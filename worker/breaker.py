"""The breaker: after a bad release it stops a worker from making dead letters of the whole queue."""

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from evalstore.telemetry.counters import Counters
from models.logs import EventLogger
from models.settings import Settings

log = EventLogger("evalstore.worker")


@dataclass(frozen=True)
class BreakerLimits:
    """When the breaker opens: of at least `messages` within `window_s`, the `share` is bad. Then one message is tried every
    `probe_s`."""

    messages: int = 500
    share: float = 0.5
    window_s: float = 60
    probe_s: float = 30

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return the limits from the settings."""
        return cls(settings.breaker_messages, settings.breaker_share, settings.breaker_window_s, settings.breaker_probe_s)


class Breaker:
    """Counts good and bad messages, and shows its state in the log and the metrics. Any thread may use it."""

    def __init__(self, limits: BreakerLimits, counters: Counters) -> None:
        self._limits, self._counters = limits, counters
        self._lock = threading.Lock()
        self._counts: deque[tuple[float, int, int]] = deque()
        self._probed = 0.0
        self.is_open = False

    def record(self, good: int, causes: Mapping[bytes, bytes]) -> None:
        """Count messages that were tried. `causes` has the bad messages. May open the breaker."""
        bad = len(causes)
        with self._lock:
            now = time.monotonic()
            while self._counts and self._counts[0][0] < now - self._limits.window_s:
                self._counts.popleft()
            self._counts.append((now, good, bad))
            total_bad = sum(bad for _, _, bad in self._counts)
            total = total_bad + sum(good for _, good, _ in self._counts)
            opens = not self.is_open and total >= self._limits.messages and total_bad >= total * self._limits.share
            if opens:
                self.is_open, self._probed = True, now
        if opens:
            self.report_open(causes)

    def may_probe(self) -> bool:
        """Return whether the caller may try one message. One caller gets True in each period of `probe_s`."""
        with self._lock:
            now = time.monotonic()
            if now - self._probed < self._limits.probe_s:
                return False
            self._probed = now
            return True

    def report_open(self, causes: Mapping[bytes, bytes]) -> None:
        """Log that the breaker is open, with one of the causes. Does nothing if another thread has closed it."""
        if not self.is_open:
            return
        self._counters.set("evalstore_breaker_open", to=1)
        limits, newest = self._limits, next(iter(causes.values()), b"").decode()
        log.critical(
            "breaker_opened",
            percent=limits.share * 100,
            messages=limits.messages,
            window_s=limits.window_s,
            probe_s=limits.probe_s,
            cause=newest,
        )

    def close(self) -> None:
        """Close after a good message, and count from zero."""
        with self._lock:
            self.is_open = False
            self._counts.clear()
        log.warning("breaker_closed")
        self._counters.set("evalstore_breaker_open", to=0)
