"""Large content on its way: it goes to the object store first, and its event carries a reference to it.

What that needs is imported at the first large content: a sender of small events never loads it.
"""

import base64
import os
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from models import content
from models.errors import Fault, InvalidEvent, ObjectStoreOutage, ObjectUnavailable
from models.events import CONTENT_FIELDS
from models.settings import settings

if TYPE_CHECKING:
    from models.content import Reference

# The most that travels through Redis where there is no object store, or none that can be reached.
INLINE_MOST_BYTES: Final = 1024 * 1024
_UPLOADS_AT_ONCE: Final = 4
# A store that was away is tried again after so long; meanwhile nobody waits for it.
_REST_S: Final = 2.0

Travelling = dict[str, Any]


def check_sizes(event: Travelling) -> None:
    """Raises InvalidEvent for content that is too large to travel, where there is no object store to take it."""
    if settings().object_store_url is None:
        raise_for = [
            Fault(name, f"{size:,} bytes, expected at most {INLINE_MOST_BYTES:,} unless EVALSTORE_OBJECT_STORE_URL is set")
            for name, size in _sizes(event, INLINE_MOST_BYTES)
        ]
        if raise_for:
            raise InvalidEvent(raise_for)


def offload(events: Sequence[Travelling]) -> None:
    """Put what is over the inline limit into the object store, and references in its place. When this returns it is there.

    With the store away, content of up to 1 MiB goes inline. Raises ObjectStoreOutage, within half a minute, for what is larger:
    then no event is changed that needs to be sent again, and what was put is found there the next time.
    """
    if settings().object_store_url is None:
        return
    large = [(event, name, size) for event in events for name, size in _sizes(event, settings().inline_limit_bytes)]
    if not large:
        return
    objects = _objects()

    def put(one: tuple[Travelling, str, int]) -> "Reference | None":
        event, name, size = one
        try:
            return objects.put(_bytes(event, name))
        except ObjectStoreOutage:
            if size > INLINE_MOST_BYTES:
                raise
            return None

    if len(large) == 1:
        references = [put(large[0])]
    else:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(min(_UPLOADS_AT_ONCE, len(large))) as threads:
            references = list(threads.map(put, large))
    for (event, name, _), reference in zip(large, references, strict=True):
        if reference is not None:
            event.pop(name, None)
            event.pop(f"{name}_b64", None)
            event[f"{name}_ref"] = reference._asdict()


def _sizes(event: Travelling, limit: int) -> Iterator[tuple[str, int]]:
    """The contents of an event that are larger than `limit`, and how large."""
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


def _bytes(event: Travelling, name: str) -> bytes:
    text = event.get(name)
    return content.to_bytes(text) if text is not None else base64.b64decode(event[f"{name}_b64"])


class _Objects:
    """The object store of this process's settings. For many threads."""

    def __init__(self) -> None:
        from evalstore.objects.object_store import Stores, put

        self._put = put
        self._store = Stores(settings(), threads=_UPLOADS_AT_ONCE, in_a_hurry=True)["objects"]
        # What is half as old as a sweep would take may be gone by the time that its event is stored.
        self._fresh = timedelta(days=settings().sweep_grace_days / 2)
        self._lock = threading.Lock()
        self._outage: ObjectStoreOutage | None = None
        self._rests_until = 0.0

    def put(self, data: bytes) -> "Reference":
        """Raises ObjectStoreOutage."""
        with self._lock:
            if self._outage is not None and time.monotonic() < self._rests_until:
                raise ObjectStoreOutage(str(self._outage)) from self._outage
        try:
            found = self._put(self._store, data, touch_before=datetime.now(UTC) - self._fresh)
        except ObjectUnavailable:
            raise  # other objects can be put
        except ObjectStoreOutage as error:
            with self._lock:
                self._outage, self._rests_until = error, time.monotonic() + _REST_S
            raise
        with self._lock:
            self._outage = None
        return found.reference


@cache
def _objects() -> _Objects:
    return _Objects()


def forget() -> None:
    """Open the store anew at the next large content: in a process that forked, connections are not its own."""
    _objects.cache_clear()


os.register_at_fork(after_in_child=forget)
