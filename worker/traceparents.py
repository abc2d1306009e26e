"""What messages say of their trace: read, written and encoded for many at once, as text.

A traceparent is the version, the trace, the span of the sender and flags, in hexadecimal and with hyphens between. All
is done for many in steps of which each is one call: in a loop over messages, the slice and the format that each of them needs
would cost more than the rest of its span.

https://www.w3.org/TR/trace-context/#traceparent-header
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

# Versions after the first may say more after the flags.
_LATER: Final = re.compile(r"(?!ff|00)[0-9a-f]{2}(-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})(?:-.*)?", re.DOTALL)
LENGTH, _BYTES = 55, 26
_NO_TRACE, _NO_SPAN = bytes(16), bytes(8)
_NOTHING: Final = " " * LENGTH
_FLAGS: Final = frozenset("01")
_ODD: Final = frozenset("13579bdf")


def sender(given: Any) -> str:
    """What a `traceparent` says, as version 00 writes it; empty where that is nothing one can go by.

    Of its flags stays whether the trace is sampled, as those that one does not know are not to be passed on.
    """
    if not isinstance(given, str):
        return ""
    if given[:2] != "00" and (later := _LATER.fullmatch(given)):
        given = f"00{later[1]}"
    if len(given) != LENGTH or given[2] != "-" or given[35] != "-" or given[52] != "-" or given != given.lower():
        return ""
    try:
        found = bytes.fromhex(given.replace("-", ""))
    except ValueError:
        return ""
    if len(found) != _BYTES or found[0] or found.startswith(_NO_TRACE, 1) or found.startswith(_NO_SPAN, 17):  # it skips spaces
        return ""
    return f"{given[:53]}0{int(given[54] in _ODD)}"


def senders(given: Sequence[Any]) -> list[str]:
    """The same of many. Where all are as they should be, which is the rule, that is found out about all of them at once."""
    number, hyphens = len(given), "-" * len(given)
    with suppress(TypeError, ValueError):
        text = "".join(given)
        are_in_place = set(map(len, given)) == {LENGTH} and text[2::LENGTH] == text[35::LENGTH] == text[52::LENGTH] == hyphens
        if are_in_place and text == text.lower() and text[53::LENGTH] == "0" * number and _FLAGS.issuperset(text[54::LENGTH]):
            found = binary(given)
            if len(found) == _BYTES * number and not any(found[::_BYTES]) and _NO_SPAN not in found:
                return [*given]
    return [sender(one) for one in given]


def is_sampled(traceparent: str) -> bool:
    """Whether spans of that trace are sent."""
    return traceparent.endswith("1")


def sampled(traceparents: Sequence[str]) -> Sequence[int]:
    """The positions of those that are."""
    text = "".join(traceparents)
    if len(text) < LENGTH * len(traceparents):  # some say nothing
        return [at for at, one in enumerate(traceparents) if is_sampled(one)]
    flags = text[LENGTH - 1 :: LENGTH]
    return range(len(flags)) if "0" not in flags else [at for at, flag in enumerate(flags) if flag == "1"]


def binary(traceparents: Sequence[str]) -> bytes:
    """Those that say something, as the 26 bytes each writes in hexadecimal: version, trace, span and flags."""
    return bytes.fromhex("".join(traceparents).replace("-", " "))


def joined(traceparents: Sequence[str]) -> str:
    """One behind the other, with as many spaces where one is empty."""
    return "".join(traceparents) if all(traceparents) else "".join([one or _NOTHING for one in traceparents])


def below(traceparents: Sequence[str], ids: bytes) -> str:
    """How each goes on below a span of ours, of which there is an id for each, of 8 bytes; joined.

    As it came where it is not sampled, and no span is made.
    """
    given = joined(traceparents)
    lines = bytearray(given, "ascii")
    interleave(lines, LENGTH, FixedWidthColumn(36, 16, ids.hex().encode(), 0, 16))
    if len(kept := sampled(traceparents)) < len(traceparents):
        ours, lines = lines, bytearray(given, "ascii")
        for start in [LENGTH * at for at in kept]:
            lines[start : start + LENGTH] = ours[start : start + LENGTH]
    return lines.decode()


class FixedWidthColumn(NamedTuple):
    """So many bytes of each of many, from `start` of every so many of `source`, to be at `at` of each."""

    at: int
    width: int
    source: bytes
    start: int
    every: int


def interleave(into: bytearray, length: int, *columns: FixedWidthColumn) -> None:
    """Put columns into many of a length. A byte of all of them is one step, so it costs little where they are not wide."""
    for at, width, source, start, every in columns:
        for byte in range(width):
            into[at + byte :: length] = source[start + byte :: every]
