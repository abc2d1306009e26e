"""Keeping the objects of events that wait in this machine's spool from the sweep, which knows nothing of them."""

import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from dramatiq.logging import get_logger

from models.content import objects_named
from models.errors import InvalidSettings, ObjectMissing, ObjectStoreOutage, ObjectUnavailable
from models.settings import Settings

if TYPE_CHECKING:
    from evalstore.objects.object_store import Store

_AGAIN_S: Final = 60.0

_logger = get_logger("tasks", "spool")


class ObjectToucher:
    """Call it with messages as often as you like: now and then it makes young what they need and is half as old as the grace.

    So it stays younger than the grace for as long as the outage lasts and this is called.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._grace = timedelta(days=settings.sweep_grace_days)
        self._rests_until = 0.0

    def __call__(self, lines: Iterable[bytes]) -> None:
        if self._settings.object_store_url is None or time.monotonic() < self._rests_until:
            return
        self._rests_until = time.monotonic() + self._grace.total_seconds() / 8
        named = {sha256.hex() for line in lines for sha256 in objects_named(line)}
        if not named:
            return
        try:
            from evalstore.objects.object_store import open_store  # a sender of small events never loads it

            store = open_store(self._settings.object_store_url, self._settings, in_a_hurry=True)
            try:
                for sha256 in sorted(named):
                    self._keep(store, sha256)
            finally:
                store.close()
        except (ObjectStoreOutage, InvalidSettings) as error:
            _logger.warning("the objects of events in the spool could not be looked after: %s", error)
            self._rests_until = time.monotonic() + _AGAIN_S

    def _keep(self, store: "Store", sha256: str) -> None:
        found = False
        for key in (f"{sha256}.zst", sha256):  # a line that is damaged does not say which
            try:
                with store.open(key, -1) as stream:
                    is_old = stream.listed.modified_at < datetime.now(UTC) - self._grace / 2
                if is_old:
                    store.touch(key)
                found = True
            except ObjectMissing:
                continue
            except ObjectUnavailable as error:
                _logger.warning("the objects of events in the spool could not be looked after: %s", error)
                found = True
        if not found:
            _logger.error("object %s, which an event in the spool needs, is gone", sha256)
