"""Evaluations whose record another session keeps locked. Their events wait; events of other evaluations do not."""

import random
import threading
import time
from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection

from evalstore.storage import event_store
from models.logs import EventLogger
from worker.batches import Pair

log = EventLogger("evalstore.worker")
_RETRY_S: Final = 5.0
_REMEMBER_S: Final = 30.0


class LockedEvaluations:
    """Remembers the evaluations that were locked. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: set[str] = set()
        self._found_at = 0.0

    def possibly_locked(self, events: Sequence[Pair]) -> list[Pair]:
        """Return the events of evaluations that were locked when `refresh` last looked."""
        known = self._known
        if not known:
            return []
        # Forget the locks after a while: other processes may have stored these events, which then never come here again.
        if time.monotonic() - self._found_at > _REMEMBER_S:
            with self._lock:
                self._known = set()
        return [pair for pair in events if pair[1].eval_id in known]

    def refresh(self, conn: Connection, events: Sequence[Pair]) -> bool:
        """Check which evaluations of `events` are locked. Return whether any is locked. Raises DatabaseOutage (retry)."""
        wanted = {fact.eval_id for _, fact in events}
        locked = event_store.locked(conn, sorted(wanted))
        with self._lock:
            if new := locked - self._known:
                log.warning("evaluations_locked", count=len(new), eval_ids=new)
            self._known = (self._known - wanted) | locked
            self._found_at = time.monotonic() if locked else self._found_at
        return bool(locked)

    def split_locked(self, events: Sequence[Pair]) -> tuple[list[Pair], dict[bytes, int]]:
        """Return the events whose evaluations are not locked, and the delay in ms until the retry of each other message."""
        known = self._known
        free = [pair for pair in events if pair[1].eval_id not in known]
        retry_ms = {
            delivery.redis_id: int(_RETRY_S * random.uniform(800, 1200))  # noqa: S311
            for delivery, fact in events
            if fact.eval_id in known
        }
        return free, retry_ms
