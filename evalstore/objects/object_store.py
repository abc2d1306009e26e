"""Store content under its hash, and read it back with every byte checked.

The functions work for a directory and for S3. All raise ObjectStoreOutage if the store cannot be reached, refuses work or is
not configured: wait and repeat. All may be repeated, and called by several processes at once.
"""

import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from evalstore.objects.directory import DirectoryStore
from evalstore.objects.frames import Content, Encoder, Hasher, Index, Listed, State, index_bytes, read_index
from models.addresses import parse_store_url
from models.content import FRAME_BYTES, Reference
from models.errors import InvalidSettings, ObjectDamaged, ObjectMissing, ObjectStoreOutage
from models.extras import how_to_install
from models.settings import Settings

if TYPE_CHECKING:
    from evalstore.objects.s3 import S3Store

Store: TypeAlias = "DirectoryStore | S3Store"
Place = Literal["objects", "archive"]

# Attempts to read after an interrupted or damaged transfer. The S3 client repeats refused requests by itself.
_ATTEMPTS = 3

__all__ = [
    "Content",
    "Listed",
    "Place",
    "Put",
    "Reference",
    "Store",
    "Stores",
    "head",
    "is_same",
    "open_store",
    "put",
    "read",
    "read_range",
    "verify",
]


class Put(NamedTuple):
    """The reference of stored content. `new` is False if an intact object existed."""

    reference: Reference
    new: bool


def open_store(url: str, settings: Settings, *, threads: int = 8, in_a_hurry: bool = False) -> Store:
    """Open the store at `file:///folder` or `s3://bucket/prefix`, for up to `threads` threads. Sends no request.

    `in_a_hurry`: use shorter timeouts and fewer retries for S3, because a client waits. A process that forks opens its own.
    Raises ValueError for another address, InvalidSettings for S3 without boto3.
    """
    scheme, location, prefix = parse_store_url(url)
    if scheme == "file":
        return DirectoryStore(Path(location))
    try:
        from evalstore.objects.s3 import S3Store  # noqa: PLC0415  a directory needs no boto3
    except ModuleNotFoundError as error:
        raise InvalidSettings(how_to_install("s3")) from error
    if in_a_hurry:
        return S3Store(location, prefix, settings, threads=threads, attempts=2, connect_timeout_s=2, read_timeout_s=10)
    return S3Store(location, prefix, settings, threads=threads)


def is_same(url: str, other_url: str) -> bool:
    """Return whether two addresses lead to the same store. A directory may have several paths."""
    scheme, location, prefix = parse_store_url(url)
    other_scheme, other_location, other_prefix = parse_store_url(other_url)
    if scheme == other_scheme == "file":
        folder, other_folder = Path(location), Path(other_location)
        if folder.exists() and other_folder.exists():
            return folder.samefile(other_folder)
        return folder.resolve() == other_folder.resolve()
    return (scheme, location, prefix) == (other_scheme, other_location, other_prefix)


class Stores:
    """The stores `objects` and `archive`, opened at first use. Safe for many threads; a process that forks needs its own."""

    def __init__(self, settings: Settings, *, threads: int = 8, in_a_hurry: bool = False) -> None:
        self._settings, self._threads, self._in_a_hurry = settings, threads, in_a_hurry
        self._lock = threading.RLock()  # reentrant, because a signal handler may send
        self._open: dict[str, Store] = {}

    def url(self, name: Place) -> str | None:
        """Return the address of a store. The archive defaults to the object store."""
        archive = self._settings.archive_url if name == "archive" else None
        return archive or self._settings.object_store_url

    def __getitem__(self, name: Place) -> Store:
        """Return a store. Raises ObjectStoreOutage if no address is set: an operator can correct that."""
        url = self.url(name)
        if url is None:
            raise ObjectStoreOutage("there is no object store: set EVALSTORE_OBJECT_STORE_URL")
        with self._lock:
            if url not in self._open:
                self._open[url] = open_store(url, self._settings, threads=self._threads, in_a_hurry=self._in_a_hurry)
            return self._open[url]

    def close(self) -> None:
        """Close the open stores."""
        with self._lock:
            for store in self._open.values():
                store.close()
            self._open.clear()


def put(
    store: Store,
    content: Content,
    *,
    sha256: str | None = None,
    touch_before: datetime | None = None,
    replace_damaged: bool = False,
) -> Put:
    """Store content: bytes, an open file, or parts in order. It is durable when this returns. Memory use is bounded.

    An existing object stays if its size and index are right, or with `replace_damaged` if every byte is right. Otherwise it is
    replaced. An object last modified before `touch_before` is touched, so that no sweep removes it.

    Raises ObjectDamaged, and stores nothing, if the content does not have the expected `sha256`.
    """
    encoder = Encoder(content)
    states: dict[Reference, State] = {}

    def probe(reference: Reference) -> State:
        if sha256 is not None and reference.sha256 != sha256:
            raise ObjectDamaged(f"content to be stored has SHA-256 {reference.sha256}, expected {sha256}")
        if reference not in states:
            states[reference] = _state(store, reference, touch_before, replace_damaged)
        return states[reference]

    new = store.write(encoder, probe)
    if encoder.reference is None:
        raise AssertionError("an encoder has a reference after its last block")
    return Put(encoder.reference, new)


def _state(store: Store, reference: Reference, touch_before: datetime | None, check_content: bool) -> State:
    try:
        listed = verify(store, reference) if check_content else head(store, reference)
        if touch_before is not None and listed.modified_at < touch_before:
            store.touch(reference.key)  # raises ObjectMissing if a sweep was faster
    except ObjectMissing:
        return "missing"
    except ObjectDamaged:
        return "damaged"
    return "intact"


def head(store: Store, reference: Reference) -> Listed:
    """Check the size and index of an object with one short request. Raises ObjectMissing or ObjectDamaged."""
    return _open(store, reference)[1].listed


def verify(store: Store, reference: Reference) -> Listed:
    """Read and check every byte of an object. Raises ObjectMissing or ObjectDamaged."""
    index, tail = _open(store, reference, with_body=True)
    for _ in _whole(store, index, tail):
        pass
    return tail.listed


def read(store: Store, reference: Reference) -> Iterator[bytes]:
    """Return an iterator over the content, in chunks of up to 4 MiB. Each chunk is checked before it is yielded.

    The last chunk waits for the check of the whole. Raises ObjectMissing or ObjectDamaged, also while iterating.
    """
    index, tail = _open(store, reference, with_body=True)
    return _whole(store, index, tail)


def read_range(store: Store, reference: Reference, start: int, stop: int) -> Iterator[bytes]:
    """Return an iterator over bytes `start` to `stop` of the content, in checked chunks of up to 4 MiB.

    Raises ObjectMissing or ObjectDamaged, also while iterating. Raises ValueError for a range outside the content.
    """
    if not 0 <= start <= stop <= reference.size:
        raise ValueError(f"bytes {start} to {stop} are not within 0 to {reference.size}")
    index, tail = _open(store, reference, with_body=True)
    return _part(store, index, tail, start, stop)


class _Tail(NamedTuple):
    """The stored bytes read for the index. For content below 4 MiB they may be the whole object."""

    listed: Listed
    stored: memoryview


def _open(store: Store, reference: Reference, *, with_body: bool = False) -> tuple[Index, _Tail]:
    wanted = index_bytes(reference.size) if reference.encoding == "zstd" else 1
    if with_body and reference.size < FRAME_BYTES:
        wanted += reference.size  # an upper limit for the stored size
    for attempt in range(1, _ATTEMPTS + 1):
        with store.open(reference.key, -wanted) as stream:
            try:
                is_too_short = stream.length < wanted and reference.size >= FRAME_BYTES  # read nothing: the index is incomplete
                stored = stream.read(0 if is_too_short else min(wanted, stream.length))
                return read_index(reference, stored, stream.listed.size), _Tail(stream.listed, stored)
            except (ObjectDamaged, ObjectStoreOutage):
                if attempt == _ATTEMPTS:
                    raise
    raise AssertionError("the last attempt returns or raises")


def _whole(store: Store, index: Index, tail: _Tail) -> Iterator[bytes]:
    frames = _frames(store, index, tail, 0, index.frame_count)
    if index.reference.encoding == "identity" and index.frame_count:
        yield from frames  # one chunk, checked by its SHA-256
        return
    with Hasher() as hasher:
        for number, chunk in enumerate(frames, 1):
            hasher.update(chunk)
            if number == index.frame_count:
                index.check_whole(hasher.hexdigest())
            yield chunk
        if not index.frame_count:
            index.check_whole(hasher.hexdigest())


def _part(store: Store, index: Index, tail: _Tail, start: int, stop: int) -> Iterator[bytes]:
    """Request each frame when the reader wants it, so that no connection, thread or memory waits for a slow reader."""
    for number in range(start // FRAME_BYTES, -(-stop // FRAME_BYTES) if start < stop else 0):
        frames = _frames(store, index, tail, number, number + 1)
        tail = tail._replace(stored=memoryview(b""))
        yield _slice(frames, max(0, start - number * FRAME_BYTES), stop - number * FRAME_BYTES)


def _slice(frames: Iterator[bytes], start: int, stop: int) -> bytes:
    (chunk,) = frames
    return chunk[start:stop]


def _frames(store: Store, index: Index, tail: _Tail, number: int, end: int) -> Iterator[bytes]:
    """Yield frames `number` to `end`, decoded. After an interrupted or damaged transfer, continue with a new request."""
    offsets, key, failed = index.offsets, index.reference.key, 0
    if number < end and len(tail.stored) == tail.listed.size:
        try:
            chunk = index.decode(number, tail.stored[: offsets[1]])
        except ObjectDamaged:
            failed += 1
        else:
            yield chunk
            return
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415  cannot be imported at exit, where senders only write

    longest = max((offsets[n + 1] - offsets[n] for n in range(number, end)), default=0)
    buffers = [bytearray(longest) for _ in range(min(2, end - number))]
    while number < end:
        # Read the next frame while the current one is checked, decoded and used.
        with store.open(key, offsets[number], offsets[end]) as stream, ThreadPoolExecutor(1) as executor:
            reading = executor.submit(stream.read, offsets[number + 1] - offsets[number], buffers[number % len(buffers)])
            while number < end:
                try:
                    stored = reading.result()
                    if number + 1 < end:
                        reading = executor.submit(
                            stream.read, offsets[number + 2] - offsets[number + 1], buffers[(number + 1) % len(buffers)]
                        )
                    chunk = index.decode(number, stored)
                except (ObjectDamaged, ObjectStoreOutage):
                    failed += 1
                    if failed == _ATTEMPTS:
                        raise
                    break
                yield chunk
                number, failed = number + 1, 0
