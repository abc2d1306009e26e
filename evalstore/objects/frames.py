"""The format of an object: its name, its frames, and an index that allows to check ranges.

`<sha256>` holds content below 4 MiB unchanged, if compression saves less than a sixteenth.

`<sha256>.zst` holds all other content. Each 4 MiB are a zstd frame. Two skippable frames (RFC 8878, 3.1.2) follow:
- our index: the SHA-256 and size of the content, and the XXH3-128 of every frame as stored;
- the seek table of the zstd seekable format
  (https://github.com/facebook/zstd/blob/dev/contrib/seekable_format/zstd_seekable_compression_format.md).
So `zstd -d` reads the whole, and programs that know the seekable format read a part.

Both names are the SHA-256 of the content before compression. A read of the whole is checked against the name. A single frame is
checked against the index, which detects damage but not forgery. For this, XXH3
(https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md) takes a sixtieth of the time of SHA-256.
"""

import hashlib
import re
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from itertools import accumulate, pairwise
from typing import BinaryIO, Literal, NamedTuple, Protocol, Self

import xxhash

from models import threads
from models.content import FRAME_BYTES, Reference
from models.errors import ObjectDamaged, ObjectStoreOutage

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_LEVEL = 3
_WINDOW_LOG_MAX = 23  # limits the decoder's memory; our frames need 22
_READ_BYTES = 256 * 1024  # HTTP clients copy each read several times
_KEY = re.compile(r"[0-9a-f]{64}(?:\.zst)?", re.ASCII)
_OURS, _SEEK_TABLE, _SEEKABLE = 0x184D2A50, 0x184D2A5E, 0x8F92EAB1
_VERSION = b"EVS2"
_SHA256_BYTES, _DIGEST_BYTES = 32, 16
_OURS_BYTES = len(_VERSION) + _SHA256_BYTES + 8 + _DIGEST_BYTES  # without the digests of the frames

Content = bytes | BinaryIO | Iterable[bytes]
State = Literal["intact", "damaged", "missing"]


class Listed(NamedTuple):
    """An object as its store lists it. `size` counts the stored bytes."""

    key: str
    size: int
    modified_at: datetime


def is_key(name: str) -> bool:
    """Return whether an object of ours may have this name. The store may hold other files."""
    return _KEY.fullmatch(name) is not None


class Encoder:
    """Encode content as blocks to store. Iterate once.

    `reference` is set after the last block; for bytes of 4 MiB and more, at once.
    """

    reference: Reference | None = None

    def __init__(self, content: Content) -> None:
        self._content = content
        if isinstance(content, bytes) and len(content) >= FRAME_BYTES:
            self.reference = Reference(hashlib.sha256(content).hexdigest(), len(content), "zstd")

    def __iter__(self) -> Iterator[bytes | memoryview]:
        with Hasher() as hasher:
            yield from self._blocks(hasher)

    def _blocks(self, hasher: "Hasher") -> Iterator[bytes | memoryview]:
        known, size = self.reference, 0
        lengths: list[int] = []
        digests: list[bytes] = []
        for piece in _pieces(self._content):
            if known is None:
                hasher.update(piece)
            stored = _compress(piece)
            if not size and len(piece) < FRAME_BYTES and len(stored) + index_bytes(len(piece)) > len(piece) * 15 // 16:
                yield piece
                self.reference = Reference(hasher.hexdigest(), len(piece), "identity")
                return
            size += len(piece)
            lengths.append(len(stored))
            digests.append(_digest(stored))
            yield stored
            del piece, stored  # before the next piece is read
        self.reference = known or Reference(hasher.hexdigest(), size, "zstd" if size else "identity")
        if size:
            yield _pack(self.reference, lengths, digests)


def _pieces(content: Content) -> Iterator[bytes | memoryview]:
    """Yield the content in pieces of 4 MiB. Only the last may be shorter, and none is empty."""
    if isinstance(content, bytes):
        view = memoryview(content)
        yield from (view[start : start + FRAME_BYTES] for start in range(0, len(view), FRAME_BYTES))
        return
    chunks = content if not hasattr(content, "read") else iter(lambda: content.read(FRAME_BYTES), b"")
    buffer = bytearray()
    for chunk in chunks:
        if not buffer and len(chunk) == FRAME_BYTES:
            yield chunk
            continue
        for start in range(0, len(chunk), FRAME_BYTES):
            buffer += memoryview(chunk)[start : start + FRAME_BYTES]
            if len(buffer) >= FRAME_BYTES:
                yield bytes(memoryview(buffer)[:FRAME_BYTES])
                buffer = buffer[FRAME_BYTES:]
    if buffer:
        yield bytes(buffer)


class Hasher:
    """Compute the SHA-256 of pieces in order. A thread hashes each large piece while the caller compresses or sends it.

    It keeps one piece at a time in memory.
    """

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._hashing: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()

    def update(self, piece: bytes | memoryview) -> None:
        """Add the next piece. The caller must not change it afterwards."""
        self._wait()
        if len(piece) >= FRAME_BYTES:
            self._hashing = threads.start(self._sha256.update, piece)
        if self._hashing is None:
            self._sha256.update(piece)

    def hexdigest(self) -> str:
        """Return the SHA-256 of all pieces so far."""
        self._wait()
        return self._sha256.hexdigest()

    def _wait(self) -> None:
        if self._hashing is not None:
            self._hashing.join()
            self._hashing = None


def _compress(piece: bytes | memoryview) -> bytes:
    options: dict[int, int] = {zstd.CompressionParameter.compression_level: _LEVEL, zstd.CompressionParameter.checksum_flag: 1}
    return zstd.compress(piece, options=options)


def _digest(stored: bytes | memoryview) -> bytes:
    return xxhash.xxh3_128_digest(stored)


def _frame_count(size: int) -> int:
    return -(-size // FRAME_BYTES)


def index_bytes(size: int) -> int:
    """Return the length of the index for `size` bytes of content."""
    count = _frame_count(size)
    return (8 + _OURS_BYTES + count * _DIGEST_BYTES) + (8 + (count + 1) * 8 + 9)


def _pack(reference: Reference, lengths: list[int], digests: list[bytes]) -> bytes:
    """Encode the index. The last 16 bytes of our skippable frame are the XXH3-128 of the rest of the index."""
    count, ours = len(lengths), _OURS_BYTES + len(digests) * _DIGEST_BYTES
    head = struct.pack("<II", _OURS, ours) + _VERSION
    head += bytes.fromhex(reference.sha256) + struct.pack("<Q", reference.size) + b"".join(digests)
    # The seek table has an entry for each earlier frame, and an entry for our skippable frame.
    sizes = [*[FRAME_BYTES] * (count - 1), reference.size - FRAME_BYTES * (count - 1), 0]
    table = struct.pack("<II", _SEEK_TABLE, (count + 1) * 8 + 9)
    table += b"".join(struct.pack("<II", *entry) for entry in zip([*lengths, 8 + ours], sizes, strict=True))
    table += struct.pack("<IBI", count + 1, 0, _SEEKABLE)
    return head + _digest(head + table) + table


class Index(NamedTuple):
    """The offsets of an object's frames, with the end of the last, and their XXH3-128. Uncompressed content is one frame."""

    reference: Reference
    offsets: list[int]
    digests: list[bytes]

    @property
    def frame_count(self) -> int:
        return len(self.offsets) - 1

    def decode(self, number: int, stored: bytes | memoryview) -> bytes:
        """Check and decompress frame `number`. Raises ObjectDamaged."""
        if self.reference.encoding == "identity":
            self.check_whole(hashlib.sha256(stored).hexdigest())
            return bytes(stored)
        if _digest(stored) != self.digests[number]:
            raise ObjectDamaged(f"object {self.reference.key}: frame {number} differs from the stored frame")
        size = min(FRAME_BYTES, self.reference.size - number * FRAME_BYTES)
        decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX})
        try:
            # Allow one byte more, to detect a frame that holds too much.
            content = decoder.decompress(stored, max_length=size + 1)
        except zstd.ZstdError as error:
            raise ObjectDamaged(f"object {self.reference.key}: frame {number}: {error}") from None
        if len(content) != size or not decoder.eof or decoder.unused_data:
            raise ObjectDamaged(f"object {self.reference.key}: frame {number} does not hold {size:,} bytes")
        return content

    def check_whole(self, sha256: str) -> None:
        """Raise ObjectDamaged unless the content has this SHA-256."""
        if sha256 != self.reference.sha256:
            raise ObjectDamaged(f"object {self.reference.key}: its content has SHA-256 {sha256}")


def read_index(reference: Reference, tail: bytes | memoryview, stored_size: int) -> Index:
    """Decode the index at the end of `tail`. Raises ObjectDamaged unless it fits the reference and `stored_size`."""
    if reference.encoding == "identity":
        if stored_size != reference.size or stored_size >= FRAME_BYTES:
            raise ObjectDamaged(f"object {reference.key}: {stored_size:,} bytes, expected {reference.size:,}, under 4 MiB")
        return Index(reference, [0, stored_size] if stored_size else [0], [])
    count, length = _frame_count(reference.size), index_bytes(reference.size)
    index = bytes(tail[-length:])
    if count and len(index) == length:
        start = 8 + len(_VERSION) + _SHA256_BYTES + 8
        digests = [index[start + i * _DIGEST_BYTES :][:_DIGEST_BYTES] for i in range(count)]
        entries = struct.unpack_from(f"<{count * 2}I", index, length - 9 - (count + 1) * 8)
        offsets = list(accumulate(entries[::2], initial=0))
        # Encode the decoded values again: this detects every changed bit.
        is_valid = index == _pack(reference, list(entries[::2]), digests) and offsets[-1] + length == stored_size
        if is_valid and max(stop - start for start, stop in pairwise(offsets)) <= FRAME_BYTES + FRAME_BYTES // 64:
            return Index(reference, offsets, digests)
    raise ObjectDamaged(f"object {reference.key}: its index is damaged, or belongs to other content")


class Body(Protocol):
    """An open file, or the body of an HTTP response."""

    def read(self, amount: int, /) -> bytes: ...

    def close(self) -> object: ...


class Stream(AbstractContextManager["Stream"]):
    """A stream of `length` stored bytes of an object."""

    def __init__(
        self, body: Body, *, listed: Listed, length: int, errors: Callable[[str, str], AbstractContextManager[None]]
    ) -> None:
        self._body, self._errors = body, errors
        self.listed, self.length = listed, length

    def read(self, amount: int, into: bytearray | None = None) -> memoryview:
        """Read exactly `amount` bytes. Raises ObjectStoreOutage if the stream ends early: open another from that position."""
        data, filled = memoryview(bytearray(amount) if into is None else into)[:amount], 0
        with self._errors("read", self.listed.key):
            while filled < amount and (chunk := self._body.read(min(amount - filled, _READ_BYTES))):
                data[filled : filled + len(chunk)] = chunk
                filled += len(chunk)
        if filled < amount:
            raise ObjectStoreOutage(f"object {self.listed.key}: the stream ended early")
        return data

    def __exit__(self, *_: object) -> None:
        self._body.close()
