"""Events whose content is in the object store: none is stored before that is known to be there."""

import random
import threading
import time
from collections.abc import Sequence
from typing import Final

from evalstore.objects.existence_cache import Absence, ExistenceCache
from models.errors import ObjectStoreOutage, ObjectUnavailable
from models.logs import EventLogger
from models.record import EventRow
from models.settings import settings
from worker.batches import Batch, Delivery, cause, read
from worker.metrics import Outages

log = EventLogger("evalstore.worker")
_SOONEST_S: Final = 1.0
_LATEST_S: Final = 30.0
_OUTAGE_S: Final = 5.0
_OUTAGE_LATEST_S: Final = 300.0
# What waits for the store comes by again and again; no faster than this, so that it leaves room for all that needs no object.
_ROUNDS_PER_S: Final = 5_000
_WARN_EVERY_S: Final = 60.0

Pair = tuple[Delivery, EventRow]


class ContentGate:
    """Tells which events can be stored. For many threads."""

    def __init__(self, presence: ExistenceCache, outages: Outages) -> None:
        self._presence, self._outages = presence, outages
        self._lock = threading.Lock()
        self._away = False
        self._next_due = 0.0
        self._next_warning = 0.0

    def is_ready(self, fact: EventRow) -> bool:
        """Whether it needs no object, or none that was not seen a short time ago."""
        return all(self._presence.is_known(reference) for reference in fact.references)

    def split_ready(self, events: Sequence[Pair], batch: Batch, bad: dict[bytes, bytes]) -> list[Pair]:
        """Those of `events` whose objects are there. The others come again later, or are `bad` when the grace is over."""
        if not events:
            return []
        absent = self._presence.missing(reference for _, fact in events for reference in fact.references)
        self._log_changes(self._presence.outage)
        found = []
        for delivery, fact in events:
            absences = [absent[reference] for reference in fact.references if reference in absent]
            if not absences:
                found.append((delivery, fact))
                continue
            self._warn_refused(absences)
            missing = next((one for one in absences if _ends_with_grace(one)), None)
            wait_s = self._outage_s() if missing is None else _missing_s(delivery)
            if missing is not None and wait_s is None:
                bad[delivery.redis_id] = cause(missing)
            else:
                batch.later[delivery.redis_id] = int((wait_s or 0) * 1000)
        return found

    def _warn_refused(self, absences: list[Absence]) -> None:
        refused = next((one for one in absences if isinstance(one, ObjectUnavailable)), None)
        with self._lock:
            if refused is None or time.monotonic() < self._next_warning:
                return
            self._next_warning = time.monotonic() + _WARN_EVERY_S
        log.error("object_refused", error=refused)

    def _outage_s(self) -> float:
        with self._lock:
            now = time.monotonic()
            soonest = now + _OUTAGE_S * random.uniform(0.8, 1.2)  # noqa: S311
            self._next_due = min(max(soonest, self._next_due + 1 / _ROUNDS_PER_S), now + _OUTAGE_LATEST_S)
            return self._next_due - now

    def _log_changes(self, outage: ObjectStoreOutage | None) -> None:
        """Say once that the store is away, and that it is back."""
        with self._lock:
            changed, self._away = self._away != (outage is not None), outage is not None
            if outage is None:
                self._next_due = 0.0
        if outage is not None:
            self._outages.away("objects", "contents")
        else:
            self._outages.back("objects", "contents")
        if changed and outage is not None:
            log.warning("objects_outage", error=outage)
        elif changed:
            log.warning("objects_outage_over")


def _ends_with_grace(absence: Absence) -> bool:
    """Whether the event becomes a dead letter if this lasts for longer than the grace."""
    return absence.needs_operator if isinstance(absence, ObjectUnavailable) else not isinstance(absence, ObjectStoreOutage)


def _missing_s(delivery: Delivery) -> float | None:
    """How long to wait for an object that is missing, the longer the longer it has been; None: no longer.

    A message whose time is as far in the future is by a clock that tells nothing.
    """
    grace_s, waited_s = settings().object_grace_s, time.time() - read(delivery.body).message_timestamp / 1000
    if abs(waited_s) >= grace_s:
        return None
    return min(max(_SOONEST_S, waited_s / 4), _LATEST_S, grace_s - waited_s)
