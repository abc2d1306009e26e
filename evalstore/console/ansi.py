"""Colours of terminal output as classes. All other control sequences are shown as escapes and do nothing.

https://www.ecma-international.org/publications-and-standards/standards/ecma-48/ 8.3.117 (SGR)
"""

import re
from collections.abc import Iterator
from typing import Final

from markupsafe import Markup

from evalstore.console.rendering import visible

_SGR: Final = re.compile("\x1b\\[([0-9;:]{0,60})m")
_STYLES: Final = {1: "bold", 2: "dim", 3: "italic", 4: "underline", 7: "inverse", 9: "strike"}
_ENDS: Final = {22: ("bold", "dim"), 23: ("italic",), 24: ("underline",), 27: ("inverse",), 29: ("strike",)}
# The 16 colours of a terminal, to which others are mapped.
_PALETTE: Final = (
    *((0, 0, 0), (205, 0, 0), (0, 205, 0), (205, 205, 0), (0, 0, 238), (205, 0, 205), (0, 205, 205), (229, 229, 229)),
    *((127, 127, 127), (255, 0, 0), (0, 255, 0), (255, 255, 0), (92, 92, 255), (255, 0, 255), (0, 255, 255), (255, 255, 255)),
)


class Style:
    """The state of a terminal's text, which goes on from line to line."""

    def __init__(self) -> None:
        self._flags: set[str] = set()
        self._colours: dict[str, int] = {}

    @property
    def classes(self) -> str:
        return " ".join([*sorted(self._flags), *(f"{ground}-{colour}" for ground, colour in sorted(self._colours.items()))])

    def apply(self, parameters: str) -> None:
        """Apply the parameters of a sequence SGR. Unknown ones are ignored."""
        codes = iter([int(code) if code.isdigit() else 0 for code in re.split("[;:]", parameters)])
        for code in codes:
            if code == 0:
                self._flags.clear()
                self._colours.clear()
            elif code in _STYLES:
                self._flags.add(_STYLES[code])
            elif code in _ENDS:
                self._flags -= set(_ENDS[code])
            elif 30 <= code <= 49:
                self._colour("fg" if code < 40 else "bg", code % 10, codes)
            elif 90 <= code <= 97 or 100 <= code <= 107:
                self._colours["fg" if code < 100 else "bg"] = code % 10 + 8

    def _colour(self, ground: str, digit: int, codes: Iterator[int]) -> None:
        if digit <= 7:
            self._colours[ground] = digit
        elif digit == 9:
            self._colours.pop(ground, None)
        elif (kind := next(codes, 0)) == 5:
            self._colours[ground] = _of_256(next(codes, 0))
        elif kind == 2:
            self._colours[ground] = _nearest(next(codes, 0), next(codes, 0), next(codes, 0))


def _of_256(number: int) -> int:
    if number < 16:
        return number
    if number >= 232:
        grey = (number - 232) * 10 + 8
        return _nearest(grey, grey, grey)
    number -= 16
    return _nearest(*(0 if part == 0 else part * 40 + 55 for part in (number // 36, number // 6 % 6, number % 6)))


def _nearest(red: int, green: int, blue: int) -> int:
    return min(
        range(16), key=lambda at: sum((one - other) ** 2 for one, other in zip(_PALETTE[at], (red, green, blue), strict=True))
    )


def to_html(line: str, style: Style, mark: str | None = None) -> Markup:
    """Return a line as HTML, and leave the state at its end in `style`. Occurrences of `mark` are highlighted."""
    parts, at = list[Markup](), 0
    for match in _SGR.finditer(line):
        parts.append(_span(line[at : match.start()], style.classes, mark))
        style.apply(match[1])
        at = match.end()
    return Markup("").join([*parts, _span(line[at:], style.classes, mark)])


def _span(text: str, classes: str, mark: str | None) -> Markup:
    if not text:
        return Markup("")
    shown = visible(text) if mark is None else _marked(text, mark)
    return Markup('<span class="{}">{}</span>').format(classes, shown) if classes else shown


def _marked(text: str, mark: str) -> Markup:
    parts = re.split(f"({re.escape(mark)})", text, flags=re.IGNORECASE)
    return Markup("").join(
        Markup("<mark>{}</mark>").format(visible(part)) if at % 2 else visible(part) for at, part in enumerate(parts)
    )
