"""Stops a worker from emptying the queue into the dead letters, as it would after a bad release."""

import threading
import time
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class BreakerLimits:
    """It opens when, of at least `messages` within `window_s`, the `share` is bad; then one is tried every `probe_s`."""

    messages: int = 500
    share: float = 0.5
    window_s: float = 60
    probe_s: float = 30


class Breaker:
    """Counts what turned out good and bad. For use by many threads."""

    def __init__(self, limits: BreakerLimits) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._counts: deque[tuple[float, int, int]] = deque()
        self._probed = 0.0
        self.is_open = False

    def note(self, good: int, bad: int) -> bool:
        """Count messages that were worked on; returns whether that has opened it."""
        with self._lock:
            now = time.monotonic()
            while self._counts and self._counts[0][0] < now - self.limits.window_s:
                self._counts.popleft()
            self._counts.append((now, good, bad))
            total_bad = sum(bad for _, _, bad in self._counts)
            total = total_bad + sum(good for _, good, _ in self._counts)
            opens = not self.is_open and total >= self.limits.messages and total_bad >= total * self.limits.share
            if opens:
                self.is_open, self._probed = True, now
            return opens

    def may_probe(self) -> bool:
        """Whether the caller, and nobody else for a while, may try one message."""
        with self._lock:
            now = time.monotonic()
            if now - self._probed < self.limits.probe_s:
                return False
            self._probed = now
            return True

    def close(self) -> None:
        """One was good: start counting anew."""
        with self._lock:
            self.is_open = False
            self._counts.clear()
