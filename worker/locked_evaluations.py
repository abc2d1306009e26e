"""Evaluations that somebody keeps locked, an operator in a transaction of their own, say: their events hold up no others."""

import random
import threading
import time
from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection

from evalstore.storage import event_store
from models.logs import EventLogger
from worker.batches import Batch
from worker.content_gate import Pair

log = EventLogger("evalstore.worker")
_AGAIN_S: Final = 5.0
_REMEMBER_S: Final = 30.0


class LockedEvaluations:
    """What was found locked. For many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: set[str] = set()
        self._found_at = 0.0

    def possibly_locked(self, events: Sequence[Pair]) -> list[Pair]:
        """Those that belong to an evaluation that was locked when it was last looked at."""
        known = self._known
        if not known:
            return []
        # Their events may have gone to other processes, and none come here any more.
        if time.monotonic() - self._found_at > _REMEMBER_S:
            with self._lock:
                self._known = set()
        return [pair for pair in events if pair[1].eval_id in known]

    def refresh(self, conn: Connection, events: Sequence[Pair]) -> bool:
        """Look whether something of these is locked now. Raises DatabaseOutage (retry)."""
        wanted = {fact.eval_id for _, fact in events}
        locked = event_store.locked(conn, sorted(wanted))
        with self._lock:
            if new := locked - self._known:
                log.warning("evaluations_locked", count=len(new), eval_ids=new)
            self._known = (self._known - wanted) | locked
            self._found_at = time.monotonic() if locked else self._found_at
        return bool(locked)

    def exclude_locked(self, events: Sequence[Pair], batch: Batch) -> list[Pair]:
        """Those of `events` that need nothing locked; the others come again later, none of them the worse for it."""
        known = self._known
        free = [pair for pair in events if pair[1].eval_id not in known]
        for delivery, fact in events:
            if fact.eval_id in known:
                batch.later[delivery.redis_id] = int(_AGAIN_S * random.uniform(800, 1200))  # noqa: S311
        return free
