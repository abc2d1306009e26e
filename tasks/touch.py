"""Keep objects that spooled events refer to. The sweep of the object store cannot see this machine's spool."""

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

_RETRY_AFTER_S: Final = 60.0

_logger = get_logger("tasks", "spool")


class ObjectToucher:
    """Touch the objects of spooled messages that are older than half the sweep's grace.

    It may be called often: it works once in an eighth of the grace. So no object reaches the grace while the outage lasts.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._grace = timedelta(days=settings.sweep_grace_days)
        self._next_run_at = 0.0

    def __call__(self, lines: Iterable[bytes]) -> None:
        if self._settings.object_store_url is None or time.monotonic() < self._next_run_at:
            return
        self._next_run_at = time.monotonic() + self._grace.total_seconds() / 8
        names = {sha256.hex() for line in lines for sha256 in objects_named(line)}
        if not names:
            return
        try:
            from evalstore.objects.object_store import open_store  # a sender of small events never loads it

            store = open_store(self._settings.object_store_url, self._settings, in_a_hurry=True)
            try:
                for sha256 in sorted(names):
                    self._touch(store, sha256)
            finally:
                store.close()
        except (ObjectStoreOutage, InvalidSettings) as error:
            _logger.warning("cannot touch the objects of spooled events: %s", error)
            self._next_run_at = time.monotonic() + _RETRY_AFTER_S

    def _touch(self, store: "Store", sha256: str) -> None:
        is_missing = True
        for key in (f"{sha256}.zst", sha256):  # a damaged line may not show the encoding
            try:
                with store.open(key, -1) as stream:
                    is_old = stream.listed.modified_at < datetime.now(UTC) - self._grace / 2
                if is_old:
                    store.touch(key)
                is_missing = False
            except ObjectMissing:
                continue
            except ObjectUnavailable as error:
                _logger.warning("cannot touch the objects of spooled events: %s", error)
                is_missing = False
        if is_missing:
            _logger.error("object %s of a spooled event is missing from the object store", sha256)
