"""Content (`code`, `output`, `error`): any JSON string or any bytes, given back exactly.

Content is kept as bytes. A string is kept as its UTF-8; lone surrogates, which UTF-8 has no form for, as the three bytes
that "generalized UTF-8" gives them (WTF-8, https://simonsapin.github.io/wtf-8/). So the text of some bytes, or that they
are none, follows from the bytes alone, and no flag has to travel with them.

Large content goes to an object store, and what it is known by travels in its place: a `Reference`.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from models.plain import plain_scalar

MAX_CONTENT_BYTES = 100 * 1024 * 1024
# Content is checked and compressed in frames of this size; below one, it is kept as it is where compression does not help.
FRAME_BYTES = 4 * 1024 * 1024

# The two halves of a pair, each encoded by itself: no string encodes to this, because a pair is the character it stands for.
_SPLIT_PAIR = re.compile(rb"\xed[\xa0-\xaf][\x80-\xbf]\xed[\xb0-\xbf][\x80-\xbf]")

_SIZES = range(2**63)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NAMED = re.compile(rb'"sha256"\s*:\s*"([0-9a-f]{64})"')


class Reference(NamedTuple):
    """What an event and a row hold instead of content: the SHA-256 and the size of the content, and how it is kept."""

    sha256: str
    size: int
    encoding: Literal["identity", "zstd"]

    @property
    def key(self) -> str:
        """The name of the object that holds it."""
        return self.sha256 if self.encoding == "identity" else f"{self.sha256}.zst"


def reference(value: Any) -> Reference:
    """The reference that a JSON value is. Raises ValueError, which says what was expected."""
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
    """The SHA-256 of every object that a message may need, given as it travels. One too many does no harm: it stays longer.

    By the letter, so that it holds of messages that cannot be read, too.
    """
    return {bytes.fromhex(found.decode()) for found in _NAMED.findall(message)}


def to_bytes(text: str) -> bytes:
    """The bytes that `text` is kept as; `from_bytes` gives the same string back."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        # Through UTF-16, which joins the halves of a surrogate pair into one character and leaves lone ones alone.
        joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return joined.encode("utf-8", "surrogatepass")


def from_bytes(data: bytes) -> str | bytes:
    """The string that encodes to `data`, or `data` itself where no string does."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        if _SPLIT_PAIR.search(data):
            return data
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data
