"""Store events with content in the object store only once their objects exist."""

import random
import threading
import time
from collections.abc import Sequence
from typing import Final

from evalstore.objects.existence_cache import Absence, ExistenceCache
from models.errors import ObjectStoreOutage, ObjectUnavailable
from models.logs import EventLogger
from models.record import EventRow
from worker.batches import BatchOutcome, Delivery, Pair
from worker.messages import cause, read_envelope
from worker.metrics import Outages

log = EventLogger("evalstore.worker")
_SOONEST_S: Final = 1.0
_LATEST_S: Final = 30.0
_OUTAGE_S: Final = 5.0
_OUTAGE_LATEST_S: Final = 300.0
# Retries of all messages that wait for the store are spread to this rate, which leaves room for events without objects.
_ROUNDS_PER_S: Final = 5_000
_WARN_EVERY_S: Final = 60.0


class ContentGate:
    """Decides which events can be stored. Any thread may use it."""

    def __init__(self, existence: ExistenceCache, outages: Outages, grace_s: float) -> None:
        self._existence, self._outages, self._grace_s = existence, outages, grace_s
        self._lock = threading.Lock()
        self._away = False
        self._next_due = 0.0
        self._next_warning = 0.0

    def is_ready(self, fact: EventRow) -> bool:
        """Return whether an event refers to no object, or only to objects that were seen a short time ago."""
        return all(self._existence.is_known(reference) for reference in fact.references)

    def split_ready(self, events: Sequence[Pair]) -> tuple[list[Pair], BatchOutcome]:
        """Look for objects. Return the events whose objects exist, and the outcomes of the other messages.

        Other messages are retried. If the object is still missing after the grace, the event becomes a dead letter.
        """
        absent = self._existence.missing(reference for _, fact in events for reference in fact.references)
        if not self._existence.stopping:  # A stop interrupts the look for objects, which is no outage.
            self._log_changes(self._existence.outage)
        found: list[Pair] = []
        outcome = BatchOutcome()
        for delivery, fact in events:
            absences = [absent[reference] for reference in fact.references if reference in absent]
            if not absences:
                found.append((delivery, fact))
                continue
            self._warn_refused(absences)
            missing = next((one for one in absences if _ends_with_grace(one)), None)
            wait_s = self._outage_s() if missing is None else _missing_s(delivery, self._grace_s)
            if missing is not None and wait_s is None:
                outcome.dead[delivery.redis_id] = cause(missing)
            else:
                outcome.retry_ms[delivery.redis_id] = int((wait_s or 0) * 1000)
        return found, outcome

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
        """Log when the store becomes unavailable, and when it is back."""
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
    """Return whether an event becomes a dead letter when its object is absent for longer than the grace."""
    return absence.needs_operator if isinstance(absence, ObjectUnavailable) else not isinstance(absence, ObjectStoreOutage)


def _missing_s(delivery: Delivery, grace_s: float) -> float | None:
    """Return how long to wait for a missing object: longer each time, and None after the grace.

    A message whose time lies beyond the grace in the future waits no longer: its sender's clock is wrong.
    """
    waited_s = time.time() - read_envelope(delivery.body).message_timestamp / 1000
    if abs(waited_s) >= grace_s:
        return None
    return min(max(_SOONEST_S, waited_s / 4), _LATEST_S, grace_s - waited_s)
