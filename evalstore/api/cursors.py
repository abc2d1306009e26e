"""Cursors of lists: a position, as text for an address. Those of evaluations and runs are bound to their list and filters."""

import base64
import hashlib
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, TypeVar

import msgspec

from evalstore.api.problems import invalid
from evalstore.api.rendering import to_json
from evalstore.storage.listing import Position
from models.errors import Fault
from models.events import identity

K = TypeVar("K")
_BINDING_CHARACTERS: Final = 12


def _binding(chosen: object) -> str:
    text = f"{type(chosen).__module__}.{type(chosen).__name__}:{chosen!r}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_BINDING_CHARACTERS // 2).hexdigest()


def encode(position: Position, chosen: object) -> str:
    """Return the cursor of a position in the list with the filters `chosen`, a dataclass."""
    key: Any = position.key
    key = ["t", key.isoformat()] if isinstance(key, datetime) else ["f", repr(key)] if isinstance(key, float) else None
    return _text([_binding(chosen), key, position.eval_id])


def decode(cursor: str, chosen: object) -> Position:
    """Return the position of a cursor. Raises Problem (422) for text that is no cursor, or one of another list or filter."""
    try:
        binding, key, name = msgspec.json.decode(_bytes(cursor), type=tuple[str, tuple[str, str] | None, str])
        if key is None:
            position = Position(None, name)
        else:
            position = Position(float(key[1]) if key[0] == "f" else datetime.fromisoformat(key[1]), name)
    except (ValueError, TypeError, msgspec.DecodeError):
        raise invalid([Fault("cursor", "expected the `next` of another page, or an empty value")]) from None
    if binding != _binding(chosen):
        raise invalid([Fault("cursor", "it belongs to a list with other filters or another order: begin with an empty value")])
    is_time = isinstance(position.key, datetime)
    if (is_time and position.key.utcoffset() is None) or identity({"eval_id": name})[0] is None:  # type: ignore[union-attr]
        raise invalid([Fault("cursor", "expected the `next` of another page, or an empty value")])
    return position


def encode_time(at: datetime, key: object) -> str:
    """Return the cursor of a position in a list by time; `key` orders what has the same time."""
    return _text([at.isoformat(), str(key)])


def decode_time(cursor: str, key: Callable[[str], K]) -> tuple[datetime, K]:
    """Return the position of a cursor of `encode_time`; `key` reads the key, or raises ValueError. Raises Problem (422)."""
    try:
        at, name = msgspec.json.decode(_bytes(cursor), type=tuple[str, str])
        found = datetime.fromisoformat(at), key(name)
    except (ValueError, msgspec.DecodeError):
        found = None
    if found is None or found[0].utcoffset() is None:
        raise invalid([Fault("cursor", "expected the `next` of another page")])
    return found


def _text(value: list[Any]) -> str:
    return base64.urlsafe_b64encode(to_json(value)).decode().rstrip("=")


def _bytes(cursor: str) -> bytes:
    return base64.urlsafe_b64decode(cursor.encode("ascii") + b"==")
