"""Check that the objects that events refer to exist, before the events are stored. Results are cached."""

import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, TypeGuard

from evalstore.objects import object_store
from evalstore.objects.object_store import Stores
from models.content import Reference
from models.errors import InvalidSettings, ObjectDamaged, ObjectMissing, ObjectStoreOutage, ObjectUnavailable

_THREADS: Final = 8
# An object that was seen is taken to exist for this time. The sweep keeps new objects for days.
_CACHE_TTL_S: Final = 300.0
_CACHE_ENTRIES: Final = 100_000
# After an outage, one caller tries the store again after this time.
_RETRY_AFTER_S: Final = 5.0
# Limit for that trial, during which other callers get the known outage.
_TRIAL_S: Final = 60.0

Absence = ObjectMissing | ObjectDamaged | ObjectStoreOutage


class ExistenceCache:
    """Check objects in the store for large content. Safe for many threads; a process that forks needs its own."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="evalstore-presence")
        self._seen: dict[Reference, float] = {}
        self._outage: ObjectStoreOutage | None = None
        self._retry_at = 0.0
        self.stopping = False  # set to True to end all waits

    @property
    def outage(self) -> ObjectStoreOutage | None:
        """The outage at the last check, or None."""
        return self._outage

    def is_known(self, reference: Reference) -> bool:
        """Return whether the object was seen recently."""
        return self._seen.get(reference, 0.0) > time.monotonic() - _CACHE_TTL_S

    def missing(self, references: Iterable[Reference], *, timeout_s: float = 10) -> dict[Reference, Absence]:
        """Return the objects that are missing, damaged or refused, each with its error; in an outage, all unknown objects.

        Takes about `timeout_s`, or the time of one failing request. An object not checked by then counts as an outage. After an
        outage, calls return at once for some seconds, so that callers can do other work.
        """
        unknown = [reference for reference in set(references) if not self.is_known(reference)]
        if not unknown:
            return {}
        with self._lock:
            if self._outage is not None:
                if time.monotonic() < self._retry_at:
                    return dict.fromkeys(unknown, self._outage)
                self._retry_at = time.monotonic() + _TRIAL_S  # Other callers do not try until then.
        return self._check(unknown, timeout_s)

    def _check(self, references: list[Reference], timeout_s: float) -> dict[Reference, Absence]:
        outages: list[ObjectStoreOutage] = []
        checks = {self._pool.submit(self._head, reference, outages): reference for reference in references}
        deadline, pending = time.monotonic() + timeout_s, set(checks)
        while pending and not self.stopping and (remaining_s := deadline - time.monotonic()) > 0:
            _, pending = wait(pending, timeout=min(remaining_s, 0.5))
        absences: dict[Reference, Absence] = {}
        for check, reference in checks.items():
            if (absence := _result(check)) is not None:
                absences[reference] = absence
        outage = next((absence for absence in absences.values() if _is_outage(absence)), None)
        with self._lock:
            self._outage = outage
            self._retry_at = time.monotonic() + _RETRY_AFTER_S if outage else 0.0
        return absences

    def _head(self, reference: Reference, outages: list[ObjectStoreOutage]) -> Absence | None:
        if outages:
            return outages[0]
        try:
            object_store.head(self._stores["objects"], reference)
        except (ObjectMissing, ObjectDamaged, ObjectUnavailable) as error:
            return error
        except (ObjectStoreOutage, InvalidSettings) as error:
            outages.append(error if isinstance(error, ObjectStoreOutage) else ObjectStoreOutage(str(error)))
            return outages[0]
        with self._lock:
            if len(self._seen) >= _CACHE_ENTRIES:
                self._seen.clear()
            self._seen[reference] = time.monotonic()
        return None


def _is_outage(absence: Absence) -> TypeGuard[ObjectStoreOutage]:
    return isinstance(absence, ObjectStoreOutage) and not isinstance(absence, ObjectUnavailable)


def _result(check: "Future[Absence | None]") -> Absence | None:
    if not check.done():
        check.cancel()
        return ObjectStoreOutage("the object store is slow: not every object was checked in time")
    return check.result()
