"""Uploads of large content: it goes to the object store before its event, which carries a reference.

The object store's modules are imported at the first upload. A sender of small events never loads them.
"""

import base64
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from models import content
from models.errors import Fault, InvalidEvent, ObjectStoreOutage, ObjectUnavailable, SendRefused
from models.events import CONTENT_FIELDS
from models.settings import Settings
from models.threads import in_threads, once_at_a_time

with suppress(RuntimeError):  # the interpreter ends
    # boto3 and redis import this module. Python refuses to import it once the main thread has ended.
    import concurrent.futures.thread  # noqa: F401

if TYPE_CHECKING:
    from evalstore.objects.object_store import Store
    from models.content import Reference

# The largest content that travels through Redis when no object store is set or reachable.
MAX_INLINE_BYTES: Final = 1024 * 1024
_UPLOAD_THREADS: Final = 4
_UPLOAD: Final = "put content into the object store"
# After an outage the store is tried again after this time. Until then each upload fails at once.
_RETRY_AFTER_S: Final = 2.0

Json = dict[str, Any]


def check_sizes(event: Json) -> None:
    """Raise InvalidEvent for content that is too large to travel without an object store."""
    faults = [
        Fault(name, f"{size:,} bytes, expected at most {MAX_INLINE_BYTES:,} unless EVALSTORE_OBJECT_STORE_URL is set")
        for name, size in _larger_than(event, MAX_INLINE_BYTES)
    ]
    if faults:
        raise InvalidEvent(faults)


class Uploader:
    """Upload the large content of events. Safe for many threads; a process that forks needs its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._store: Store | None = None
        # A sweep could remove an object older than this before its event is stored.
        self._max_age = timedelta(days=settings.sweep_grace_days / 2)
        self._outage: ObjectStoreOutage | None = None
        self._retry_at = 0.0

    def offload(self, events: Sequence[Json]) -> None:
        """Replace content above the inline limit by references, once the object store has it.

        During an outage of the store, content up to 1 MiB stays inline. Larger content raises ObjectStoreOutage within half a
        minute, and leaves the events unchanged: send them again. Uploads that succeeded are reused then.
        """
        if self._settings.object_store_url is None:
            return
        limit = self._settings.inline_limit_bytes
        large = [(event, name, size) for event in events for name, size in _larger_than(event, limit)]
        if not large:
            return

        def upload(item: tuple[Json, str, int]) -> "Reference | None":
            event, name, size = item
            try:
                with once_at_a_time(_UPLOAD):
                    return self.put(_content_bytes(event, name))
            except (ObjectStoreOutage, SendRefused):
                if size > MAX_INLINE_BYTES:
                    raise
                return None

        with suppress(ObjectStoreOutage, SendRefused), once_at_a_time(_UPLOAD):
            self._open()  # Open once, before several threads upload.
        references = in_threads(upload, large, _UPLOAD_THREADS)
        for (event, name, _), reference in zip(large, references, strict=True):
            if reference is not None:
                event.pop(name, None)
                event.pop(f"{name}_b64", None)
                event[f"{name}_ref"] = reference._asdict()

    def put(self, data: bytes) -> "Reference":
        """Store `data` and return its reference. Raises ObjectStoreOutage."""
        if (outage := self._outage) is not None and time.monotonic() < self._retry_at:
            raise ObjectStoreOutage(str(outage)) from outage
        store = self._open()
        from evalstore.objects.object_store import put

        try:
            stored = put(store, data, touch_before=datetime.now(UTC) - self._max_age)
        except ObjectUnavailable:
            raise  # The store still accepts other objects.
        except ObjectStoreOutage as error:
            self._retry_at = time.monotonic() + _RETRY_AFTER_S
            self._outage = error
            raise
        self._outage = None
        return stored.reference

    def _open(self) -> "Store":
        if self._store is None:
            from evalstore.objects.object_store import Stores

            self._store = Stores(self._settings, threads=_UPLOAD_THREADS, in_a_hurry=True)["objects"]
        return self._store


# An exit function that sends must run before the finalizers of urllib3's connections. The first finalizer that a process
# registers decides when all of them run. This one is registered before the exit function.
weakref.finalize(Uploader, lambda: None)


def _larger_than(event: Json, limit: int) -> Iterator[tuple[str, int]]:
    """Yield the name and size in bytes of each content above `limit`."""
    for name in CONTENT_FIELDS[event["type"]]:
        text, b64 = event.get(name), event.get(f"{name}_b64")
        if text is not None and len(text) * 4 > limit:
            size = len(text) if text.isascii() else len(content.to_bytes(text))
        elif b64 is not None:
            size = len(b64) * 3 // 4 - b64[-2:].count("=")
        else:
            continue
        if size > limit:
            yield name, size


def _content_bytes(event: Json, name: str) -> bytes:
    text = event.get(name)
    return content.to_bytes(text) if text is not None else base64.b64decode(event[f"{name}_b64"])
