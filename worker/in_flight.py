"""What this process holds, across its queues, and whether it may take more."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

_DRAIN_S = 5.0


class InFlight:
    """The ids of the messages this process fetched and has not settled. For use by many threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.open()

    def open(self) -> None:
        """Start over, for a worker that boots."""
        with self._changed:
            self._queue_of: dict[bytes, str] = {}
            self._is_exclusive = False
            self._fetching = 0
            self._draining_until = 0.0
            self.stopping = False
            self.abandoned = False
            self.outages = 0

    def close(self) -> None:
        """Take nothing any more, and wake whoever waits."""
        with self._changed:
            self.stopping = True
            self._changed.notify_all()

    @property
    def state(self) -> Literal["working", "waiting", "stopping"]:
        """What this process's death would mean: only one at work speaks against the messages it held."""
        return "stopping" if self.stopping else "waiting" if self.outages else "working"

    def ids(self, queue: str) -> set[bytes]:
        """What is held of a queue."""
        with self._changed:
            return {redis_id for redis_id, held_of in self._queue_of.items() if held_of == queue}

    def add(self, queue: str, redis_ids: Iterable[bytes]) -> set[bytes]:
        """Hold these; returns those that were not held already."""
        with self._changed:
            new = {redis_id for redis_id in redis_ids if redis_id not in self._queue_of}
            self._queue_of.update(dict.fromkeys(new, queue))
            return new

    def remove(self, redis_ids: Iterable[bytes]) -> None:
        """Hold these no longer."""
        with self._changed:
            dropped = [redis_id for redis_id in redis_ids if self._queue_of.pop(redis_id, None)]
            # A thread that held none of them has no say: suspects may be on their way.
            if dropped and not self._queue_of:
                self._is_exclusive = False
            self._changed.notify_all()

    def may_fetch(self) -> bool:
        """Whether messages may be taken that are suspected of nothing."""
        return not self.stopping and not self._is_exclusive and time.monotonic() >= self._draining_until

    @contextmanager
    def fetching(self) -> Iterator[bool]:
        """Gives whether messages may be fetched that are suspected of nothing; until they are taken, nobody is alone."""
        with self._changed:
            may = self.may_fetch()
            self._fetching += may
        try:
            yield may
        finally:
            with self._changed:
                self._fetching -= may

    def enter_exclusive(self) -> bool:
        """Whether suspects may be taken now, which must be alone in the process.

        Where it holds anything else, it takes no more for a while instead: for five seconds of every ten, so that a long job
        does not keep the process from all other work.
        """
        with self._changed:
            if self.stopping or self._is_exclusive:
                return False
            now = time.monotonic()
            if self._queue_of or self._fetching:
                if now >= self._draining_until + _DRAIN_S:
                    self._draining_until = now + _DRAIN_S
                return False
            self._is_exclusive, self._draining_until = True, 0.0
            return True

    def leave_exclusive(self) -> None:
        """There were no suspects after all."""
        with self._changed:
            self._is_exclusive = False
            self._changed.notify_all()

    def wait_until(self, is_so: Callable[[], bool], seconds: float) -> None:
        """Wait until that is so because something was settled."""
        with self._changed:
            self._changed.wait_for(is_so, timeout=seconds)

    def wait_for_change(self, seconds: float) -> None:
        """Wait until something was settled."""
        with self._changed:
            self._changed.wait(timeout=seconds)

    def sleep_unless_stopping(self, seconds: float) -> bool:
        """Wait, but not beyond the order to stop; returns whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopping, timeout=seconds)
            return not self.stopping
