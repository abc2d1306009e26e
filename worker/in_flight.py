"""The messages of all queues that this process has fetched and not settled. They decide whether it may fetch more."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

_DRAIN_S = 5.0


class InFlight:
    """The ids of messages in flight. Any thread may use it.

    Messages in quarantine are fetched exclusively: the process holds no other message. So its death speaks only against them.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.open()

    def open(self) -> None:
        """Reset, for a worker that boots."""
        with self._changed:
            self._queue_of: dict[bytes, str] = {}
            self._is_exclusive = False
            self._fetching = 0
            self._draining_until = 0.0
            self.stopping = False
            self.abandoned = False
            self._waiting = 0

    def close(self) -> None:
        """Stop fetching, and wake every waiting thread."""
        with self._changed:
            self.stopping = True
            self._changed.notify_all()

    @property
    def state(self) -> Literal["working", "waiting", "stopping"]:
        """The state that heartbeats carry. Only the death of a process that is working speaks against its messages."""
        return "stopping" if self.stopping else "waiting" if self._waiting else "working"

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the process as waiting for a server while the block runs."""
        with self._changed:
            self._waiting += 1
        try:
            yield
        finally:
            with self._changed:
                self._waiting -= 1

    def ids(self, queue: str) -> set[bytes]:
        """Return the ids of a queue."""
        with self._changed:
            return {redis_id for redis_id, held_of in self._queue_of.items() if held_of == queue}

    def add(self, queue: str, redis_ids: Iterable[bytes]) -> set[bytes]:
        """Add ids. Return the ids that are new."""
        with self._changed:
            new = {redis_id for redis_id in redis_ids if redis_id not in self._queue_of}
            self._queue_of.update(dict.fromkeys(new, queue))
            return new

    def remove(self, redis_ids: Iterable[bytes]) -> None:
        """Remove ids."""
        with self._changed:
            dropped = [redis_id for redis_id in redis_ids if self._queue_of.pop(redis_id, None)]
            # Without a removal, stay exclusive: a thread may be fetching messages from quarantine now.
            if dropped and not self._queue_of:
                self._is_exclusive = False
            self._changed.notify_all()

    def may_fetch(self) -> bool:
        """Return whether messages outside quarantine may be fetched."""
        return not self.stopping and not self._is_exclusive and time.monotonic() >= self._draining_until

    @contextmanager
    def fetching(self) -> Iterator[bool]:
        """Give whether messages outside quarantine may be fetched. During the block no thread enters exclusive mode."""
        with self._changed:
            may = self.may_fetch()
            self._fetching += may
        try:
            yield may
        finally:
            with self._changed:
                self._fetching -= may

    def enter_exclusive(self) -> bool:
        """Enter exclusive mode if nothing is in flight. Return whether messages in quarantine may be fetched now.

        Otherwise pause fetching, so that the process becomes empty. The pause is 5 s of every 10 s, because a long job must not
        stop all other work.
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
        """Leave exclusive mode, because quarantine was empty."""
        with self._changed:
            self._is_exclusive = False
            self._changed.notify_all()

    def wait_until(self, is_so: Callable[[], bool], seconds: float) -> None:
        """Wait until `is_so` returns True, or until the time is up."""
        with self._changed:
            self._changed.wait_for(is_so, timeout=seconds)

    def wait_for_change(self, seconds: float) -> None:
        """Wait until a message is settled, or until the time is up."""
        with self._changed:
            self._changed.wait(timeout=seconds)

    def sleep_unless_stopping(self, seconds: float) -> bool:
        """Wait. Return False at once if the process is stopping."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopping, timeout=seconds)
            return not self.stopping
