"""Content (`code`, `output`, `error`): any JSON string or any bytes, which come back unchanged.

Content is stored as bytes. A string is stored in UTF-8, with a lone surrogate as three bytes (WTF-8,
https://simonsapin.github.io/wtf-8/). So the bytes alone show whether they were a string, and no flag is needed.

Large content goes to an object store. A `Reference` travels in its place.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from models.plain import plain_scalar

MAX_CONTENT_BYTES = 100 * 1024 * 1024
# Content is compressed and checked in frames of this size. Smaller content may be stored uncompressed.
FRAME_BYTES = 4 * 1024 * 1024

# The bytes for the halves of a surrogate pair. No string encodes to these: a pair encodes as one character.
_SPLIT_PAIR = re.compile(rb"\xed[\xa0-\xaf][\x80-\xbf]\xed[\xb0-\xbf][\x80-\xbf]")

_SIZES = range(2**63)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NAMED = re.compile(rb'"sha256"\s*:\s*"([0-9a-f]{64})"')


class Reference(NamedTuple):
    """Stands for content in an event or a row: the content's SHA-256 and size, and the encoding of its object."""

    sha256: str
    size: int
    encoding: Literal["identity", "zstd"]

    @property
    def key(self) -> str:
        """The name of the object."""
        return self.sha256 if self.encoding == "identity" else f"{self.sha256}.zst"


def reference(value: Any) -> Reference:
    """Decode a reference from a JSON value. Raises ValueError, which says what was expected."""
    if isinstance(value, Reference):
        value = value._asdict()
    if not isinstance(value, Mapping) or value.keys() != set(Reference._fields):
        raise ValueError("expected an object of sha256, size and encoding, and of nothing else")
    sha256, size, encoding = (plain_scalar(value[name]) for name in Reference._fields)
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError("sha256: expected 64 of 0-9 a-f")
    if not isinstance(size, int) or isinstance(size, bool) or size not in _SIZES:
        raise ValueError("size: expected a 64-bit integer, 0 or more: the bytes of the content before compression")
    if encoding not in ("identity", "zstd"):
        raise ValueError("encoding: expected identity or zstd")
    if encoding == "identity" and size >= FRAME_BYTES:
        raise ValueError("encoding: expected zstd, as of all content of 4 MiB and above")
    if encoding == "zstd" and size == 0:
        raise ValueError("encoding: expected identity, as there is nothing to compress")
    return Reference(sha256, size, encoding)


def objects_named(message: bytes) -> set[bytes]:
    """Return the SHA-256 of every object that an encoded message may refer to.

    It searches the text, so it works for damaged messages. An extra hash only delays the removal of that object.
    """
    return {bytes.fromhex(digest.decode()) for digest in _NAMED.findall(message)}


def to_bytes(text: str) -> bytes:
    """Encode text as it is stored. `from_bytes` returns the same string."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        # UTF-16 joins the halves of a surrogate pair into one character, and keeps lone surrogates.
        joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return joined.encode("utf-8", "surrogatepass")


def from_bytes(data: bytes) -> str | bytes:
    """Return the string that encodes to `data`, or `data` itself if there is none."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        if _SPLIT_PAIR.search(data):
            return data
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data
