"""Convert values to JSON's own types before they are checked.

The encoder treats some values differently from a check: it writes an enumeration's `value`, and a `Decimal` as text. It refuses
NumPy's numbers. After conversion, check and encoder see the same value.
"""

import math
import re
from collections.abc import Callable
from typing import Any, Final

import msgspec

MAX_METADATA_BYTES = 64 * 1024
MAX_METADATA_DEPTH = 100
INT64: Final = range(-(2**63), 2**63)
SURROGATE: Final = re.compile("[\ud800-\udfff]")

_SCALARS: Final = frozenset({str, int, float, bool, type(None)})
# Call the base class's method: a subclass may override it.
_FROM_SUBCLASS: Final[tuple[tuple[type, Callable[[Any], Any]], ...]] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
)
# By the kind of NumPy's dtype: https://numpy.org/doc/stable/reference/generated/numpy.dtype.kind.html
_FROM_NUMPY: Final[dict[object, Callable[[Any], Any]]] = {"b": bool, "i": int, "u": int, "f": float}


def plain_scalar(value: Any) -> Any:
    """Convert a subclass of `str`, `int` or `float`, and NumPy's numbers and booleans, to JSON's own type.

    Any other value comes back unchanged. NumPy is never imported.
    """
    kind = type(value)
    if kind in _SCALARS:
        return value
    for base, convert in _FROM_SUBCLASS:
        if isinstance(value, base):
            return convert(value)
    if kind.__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        numpy_kind = getattr(getattr(value, "dtype", None), "kind", None)
        if (from_numpy := _FROM_NUMPY.get(numpy_kind)) is not None:
            return from_numpy(value)
    return value


def plain_metadata(value: dict[Any, Any]) -> dict[str, Any]:
    """Copy an event's metadata in JSON's own types. Raises ValueError, which names the member that is wrong."""
    try:
        plain: dict[str, Any] = _plain(value, "metadata", 0)
    except ValueError as error:
        where, _, what = str(error).rpartition(": ")
        raise ValueError(f"{where if len(where) <= 200 else f'{where[:100]}…{where[-100:]}'}: {what}") from None
    if len(msgspec.json.encode(plain)) > MAX_METADATA_BYTES:
        raise ValueError(f"expected at most {MAX_METADATA_BYTES:,} bytes of JSON")
    return plain


def _plain(value: Any, path: str, depth: int) -> Any:
    """Copy `value`. Raises ValueError for values that jsonb or JSON of other languages would change."""
    if isinstance(value, dict | list):
        if depth == MAX_METADATA_DEPTH:
            raise ValueError(f"{path}: nested deeper than {MAX_METADATA_DEPTH} levels")
        if isinstance(value, list):
            return [_plain(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
        return {_key(key, path): _plain(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
    value = plain_scalar(value)
    match value:
        case str():
            return _text(value, path)
        case int() if value not in INT64:
            raise ValueError(f"{path}: expected a 64-bit integer")
        case float() if not math.isfinite(value):
            raise ValueError(f"{path}: expected a finite number")
        case None | int() | float():  # bool is an int
            return value
    raise ValueError(f"{path}: {type(value).__name__} is not JSON")


def _key(key: Any, path: str) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{path}: expected text as keys, not {type(key).__name__}")  # noqa: TRY004 - pydantic takes ValueError
    key = plain_scalar(key)
    return key if key.isascii() and "\0" not in key else _text(key, f"{path}, key {key!a}")


def _text(text: str, path: str) -> str:
    if "\0" in text:
        raise ValueError(f"{path}: NUL is not allowed")
    if not text.isascii() and SURROGATE.search(text):
        raise ValueError(f"{path}: lone surrogates are not allowed")
    return text
