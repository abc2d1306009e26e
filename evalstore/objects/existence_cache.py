"""Whether objects that events refer to are there: asked before such an event is stored, and of each object not every time."""

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
# How long, and of how many, it is taken for granted that what was there still is: a sweep leaves what is young for days.
_KEEP_S: Final = 300.0
_MAX_KEPT: Final = 100_000
# A store that was away is left alone for so long, then one caller tries it for all.
_PAUSE_S: Final = 5.0
_LOOK_S: Final = 60.0

Absence = ObjectMissing | ObjectDamaged | ObjectStoreOutage


class ExistenceCache:
    """Looks for objects in the store that events are sent to. For many threads; a process that forks makes its own."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="evalstore-presence")
        self._seen: dict[Reference, float] = {}
        self._outage: ObjectStoreOutage | None = None
        self._rests_until = 0.0
        self.stopping = False  # set it, and nobody waits any more

    @property
    def outage(self) -> ObjectStoreOutage | None:
        """Why the store could not be asked the last time, if it could not."""
        return self._outage

    def is_known(self, reference: Reference) -> bool:
        """Whether it was there a short time ago."""
        return self._seen.get(reference, 0.0) > time.monotonic() - _KEEP_S

    def absent(self, references: Iterable[Reference], *, within_s: float = 10) -> dict[Reference, Absence]:
        """Those that are missing, damaged or refused, and all of which nothing is known because the store is away.

        Takes about `within_s`, or as long as one request takes to fail; what was not seen by then counts as an outage. Then for
        some seconds the store is not asked again: who has anything else to do is not held up by it.
        """
        wanted = [reference for reference in set(references) if not self.is_known(reference)]
        if not wanted:
            return {}
        with self._lock:
            if self._outage is not None:
                if time.monotonic() < self._rests_until:
                    return dict.fromkeys(wanted, self._outage)
                self._rests_until = time.monotonic() + _LOOK_S  # the others wait for what this one finds
        return self._look(wanted, within_s)

    def _look(self, wanted: list[Reference], within_s: float) -> dict[Reference, Absence]:
        failed: list[ObjectStoreOutage] = []
        looks = {self._pool.submit(self._head, reference, failed): reference for reference in wanted}
        until, pending = time.monotonic() + within_s, set(looks)
        while pending and not self.stopping and (left_s := until - time.monotonic()) > 0:
            _, pending = wait(pending, timeout=min(left_s, 0.5))
        found: dict[Reference, Absence] = {}
        for look, reference in looks.items():
            if (absence := _result(look)) is not None:
                found[reference] = absence
        outage = next((absence for absence in found.values() if _is_of_all(absence)), None)
        with self._lock:
            self._outage = outage
            self._rests_until = time.monotonic() + _PAUSE_S if outage else 0.0
        return found

    def _head(self, reference: Reference, failed: list[ObjectStoreOutage]) -> Absence | None:
        if failed:
            return failed[0]
        try:
            object_store.head(self._stores["objects"], reference)
        except (ObjectMissing, ObjectDamaged, ObjectUnavailable) as error:
            return error
        except (ObjectStoreOutage, InvalidSettings) as error:
            failed.append(error if isinstance(error, ObjectStoreOutage) else ObjectStoreOutage(str(error)))
            return failed[0]
        with self._lock:
            if len(self._seen) >= _MAX_KEPT:
                self._seen.clear()
            self._seen[reference] = time.monotonic()
        return None


def _is_of_all(absence: Absence) -> TypeGuard[ObjectStoreOutage]:
    return isinstance(absence, ObjectStoreOutage) and not isinstance(absence, ObjectUnavailable)


def _result(look: "Future[Absence | None]") -> Absence | None:
    if not look.done():
        look.cancel()
        return ObjectStoreOutage("the object store is slow: not every object was looked for in time")
    return look.result()
