"""Translate pydantic's validation errors into evalstore's words."""

import difflib
from collections.abc import Collection
from typing import Final

from pydantic_core import ErrorDetails

_TEXTS: Final = {
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
# Errors whose text names the type of the value.
_TYPE_ERRORS: Final = {"int_type", "float_type", "string_type", "is_instance_of"}


def format_error(error: ErrorDetails) -> str:
    """Describe the problem of one field, without its value, which may be secret or large."""
    kind, value = error["type"], error["input"]
    # Content may be any string, so only its type can be wrong.
    if kind == "is_instance_of" and error["ctx"]["class"] == "str":
        text = "expected text"
    elif kind == "string_pattern_mismatch" and isinstance(value, str) and "\0" in value:
        text = "NUL is not allowed"
    elif kind in _TEXTS:
        text = _TEXTS[kind].format(**error.get("ctx", {}))
    else:
        return error["msg"].removeprefix("Value error, ")
    if kind in _TYPE_ERRORS:
        text += f", not {type(value).__name__}"
        if isinstance(value, bytes | bytearray) and kind == "is_instance_of":
            text += f"; as base64 they may be {error['loc'][-1]}_b64"
    return text


def did_you_mean(name: object, known: Collection[str], *, prefix: str = "") -> str:
    """Return `; did you mean NAME?` for the closest known name, or nothing. The names in `known` are without `prefix`."""
    close = difflib.get_close_matches(name, known, n=1) if isinstance(name, str) else []
    return f"; did you mean {prefix}{close[0]}?" if close else ""
