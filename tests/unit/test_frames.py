"""Any content comes back from its frames, in whatever way it was given, and no damage passes for content."""

import base64
import hashlib
import io
import os
import random
import resource
import struct
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evalstore.objects import frames
from evalstore.objects.frames import Encoder, Index, is_key, read_index
from models.content import FRAME_BYTES, Reference
from models.errors import ObjectDamaged

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MIB = 1024 * 1024
SLOW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """Stretches of what compresses and of what does not, which end anywhere, at the edges of frames above all."""
    parts = []
    for _ in range(draw(st.integers(0, 3))):
        length = draw(st.one_of(st.integers(0, 100), st.integers(0, 3 * MIB), st.sampled_from([FRAME_BYTES - 1, FRAME_BYTES])))
        unit = draw(st.one_of(st.binary(min_size=1, max_size=20), st.integers(0, 99)))
        if isinstance(unit, int):
            parts.append(random.Random(unit).randbytes(length))  # noqa: S311
        else:
            parts.append((unit * (length // len(unit) + 1))[:length])
    return b"".join(parts)


def encode(content: frames.Content) -> tuple[Reference, bytes]:
    encoder = Encoder(content)
    blob = b"".join(encoder)
    assert encoder.reference is not None
    return encoder.reference, blob


def index_of(reference: Reference, blob: bytes) -> Index:
    return read_index(reference, blob[-frames.index_bytes(reference.size) :], len(blob))


def stored_frames(index: Index, blob: bytes) -> list[bytes]:
    return [blob[index.offsets[n] : index.offsets[n + 1]] for n in range(index.frame_count)]


def decode(reference: Reference, blob: bytes) -> bytes:
    index = index_of(reference, blob)
    return b"".join(index.decode(n, stored) for n, stored in enumerate(stored_frames(index, blob)))


@SLOW
@given(contents())
def test_content_comes_back_and_is_named_by_its_hash(content: bytes) -> None:
    reference, blob = encode(content)
    assert (reference.sha256, reference.size) == (hashlib.sha256(content).hexdigest(), len(content))
    assert decode(reference, blob) == content


@SLOW
@given(contents(), st.integers(1, 3 * FRAME_BYTES))
def test_content_in_parts_or_a_file_gives_the_same_object_as_bytes(content: bytes, part: int) -> None:
    part = max(part, len(content) // 50)
    parts = [content[start : start + part] for start in range(0, len(content), part)]
    assert encode(parts) == encode(content) == encode(io.BytesIO(content))


@SLOW
@given(contents(), st.data())
def test_a_flipped_bit_anywhere_is_noticed_before_a_byte_of_that_frame_leaves(content: bytes, data: st.DataObject) -> None:
    reference, blob = encode(content or b"x")
    whole = stored_frames(index_of(reference, blob), blob)
    right = [index_of(reference, blob).decode(n, stored) for n, stored in enumerate(whole)]
    bit = data.draw(st.integers(0, len(blob) * 8 - 1))
    damaged = bytearray(blob)
    damaged[bit // 8] ^= 1 << bit % 8
    try:
        index = index_of(reference, bytes(damaged))
    except ObjectDamaged:
        return
    noticed = 0
    for number, stored in enumerate(stored_frames(index, bytes(damaged))):
        try:
            assert index.decode(number, stored) == right[number]
        except ObjectDamaged:
            noticed += 1
    assert noticed == 1


@SLOW
@given(contents(), st.integers(1, 5 * MIB))
def test_an_object_that_lacks_bytes_or_has_more_is_noticed_before_any_is_read(content: bytes, amount: int) -> None:
    reference, blob = encode(content or b"x")
    for other in (blob[: -min(amount, len(blob))], blob[min(amount, len(blob)) :], blob + bytes(amount % 1000 + 1)):
        with pytest.raises(ObjectDamaged):
            index_of(reference, other)


@pytest.mark.parametrize("size", [10_000, FRAME_BYTES + 5])
def test_the_object_of_other_content_is_noticed_though_it_is_whole(size: int) -> None:
    reference, _ = encode(b"a" * size)
    _, other = encode(b"b" * size)
    with pytest.raises(ObjectDamaged):
        index_of(reference, other)


@pytest.mark.parametrize("unit", [b"line %d of it\n", None], ids=["text", "random"])
def test_frames_that_changed_places_or_are_of_other_content_are_noticed(unit: bytes | None) -> None:
    """Each is a whole frame with right checksums of its own, in the place of another of the same length or not."""

    def make(seed: int) -> bytes:
        lines = b"" if unit is None else b"".join(unit % (n * seed) for n in range(900_000))
        return lines[: 3 * FRAME_BYTES] if unit else random.Random(seed).randbytes(3 * FRAME_BYTES)  # noqa: S311

    (reference, blob), (other, other_blob) = encode(make(7)), encode(make(8))
    index, other_index = index_of(reference, blob), index_of(other, other_blob)
    first, second, third = stored_frames(index, blob)
    for number, stored in ((0, second), (1, first), (2, stored_frames(other_index, other_blob)[2])):
        with pytest.raises(ObjectDamaged, match=f"frame {number}"):
            index.decode(number, stored)
    for bad in (second + first + third, first + third + second, first + first + third):
        with pytest.raises(ObjectDamaged):
            decode(reference, bad + blob[index.offsets[-1] :])
    with pytest.raises(ObjectDamaged):
        index_of(reference, blob[: index.offsets[-1]] + other_blob[other_index.offsets[-1] :])


def test_what_does_not_compress_is_kept_as_it_is_or_in_frames_hardly_larger() -> None:
    small, large = os.urandom(FRAME_BYTES - 1), os.urandom(3 * FRAME_BYTES)
    assert encode(small) == (Reference(hashlib.sha256(small).hexdigest(), len(small), "identity"), small)
    reference, blob = encode(large)
    assert reference.key == f"{hashlib.sha256(large).hexdigest()}.zst"
    assert len(blob) < len(large) * 1.001


def test_what_compresses_after_what_does_not_is_compressed() -> None:
    _, blob = encode(os.urandom(FRAME_BYTES) + b"lines of text\n" * FRAME_BYTES)
    assert len(blob) < FRAME_BYTES * 1.1


def test_stretches_that_compress_are_compressed_though_the_frame_before_did_not() -> None:
    """Zeros in the middle of what does not, and base64, which has no repetition but fewer different bytes."""
    random_bytes = os.urandom(FRAME_BYTES)
    mixed = random_bytes[: 2 * MIB] + bytes(MIB) + random_bytes[3 * MIB :]
    assert len(encode(random_bytes + mixed)[1]) < FRAME_BYTES + 3.1 * MIB
    assert len(encode(random_bytes + base64.b64encode(random_bytes)[:FRAME_BYTES])[1]) < FRAME_BYTES * 1.8


def test_any_zstd_tool_reads_an_object_of_bytes_that_do_not_compress() -> None:
    for content in (os.urandom(2 * FRAME_BYTES), os.urandom(2 * FRAME_BYTES + 128 * 1024 + 1), os.urandom(FRAME_BYTES + 1)):
        assert zstd.decompress(encode(content)[1]) == content


def test_any_zstd_tool_reads_an_object() -> None:
    content = b"".join(b"line %d\n" % n for n in range(900_000))
    reference, blob = encode(content)
    assert reference.encoding == "zstd"
    assert zstd.decompress(blob) == content


def test_the_object_ends_in_the_seek_table_of_the_seekable_format() -> None:
    """4-byte magic and length, entries of compressed and decompressed size, 9-byte footer; the frames fill the rest."""
    content = b"0123456789" * MIB
    _, blob = encode(content)
    count, descriptor, magic = struct.unpack("<IBI", blob[-9:])
    assert (descriptor, magic) == (0, 0x8F92EAB1)
    table = blob[-(8 + count * 8 + 9) :]
    assert struct.unpack_from("<II", table) == (0x184D2A5E, count * 8 + 9)
    entries = list(struct.iter_unpack("<II", table[8:-9]))
    assert [decompressed for _, decompressed in entries] == [FRAME_BYTES, FRAME_BYTES, len(content) - 2 * FRAME_BYTES, 0]
    assert sum(compressed for compressed, _ in entries) + len(table) == len(blob)


@pytest.mark.parametrize("claimed", [1, FRAME_BYTES - 1, FRAME_BYTES])
def test_decompression_stops_at_the_stated_size(claimed: int) -> None:
    """An object that someone else made, each checksum of it right, whose one frame holds half a gigabyte."""
    bomb = zstd.compress(bytes(512 * MIB), options={zstd.CompressionParameter.window_log: 20})
    reference = Reference("0" * 64, claimed, "zstd")
    blob = bomb + frames._pack(reference, [len(bomb)], [frames._digest(bomb)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ObjectDamaged, match="does not hold"):
        decode(reference, blob)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


def test_a_frame_that_needs_a_large_window_is_refused() -> None:
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    stored = compressor.compress(os.urandom(MIB)) + compressor.flush()
    reference = Reference("0" * 64, MIB, "zstd")
    with pytest.raises(ObjectDamaged, match="frame 0"):
        decode(reference, stored + frames._pack(reference, [len(stored)], [frames._digest(stored)]))


def test_a_frame_of_raw_blocks_as_earlier_releases_wrote_is_read() -> None:
    content = os.urandom(FRAME_BYTES)
    stored = struct.pack("<IBI", 0xFD2FB528, 0b1010_0000, len(content))
    for start in range(0, len(content), 128 * 1024):
        is_last = start + 128 * 1024 == len(content)
        stored += (128 * 1024 << 3 | is_last).to_bytes(3, "little") + content[start : start + 128 * 1024]
    reference = Reference(hashlib.sha256(content).hexdigest(), len(content), "zstd")
    assert decode(reference, stored + frames._pack(reference, [len(stored)], [frames._digest(stored)])) == content


def test_a_reference_that_no_object_can_fit_is_refused() -> None:
    for reference in (Reference("0" * 64, 0, "zstd"), Reference("0" * 64, 2 * FRAME_BYTES, "identity")):
        with pytest.raises(ObjectDamaged):
            read_index(reference, b"", reference.size)


@pytest.mark.parametrize(
    "name", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + ".gz", "0" * 64 + "\n", "0" * 64 + ".zst/x"]
)
def test_names_that_are_no_keys(name: str) -> None:
    assert not is_key(name)
    assert is_key("0" * 64)
    assert is_key("f" * 64 + ".zst")
