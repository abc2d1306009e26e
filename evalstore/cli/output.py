"""How data is shown: a table for people, JSON for machines; notices go to stderr."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

notices = Console(stderr=True, highlight=False, soft_wrap=True)

# What could move the cursor, change colours, or reorder what is read: C0 and C1 controls, and bidirectional overrides.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Format(StrEnum):
    """What `-o` takes."""

    table = "table"
    json = "json"
    jsonl = "jsonl"


OutputOption = Annotated[Format, typer.Option("--output-format", "-o", help="How to print the data.")]


def escaped(value: object) -> str:
    """`value` as one harmless line for a terminal: no codes, no line breaks."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), str(value))


def notice(message: str, style: str = "") -> None:
    """Tell the person at the terminal; never data."""
    notices.print(Text(_CONTROLS.sub(lambda match: match[0] if match[0] == "\n" else escaped(match[0]), message), style=style))


def show(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    form: Format,
    *,
    wrapped: str | None = None,
    nothing: str = "there is nothing",
) -> None:
    """Print `rows`: as a table of `columns`, as one JSON array, or as a JSON object a line.

    `wrapped`: the one column that takes more lines where the terminal is narrow; by default all may. `nothing`: what is
    said instead of a table that has no rows.
    """
    if form is Format.json:
        write_json(list(rows))
    elif form is Format.jsonl:
        for row in rows:
            write_json(row)
    elif not rows:
        notice(nothing)
    else:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in columns:
            numeric = bool(rows) and all(isinstance(row.get(column), int | float) for row in rows)
            table.add_column(
                column.replace("_", " "),
                justify="right" if numeric else "left",
                overflow="fold",
                no_wrap=wrapped not in (None, column),
            )
        for row in rows:
            table.add_row(*(_cell(row.get(column)) for column in columns))
        Console(highlight=False).print(table)


def _cell(value: object) -> Text:
    if value is None:
        return Text("-", style="dim")
    if isinstance(value, dict | list):
        value = to_json(value)
    return Text(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else escaped(value))


def write_json(value: object) -> None:
    """Print one JSON value and a line break, in UTF-8 whatever the terminal's encoding."""
    sys.stdout.buffer.write(to_json(value).encode() + b"\n")


def to_json(value: object) -> str:
    """`value` as JSON, with escapes for what could act on a terminal and for lone surrogates, which UTF-8 has no form for."""
    try:
        text = msgspec.json.encode(value).decode()
    except UnicodeEncodeError:
        return json.dumps(msgspec.to_builtins(value), separators=(",", ":"))
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def age(seconds: float) -> str:
    """Roughly, for people."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def ago(then: str | datetime | None, now: datetime) -> str | None:
    """How long before `now` that was, for people; None where it never was."""
    if then is None:
        return None
    at = datetime.fromisoformat(then) if isinstance(then, str) else then
    return f"{age((now - at).total_seconds())} ago"


def failed(message: str, status: int) -> typer.Exit:
    """Print `message` in red to stderr; raise what this returns."""
    notice(message, "red")
    return typer.Exit(status)
