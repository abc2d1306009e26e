"""The viewer of content: a page shows a range of bytes, so that 100 MB open at once.

A range begins at a line's beginning where possible, and carries the number of its first line. Numbers that are not known are
counted from the beginning of the content, for at most `_PATIENCE_S`.
"""

import re
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from markupsafe import Markup

from evalstore.console import ansi
from models import content

RANGE_BYTES: Final = 64 * 1024
HEX_BYTES: Final = 8 * 1024
_LINE_CHARACTERS: Final = 4_000
_PATIENCE_S: Final = 3.0
_MOST_MATCHES: Final = 100
_SNIPPET: Final = 160
_CONTINUATION: Final = re.compile(rb"^[\x80-\xbf]{1,3}")

# Reads the bytes between two positions, in pieces.
Read = Callable[[int, int], Iterator[bytes]]


class Range(NamedTuple):
    """Lines of a range: number, None if it is unknown, and HTML. `start` and `stop` are bytes.

    `first_line` and `next_line` are the numbers of the lines at `start` and at `stop`.
    """

    start: int
    stop: int
    first_line: int | None
    next_line: int | None
    lines: list[tuple[int | None, Markup]]


class Match(NamedTuple):
    """A place that a search found: the beginning of its line, the number of the line, and the text around it."""

    start: int
    line: int
    snippet: str


class Matches(NamedTuple):
    """The result of a search. It read the content up to the byte `searched`, which is in the line `line`."""

    found: list[Match]
    searched: int
    line: int


def _bytes(read: Read, start: int, stop: int) -> bytes:
    return b"".join(read(start, stop)) if start < stop else b""


def after(read: Read, size: int, start: int, line: int | None, mark: str | None = None) -> Range:
    """Return the range that begins at `start`, whose line has the number `line`."""
    stop = min(size, start + RANGE_BYTES)
    data = _bytes(read, start, stop)
    if stop < size:
        end = data.rfind(b"\n") + 1 or len(data) - _incomplete(data)
        data, stop = data[:end], start + end
    if line is None:
        line = count_lines(read, start)
    return Range(start, stop, line, None if line is None else line + data.count(b"\n"), _lines(data, line, mark))


def before(read: Read, stop: int, line: int | None, mark: str | None = None) -> Range:
    """Return the range that ends at `stop`, where the line `line` begins."""
    start = max(0, stop - RANGE_BYTES)
    data = _bytes(read, start, stop)
    if start > 0:
        cut = data.find(b"\n", 0, len(data) - 1) + 1
        cut = cut or (len(match[0]) if (match := _CONTINUATION.match(data)) else 0)
        data, start = data[cut:], start + cut
    first = line - data.count(b"\n") if line is not None else count_lines(read, start)
    return Range(start, stop, first, None if first is None else first + data.count(b"\n"), _lines(data, first, mark))


def _incomplete(data: bytes) -> int:
    """Return the number of bytes at the end that are the beginning of a character in UTF-8."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if length > back else 0
        if byte < 0x80:
            return 0
    return 0


def text_of(data: bytes) -> str:
    """Return bytes as text. Bytes that are no text become replacement characters."""
    found = content.from_bytes(data)
    return found if isinstance(found, str) else data.decode("utf-8", "replace")


def _lines(data: bytes, first: int | None, mark: str | None) -> list[tuple[int | None, Markup]]:
    style = ansi.Style()
    lines = text_of(data).split("\n")
    if lines and not lines[-1] and len(lines) > 1:
        lines.pop()
    shown = []
    for at, line in enumerate(lines):
        cut = len(line) - _LINE_CHARACTERS
        html = ansi.to_html(line[:_LINE_CHARACTERS].removesuffix("\r"), style, mark)
        if cut > 0:
            html += Markup('<span class="cut"> … {} more characters in this line</span>').format(f"{cut:,}")
        shown.append((None if first is None else first + at, html))
    return shown


def count_lines(read: Read, stop: int) -> int | None:
    """Return the number of the line that contains the byte `stop`, None if counting takes too long."""
    count, give_up = 1, time.monotonic() + _PATIENCE_S
    for piece in read(0, stop) if stop else ():
        count += piece.count(b"\n")
        if time.monotonic() > give_up:
            return None
    return count


def find_line(read: Read, size: int, line: int) -> tuple[int, int]:
    """Return where a line begins, and its number; of the last line within reach if there is no such line."""
    number, position, begin, give_up = 1, 0, 0, time.monotonic() + _PATIENCE_S
    for piece in read(0, size) if line > 1 and size else ():
        newlines = piece.count(b"\n")
        if number + newlines >= line:
            at = -1
            for _ in range(line - number):
                at = piece.index(b"\n", at + 1)
            return (position + at + 1, line) if position + at + 1 < size else (begin, number)
        if newlines:
            begin = position + piece.rindex(b"\n") + 1
        number += newlines
        position += len(piece)
        if time.monotonic() > give_up:
            break
    return (begin, number) if begin < size else (max(0, size - 1), number)


def search(read: Read, size: int, wanted: str, start: int, line: int) -> Matches:
    """Find lines that contain `wanted`, whatever its case in ASCII, from `start` on, where the line `line` begins."""
    pattern = re.compile(re.escape(content.to_bytes(wanted)), re.IGNORECASE)
    found: list[Match] = []
    rest, position, give_up = b"", start, time.monotonic() + _PATIENCE_S
    for piece in read(start, size) if start < size else ():
        data = rest + piece
        is_last = position + len(data) >= size
        # The last line of a piece is searched with the next piece, unless it is too long to keep.
        keep = 0 if is_last else len(data) - (data.rfind(b"\n") + 1)
        keep = keep if keep <= RANGE_BYTES else len(wanted) * 4
        end, at, counted = len(data) - keep, 0, 0
        while at < end and (match := pattern.search(data, at)) and match.start() < end:
            begin = data.rfind(b"\n", 0, match.start()) + 1
            line += data.count(b"\n", counted, begin)
            counted = max(counted, begin)
            snippet = data[max(begin, match.start() - _SNIPPET // 2) : match.end() + _SNIPPET // 2].partition(b"\n")[0]
            found.append(Match(position + max(begin, match.start() - RANGE_BYTES // 2), line, text_of(snippet)))
            newline = data.find(b"\n", match.end())
            at = newline + 1 if newline >= 0 else len(data)
            if len(found) >= _MOST_MATCHES:
                return Matches(found, min(size, position + at), line + data.count(b"\n", counted, at))
        line += data.count(b"\n", counted, end)
        position, rest = position + end, data[end:]
        if time.monotonic() > give_up:
            return Matches(found, position, line)
    return Matches(found, size, line)


def hex_rows(data: bytes, start: int) -> list[dict[str, Any]]:
    """Return rows of 16 bytes: offset, hexadecimal, and printable ASCII."""
    return [
        {
            "offset": f"{start + at:08x}",
            "hex": data[at : at + 16].hex(" "),
            "ascii": "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data[at : at + 16]),
        }
        for at in range(0, len(data), 16)
    ]
