"""Large content on its way: it goes to the object store first, and its event carries a reference to it.

What that needs is imported at the first large content: a sender of small events never loads it.
"""

import base64
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from models import content
from models.errors import Fault, InvalidEvent, ObjectStoreOutage, ObjectUnavailable, SendRefused
from models.events import CONTENT_FIELDS
from models.settings import settings
from models.threads import in_threads, once_at_a_time

with suppress(RuntimeError):  # the interpreter ends
    # Boto3 and redis import this. Python refuses that once the main thread has ended.
    import concurrent.futures.thread  # noqa: F401

if TYPE_CHECKING:
    from models.content import Reference

# The most that travels through Redis where there is no object store, or none that can be reached.
INLINE_MOST_BYTES: Final = 1024 * 1024
_UPLOADS_AT_ONCE: Final = 4
_UPLOAD: Final = "put content into the object store"
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

    def put(one: tuple[Travelling, str, int]) -> "Reference | None":
        event, name, size = one
        try:
            with once_at_a_time(_UPLOAD):
                return _objects().put(_bytes(event, name))
        except (ObjectStoreOutage, SendRefused):
            if size > INLINE_MOST_BYTES:
                raise
            return None

    with suppress(ObjectStoreOutage, SendRefused), once_at_a_time(_UPLOAD):
        _objects()  # by this thread, before several ask for it
    references = in_threads(put, large, _UPLOADS_AT_ONCE)
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
        self._outage: tuple[ObjectStoreOutage, float] | None = None  # and until when the store rests

    def put(self, data: bytes) -> "Reference":
        """Raises ObjectStoreOutage."""
        if (outage := self._outage) is not None and time.monotonic() < outage[1]:
            raise ObjectStoreOutage(str(outage[0])) from outage[0]
        try:
            found = self._put(self._store, data, touch_before=datetime.now(UTC) - self._fresh)
        except ObjectUnavailable:
            raise  # other objects can be put
        except ObjectStoreOutage as error:
            self._outage = error, time.monotonic() + _REST_S
            raise
        self._outage = None
        return found.reference


@cache
def _objects() -> _Objects:
    return _Objects()


# An exit function that sends must run before the finalizers of urllib3's connections. The first finalizer of a process
# decides when they all run: this one, as the exit function is registered later.
weakref.finalize(_Objects, lambda: None)


def forget() -> None:
    """Open the store anew at the next large content: in a process that forked, connections are not its own."""
    _objects.cache_clear()


os.register_at_fork(after_in_child=forget)
