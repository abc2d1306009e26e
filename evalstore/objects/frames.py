"""The form content has in an object store: its name, its frames, and the index by which ranges are checked.

`<sha256>` holds content as it is: under 4 MiB, and compression does not help. Its name is its checksum.

`<sha256>.zst` holds everything else: each 4 MiB of content as a zstd frame of its own (of raw blocks where they do not
compress), then the index in two skippable frames (RFC 8878, 3.1.2): ours, with the content's SHA-256 and size
and the XXH3-128 of every frame as stored, and the seek table of the zstd seekable format
(https://github.com/facebook/zstd/blob/dev/contrib/seekable_format/zstd_seekable_compression_format.md). So `zstd -d` reads
the whole, and whatever knows that format reads a part.

Both names are the SHA-256 of the content before compression, by which a whole is checked. A frame by itself has only what the
object says of it, whatever the hash. Against damage, XXH3 (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md) does
as well for a sixtieth of the time.
"""

import hashlib
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import datetime
from itertools import accumulate, pairwise
from typing import BinaryIO, Literal, NamedTuple, Protocol, Self

import xxhash

from models.content import FRAME_BYTES, Reference
from models.errors import ObjectDamaged, ObjectStoreOutage

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_LEVEL = 3
# Where the last frame did not shrink, a part of the next tells whether it will: trying costs as much as hashing it. A stretch
# of a 64th of it that compresses well is met by enough of them.
_SAMPLES, _SAMPLE_BYTES = 64, 1024
_RAW_BLOCK_BYTES = 128 * 1024
_WINDOW_LOG_MAX = 23  # no frame of ours needs more; what a frame may make the decoder allocate
_READ_BYTES = 256 * 1024  # from a connection, whose client would hold more of it several times
_KEY = re.compile(r"[0-9a-f]{64}(?:\.zst)?", re.ASCII)
_ZSTD = 0xFD2FB528
_OURS, _SEEK_TABLE, _SEEKABLE = 0x184D2A50, 0x184D2A5E, 0x8F92EAB1
_VERSION = b"EVS2"
_SHA256_BYTES, _DIGEST_BYTES = 32, 16
_OURS_BYTES = len(_VERSION) + _SHA256_BYTES + 8 + _DIGEST_BYTES  # and a digest for each frame

Content = bytes | BinaryIO | Iterable[bytes]
State = Literal["intact", "damaged", "missing"]  # of an object


class Listed(NamedTuple):
    """An object as its store shows it: `size` is that of what is stored."""

    key: str
    size: int
    modified_at: datetime


def is_key(name: str) -> bool:
    """Whether an object of ours may have this name; a store holds whatever else its owner puts there."""
    return _KEY.fullmatch(name) is not None


class Encoder:
    """Iterate over it, once, for the blocks to store. `reference` is known after the last; of bytes from 4 MiB on, at once."""

    reference: Reference | None = None

    def __init__(self, content: Content) -> None:
        self._content = content
        if isinstance(content, bytes) and len(content) >= FRAME_BYTES:
            self.reference = Reference(hashlib.sha256(content).hexdigest(), len(content), "zstd")

    def __iter__(self) -> Iterator[bytes | memoryview]:
        with Hasher() as whole:
            yield from self._blocks(whole)

    def _blocks(self, whole: "Hasher") -> Iterator[bytes | memoryview]:
        known, size = self.reference, 0
        lengths: list[int] = []
        digests: list[bytes] = []
        shrinks = True
        for piece in _pieces(self._content):
            if known is None:
                whole.update(piece)
            stored = _compress(piece) if shrinks or _is_worth_trying(piece) else _raw(piece)
            if not size and len(piece) < FRAME_BYTES and len(stored) + index_bytes(len(piece)) > len(piece) * 15 // 16:
                yield piece
                self.reference = Reference(whole.hexdigest(), len(piece), "identity")
                return
            shrinks = len(stored) < len(piece) * 15 // 16
            size += len(piece)
            lengths.append(len(stored))
            digests.append(_digest(stored))
            yield stored
            del piece, stored  # before the next one comes in
        self.reference = known or Reference(whole.hexdigest(), size, "zstd" if size else "identity")
        if size:
            yield _pack(self.reference, lengths, digests)


def _pieces(content: Content) -> Iterator[bytes | memoryview]:
    """Content in pieces of 4 MiB; only the last may be shorter, and none is empty."""
    if isinstance(content, bytes):
        view = memoryview(content)
        yield from (view[start : start + FRAME_BYTES] for start in range(0, len(view), FRAME_BYTES))
        return
    chunks = content if not hasattr(content, "read") else iter(lambda: content.read(FRAME_BYTES), b"")
    held = bytearray()
    for chunk in chunks:
        if not held and len(chunk) == FRAME_BYTES:
            yield chunk
            continue
        for start in range(0, len(chunk), FRAME_BYTES):
            held += memoryview(chunk)[start : start + FRAME_BYTES]
            if len(held) >= FRAME_BYTES:
                yield bytes(memoryview(held)[:FRAME_BYTES])
                held = held[FRAME_BYTES:]
    if held:
        yield bytes(held)


class Hasher:
    """SHA-256 of pieces in order, in a thread of its own beside what else is done with them. Of small ones here and now.

    One piece at a time is held.
    """

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._pool: ThreadPoolExecutor | None = None
        self._begun: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def update(self, piece: bytes | memoryview) -> None:
        """The next piece, which stays as it is."""
        self._wait()
        if len(piece) < FRAME_BYTES:
            self._sha256.update(piece)
            return
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="evalstore-hash")
        self._begun = self._pool.submit(self._sha256.update, piece)

    def hexdigest(self) -> str:
        """Of all pieces so far."""
        self._wait()
        return self._sha256.hexdigest()

    def _wait(self) -> None:
        if self._begun is not None:
            self._begun.result()
            self._begun = None


def _compress(piece: bytes | memoryview) -> bytes:
    options: dict[int, int] = {zstd.CompressionParameter.compression_level: _LEVEL, zstd.CompressionParameter.checksum_flag: 1}
    return zstd.compress(piece, options=options)


def _is_worth_trying(piece: bytes | memoryview) -> bool:
    step = max(_SAMPLE_BYTES, len(piece) // _SAMPLES)
    sample = b"".join(piece[start : start + _SAMPLE_BYTES] for start in range(0, len(piece), step))
    return len(_compress(sample)) < len(sample) * 15 // 16


def _raw(piece: bytes | memoryview) -> bytes:
    """A zstd frame that holds it as it is (RFC 8878, 3.1.1): a single segment of raw blocks, its size before them."""
    view = memoryview(piece)
    parts: list[bytes | memoryview] = [_raw_head(len(view))]
    for start in range(0, len(view), _RAW_BLOCK_BYTES):
        parts += [_raw_block_head(len(view) - start), view[start : start + _RAW_BLOCK_BYTES]]
    return b"".join(parts)


def _raw_head(size: int) -> bytes:
    return struct.pack("<IBI", _ZSTD, 0b1010_0000, size)


def _raw_block_head(left: int) -> bytes:
    return (min(left, _RAW_BLOCK_BYTES) << 3 | (left <= _RAW_BLOCK_BYTES)).to_bytes(3, "little")


def _from_raw(stored: bytes | memoryview, size: int) -> bytes | None:
    """What is in a frame as `_raw` makes it of that size, copied once (libzstd copies it four times); None for another."""
    view, at, left = memoryview(stored), len(_raw_head(size)), size
    if view[:at] != _raw_head(size) or len(view) != at + 3 * -(-size // _RAW_BLOCK_BYTES) + size:
        return None
    blocks = []
    while left:
        if view[at : at + 3] != _raw_block_head(left):
            return None
        blocks.append(view[at + 3 : at + 3 + min(left, _RAW_BLOCK_BYTES)])
        at, left = at + 3 + len(blocks[-1]), left - len(blocks[-1])
    return b"".join(blocks)


def _digest(stored: bytes | memoryview) -> bytes:
    return xxhash.xxh3_128_digest(stored)


def _frame_count(size: int) -> int:
    return -(-size // FRAME_BYTES)


def index_bytes(size: int) -> int:
    """The length of the index of `size` bytes of content."""
    count = _frame_count(size)
    return (8 + _OURS_BYTES + count * _DIGEST_BYTES) + (8 + (count + 1) * 8 + 9)


def _pack(reference: Reference, lengths: list[int], digests: list[bytes]) -> bytes:
    """The index: our skippable frame, whose last 16 bytes are the XXH3-128 of the rest of the index, and the seek table."""
    count, ours = len(lengths), _OURS_BYTES + len(digests) * _DIGEST_BYTES
    head = struct.pack("<II", _OURS, ours) + _VERSION
    head += bytes.fromhex(reference.sha256) + struct.pack("<Q", reference.size) + b"".join(digests)
    # The table has an entry for each frame before it, ours too.
    sizes = [*[FRAME_BYTES] * (count - 1), reference.size - FRAME_BYTES * (count - 1), 0]
    table = struct.pack("<II", _SEEK_TABLE, (count + 1) * 8 + 9)
    table += b"".join(struct.pack("<II", *entry) for entry in zip([*lengths, 8 + ours], sizes, strict=True))
    table += struct.pack("<IBI", count + 1, 0, _SEEKABLE)
    return head + _digest(head + table) + table


class Index(NamedTuple):
    """Where each frame of an object begins (and the last one ends), and its XXH3-128. What is kept as it is counts as one."""

    reference: Reference
    offsets: list[int]
    digests: list[bytes]

    @property
    def frame_count(self) -> int:
        """How many frames there are."""
        return len(self.offsets) - 1

    def decode(self, number: int, stored: bytes | memoryview) -> bytes:
        """The content of a frame, given as stored. Raises ObjectDamaged unless it is exactly that."""
        if self.reference.encoding == "identity":
            self.check_whole(hashlib.sha256(stored).hexdigest())
            return bytes(stored)
        if _digest(stored) != self.digests[number]:
            raise ObjectDamaged(f"object {self.reference.key}: frame {number} is not what was stored")
        size = min(FRAME_BYTES, self.reference.size - number * FRAME_BYTES)
        if (raw := _from_raw(stored, size)) is not None:
            return raw
        decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX})
        try:
            # One byte more than stated, so that a frame which holds more shows.
            content = decoder.decompress(stored, max_length=size + 1)
        except zstd.ZstdError as error:
            raise ObjectDamaged(f"object {self.reference.key}: frame {number}: {error}") from None
        if len(content) != size or not decoder.eof or decoder.unused_data:
            raise ObjectDamaged(f"object {self.reference.key}: frame {number} does not hold {size:,} bytes")
        return content

    def check_whole(self, sha256: str) -> None:
        """Raises ObjectDamaged unless that is the SHA-256 of the content."""
        if sha256 != self.reference.sha256:
            raise ObjectDamaged(f"object {self.reference.key}: its content has SHA-256 {sha256}")


def read_index(reference: Reference, tail: bytes | memoryview, stored_size: int) -> Index:
    """The index of an object of `stored_size` bytes that ends in `tail`. Raises ObjectDamaged unless it fits the reference."""
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
        # What it says is put together again: any bit that is not as `_pack` writes it shows.
        fits = index == _pack(reference, list(entries[::2]), digests) and offsets[-1] + length == stored_size
        if fits and max(stop - start for start, stop in pairwise(offsets)) <= FRAME_BYTES + FRAME_BYTES // 64:
            return Index(reference, offsets, digests)
    raise ObjectDamaged(f"object {reference.key}: its index is damaged, or belongs to other content")


class Body(Protocol):
    """What a store reads from: an open file, or the body of an answer."""

    def read(self, amount: int, /) -> bytes: ...

    def close(self) -> object: ...


class Stream(AbstractContextManager["Stream"]):
    """Part of an object as stored, while it comes in; `length` bytes of the `stored_size`."""

    def __init__(
        self, body: Body, *, listed: Listed, length: int, errors: Callable[[str, str], AbstractContextManager[None]]
    ) -> None:
        self._body, self._errors = body, errors
        self.listed, self.length = listed, length

    def read(self, amount: int, into: bytearray | None = None) -> memoryview:
        """Exactly that many bytes. Raises ObjectStoreOutage where they do not come: open it anew from there."""
        data, filled = memoryview(bytearray(amount) if into is None else into)[:amount], 0
        with self._errors("read", self.listed.key):
            while filled < amount and (chunk := self._body.read(min(amount - filled, _READ_BYTES))):
                data[filled : filled + len(chunk)] = chunk
                filled += len(chunk)
        if filled < amount:
            raise ObjectStoreOutage(f"object {self.listed.key}: it broke off while it was read")
        return data

    def __exit__(self, *_: object) -> None:
        self._body.close()
