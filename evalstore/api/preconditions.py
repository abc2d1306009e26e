"""If-Match and If-None-Match (RFC 9110, 13.1)."""

import re
from typing import Final

from models.errors import Fault, InvalidEvent

_TAG: Final = re.compile(r'(W/)?"([^"]*)"')
_ANY: Final = range(1, 2**31)


def matches_etag(if_none_match: str | None, etag: str) -> bool:
    """Tell whether If-None-Match names `etag` (RFC 9110, 13.1.2)."""
    if if_none_match is None:
        return False
    return if_none_match.strip() == "*" or any(f'"{tag}"' == etag for _, tag in _TAG.findall(if_none_match))


def allowed_versions(if_match: str | None) -> range | list[int] | None:
    """Return the versions that If-Match allows (RFC 9110, 13.1.1), or None without the header. Raises InvalidEvent."""
    if if_match is None:
        return None
    if if_match.strip() == "*":
        return _ANY
    tags = _TAG.findall(if_match)
    if not tags:
        raise InvalidEvent([Fault("If-Match", 'expected versions in quotes, like "3", or *')])
    return [
        int(tag.partition("-")[0])
        for weak, tag in tags
        if not weak and re.fullmatch(r"[1-9]\d{0,9}(-\d{1,10})?", tag, re.ASCII)
    ]
