"""Parse server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Message(NamedTuple):
    """A message, or nothing but a new `last_id`. `last_id` is empty before the first id."""

    type: str
    data: str
    last_id: str


def parse(pieces: Iterable[bytes]) -> Iterator[Message]:
    """Yield the messages of a stream. A message that is not complete at the end is dropped."""
    type_, data, last_id = "message", list[str](), ""
    for line in _lines(pieces):
        if not line:
            yield Message(type_, "\n".join(data), last_id)
            type_, data = "message", []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name == "event":
            type_ = value
        elif name == "id" and "\0" not in value:
            last_id = value


def _lines(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield complete lines. Text may hold characters that other splitters take for line ends, such as U+2028."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode()
