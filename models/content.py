"""Content (`code`, `output`, `error`): any JSON string or any bytes, given back exactly.

Content is kept as bytes. A string is kept as its UTF-8; lone surrogates, which UTF-8 has no form for, as the three bytes
that "generalized UTF-8" gives them (WTF-8, https://simonsapin.github.io/wtf-8/). So the text of some bytes, or that they
are none, follows from the bytes alone, and no flag has to travel with them.
"""

import re

MAX_CONTENT_BYTES = 100 * 1024 * 1024

# The two halves of a pair, each encoded by itself: no string encodes to this, because a pair is the character it stands for.
_SPLIT_PAIR = re.compile(rb"\xed[\xa0-\xaf][\x80-\xbf]\xed[\xb0-\xbf][\x80-\xbf]")


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
