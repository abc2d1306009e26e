"""Content in an object store: put there once, by its hash, and read back with every byte checked before it leaves.

The same functions for a directory and for S3. All raise ObjectStoreOutage where the store cannot be reached, refuses work or
is not set up: wait and repeat the step. Every step may be repeated, and done by several at once.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from evalstore.objects.directory import DirectoryStore
from evalstore.objects.frames import Content, Encoder, Hasher, Index, Listed, State, index_bytes, read_index
from models.content import FRAME_BYTES, Reference
from models.errors import InvalidSettings, ObjectDamaged, ObjectMissing, ObjectStoreOutage
from models.settings import Settings, parse_store_url

if TYPE_CHECKING:
    from evalstore.objects.s3 import S3Store

Store: TypeAlias = "DirectoryStore | S3Store"
Place = Literal["objects", "archive"]

# What breaks off or is damaged on its way is asked for again this often; a store's client repeats what is refused by itself.
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
    """Where content is now; `new` unless it was there already."""

    reference: Reference
    new: bool


def open_store(url: str, settings: Settings, *, threads: int = 8, in_a_hurry: bool = False) -> Store:
    """The store at `file:///folder` or `s3://bucket/prefix`, for up to that many threads at once. Nothing is looked at yet.

    `in_a_hurry`: where somebody waits who can do without, S3 is given up on sooner. A process that forks opens its own.
    Raises ValueError for another address, InvalidSettings for S3 without boto3.
    """
    scheme, place, prefix = parse_store_url(url)
    if scheme == "file":
        return DirectoryStore(Path(place))
    try:
        from evalstore.objects.s3 import S3Store  # noqa: PLC0415  a gateway that uses a directory does without boto3
    except ModuleNotFoundError as error:
        raise InvalidSettings(f"an object store on S3 needs {error.name}: install evalstore[s3]") from None
    if in_a_hurry:
        return S3Store(place, prefix, settings, threads=threads, attempts=2, connect_timeout_s=2, read_timeout_s=10)
    return S3Store(place, prefix, settings, threads=threads)


def is_same(one: str, other: str) -> bool:
    """Whether two addresses are of one store. A directory may have several names."""
    (scheme, place, prefix), (other_scheme, other_place, other_prefix) = parse_store_url(one), parse_store_url(other)
    if scheme == other_scheme == "file":
        folder, other_folder = Path(place), Path(other_place)
        if folder.exists() and other_folder.exists():
            return folder.samefile(other_folder)
        return folder.resolve() == other_folder.resolve()
    return (scheme, place, prefix) == (other_scheme, other_place, other_prefix)


class Stores:
    """The stores that rows name, each opened at its first use. For many threads; a process that forks makes its own."""

    def __init__(self, settings: Settings, *, threads: int = 8, in_a_hurry: bool = False) -> None:
        self._settings, self._threads, self._in_a_hurry = settings, threads, in_a_hurry
        self._lock = threading.Lock()
        self._open: dict[str, Store] = {}

    def url(self, name: Place) -> str | None:
        """Where the store is that a row means by `name`."""
        archive = self._settings.archive_url if name == "archive" else None
        return archive or self._settings.object_store_url

    def __getitem__(self, name: Place) -> Store:
        """Raises ObjectStoreOutage where no setting says where it is: that can be mended."""
        url = self.url(name)
        if url is None:
            raise ObjectStoreOutage("there is no object store: set EVALSTORE_OBJECT_STORE_URL")
        with self._lock:
            if url not in self._open:
                self._open[url] = open_store(url, self._settings, threads=self._threads, in_a_hurry=self._in_a_hurry)
            return self._open[url]

    def close(self) -> None:
        """Close what was opened."""
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
    """Store content: bytes, a file open for reading, or its parts in order. When this returns it is there for good.

    What is there already stays: where its size and index are right, or with `replace_damaged` where every byte is; else it is
    replaced. One last modified before `touch_before` is made young again, so that no sweep takes it meanwhile. `sha256` is
    what the content is expected to be. A file or parts that are not in memory as a whole do not come to be: memory is bounded.

    Raises ObjectDamaged if the content is not what `sha256` says; nothing is stored then.
    """
    encoder = Encoder(content)
    seen: dict[Reference, State] = {}

    def look(reference: Reference) -> State:
        if sha256 is not None and reference.sha256 != sha256:
            raise ObjectDamaged(f"content to be stored has SHA-256 {reference.sha256}, expected {sha256}")
        if reference not in seen:
            seen[reference] = _state(store, reference, touch_before, replace_damaged)
        return seen[reference]

    new = store.write(encoder, look)
    if encoder.reference is None:
        raise AssertionError("an encoder that was read to its end knows what it encoded")
    return Put(encoder.reference, new)


def _state(store: Store, reference: Reference, touch_before: datetime | None, every_byte: bool) -> State:
    try:
        found = verify(store, reference) if every_byte else head(store, reference)
        if touch_before is not None and found.modified_at < touch_before:
            store.touch(reference.key)  # a sweep may have been faster
    except ObjectMissing:
        return "missing"
    except ObjectDamaged:
        return "damaged"
    return "intact"


def head(store: Store, reference: Reference) -> Listed:
    """The object, if its size, and the index of what is compressed, are those of the reference: one short request.

    Raises ObjectMissing, or ObjectDamaged.
    """
    return _open(store, reference)[1].listed


def verify(store: Store, reference: Reference) -> Listed:
    """The object, if every byte of it is right: it is read to its end. Raises ObjectMissing, or ObjectDamaged."""
    index, begun = _open(store, reference, with_body=True)
    for _ in _whole(store, index, begun):
        pass
    return begun.listed


def read(store: Store, reference: Reference) -> Iterator[bytes]:
    """The content, in chunks of up to 4 MiB: each is checked before it is given, and all of it before the last is.

    Raises ObjectMissing, or ObjectDamaged, here or while it is iterated over.
    """
    index, begun = _open(store, reference, with_body=True)
    return _whole(store, index, begun)


def read_range(store: Store, reference: Reference, start: int, stop: int) -> Iterator[bytes]:
    """Bytes `start` to `stop` of the content, in chunks of up to 4 MiB, each checked before it is given.

    Raises ObjectMissing, ObjectDamaged, here or while it is iterated over, or ValueError for a range that is none of it.
    """
    if not 0 <= start <= stop <= reference.size:
        raise ValueError(f"bytes {start} to {stop} are not within 0 to {reference.size}")
    index, begun = _open(store, reference, with_body=True)
    return _part(store, index, begun, start, stop)


class _Begun(NamedTuple):
    """What came with the index: of content under 4 MiB, the object itself."""

    listed: Listed
    stored: memoryview


def _open(store: Store, reference: Reference, *, with_body: bool = False) -> tuple[Index, _Begun]:
    wanted = index_bytes(reference.size) if reference.encoding == "zstd" else 1
    if with_body and reference.size < FRAME_BYTES:
        wanted += reference.size  # compressed it is not larger
    for attempt in range(1, _ATTEMPTS + 1):
        with store.open(reference.key, -wanted) as stream:
            try:
                lacks = stream.length < wanted and reference.size >= FRAME_BYTES  # not even an index: not worth the memory
                tail = stream.read(0 if lacks else min(wanted, stream.length))
                return read_index(reference, tail, stream.listed.size), _Begun(stream.listed, tail)
            except (ObjectDamaged, ObjectStoreOutage):
                if attempt == _ATTEMPTS:
                    raise
    raise AssertionError("the last attempt returns or raises")


def _whole(store: Store, index: Index, begun: _Begun) -> Iterator[bytes]:
    frames = _frames(store, index, begun, 0, index.frame_count)
    if index.reference.encoding == "identity" and index.frame_count:
        yield from frames  # all in one, checked by its SHA-256
        return
    with Hasher() as digest:
        for number, chunk in enumerate(frames, 1):
            digest.update(chunk)
            if number == index.frame_count:
                index.check_whole(digest.hexdigest())
            yield chunk
        if not index.frame_count:
            index.check_whole(digest.hexdigest())


def _part(store: Store, index: Index, begun: _Begun, start: int, stop: int) -> Iterator[bytes]:
    """Frame by frame, each asked for when it is wanted: meanwhile no connection, thread or memory waits for a slow reader."""
    for number in range(start // FRAME_BYTES, -(-stop // FRAME_BYTES) if start < stop else 0):
        frames = _frames(store, index, begun, number, number + 1)
        begun = begun._replace(stored=memoryview(b""))
        yield _only(frames, max(0, start - number * FRAME_BYTES), stop - number * FRAME_BYTES)


def _only(frames: Iterator[bytes], start: int, stop: int) -> bytes:
    (chunk,) = frames
    return chunk[start:stop]


def _frames(store: Store, index: Index, begun: _Begun, number: int, end: int) -> Iterator[bytes]:
    """Frames `number` to `end`, decoded. Where the stream breaks off, or brings what is wrong, it goes on with another."""
    offsets, key, failed = index.offsets, index.reference.key, 0
    if number < end and len(begun.stored) == begun.listed.size:
        try:
            chunk = index.decode(number, begun.stored[: offsets[1]])
        except ObjectDamaged:
            failed += 1
        else:
            yield chunk
            return
    longest = max((offsets[n + 1] - offsets[n] for n in range(number, end)), default=0)
    buffers = [bytearray(longest) for _ in range(min(2, end - number))]
    while number < end:
        # The next frame comes in while this one is checked, decoded and used.
        with store.open(key, offsets[number], offsets[end]) as stream, ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(stream.read, offsets[number + 1] - offsets[number], buffers[number % len(buffers)])
            while number < end:
                try:
                    stored = coming.result()
                    if number + 1 < end:
                        coming = ahead.submit(
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
