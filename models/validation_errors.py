"""What pydantic found wrong, in the words that the rest of evalstore has for it."""

import difflib
from collections.abc import Collection
from typing import Final

from pydantic_core import ErrorDetails

_WORDS: Final = {
    "missing": "required",
    "int_type": "expected an integer",
    "int_from_float": "expected an integer",
    "int_parsing": "expected an integer",
    "int_parsing_size": "expected an integer",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a finite number",
    "string_type": "expected text",
    "string_unicode": "lone surrogates are not allowed",
    "string_too_long": "expected at most {max_length:,} characters",
    "greater_than": "expected more than {gt:,}",
    "greater_than_equal": "expected at least {ge:,}",
    "less_than_equal": "expected at most {le:,}",
    "bool_parsing": "expected true or false",
    "uuid_parsing": "expected a UUID like 0190a2f5-7a4c-7000-8000-000000000000",
    "literal_error": "expected {expected}",
    "enum": "expected {expected}",
}
# Where the value is of another type, it helps to be told of which.
_TYPES: Final = {"int_type", "float_type", "string_type", "is_instance_of"}


def format_error(error: ErrorDetails) -> str:
    """The problem of one field. Never its value, which may be secret, large, or unfit for a terminal."""
    kind, value = error["type"], error["input"]
    # Content is any string: its type is the one thing that is asked of it.
    if kind == "is_instance_of" and error["ctx"]["class"] == "str":
        words = "expected text"
    elif kind == "string_pattern_mismatch" and isinstance(value, str) and "\0" in value:
        words = "NUL is not allowed"
    elif kind in _WORDS:
        words = _WORDS[kind].format(**error.get("ctx", {}))
    else:
        return error["msg"].removeprefix("Value error, ")
    if kind in _TYPES:
        words += f", not {type(value).__name__}"
        if isinstance(value, bytes | bytearray) and kind == "is_instance_of":
            words += f"; as base64 they may be {error['loc'][-1]}_b64"
    return words


def did_you_mean(given: object, known: Collection[str], *, prefix: str = "") -> str:
    """The end of a sentence that names what is spelt alike, or nothing. `prefix`: what all names begin with, left out here."""
    close = difflib.get_close_matches(given, known, n=1) if isinstance(given, str) else []
    return f"; did you mean {prefix}{close[0]}?" if close else ""
