"""Print data as tables or JSON to stdout, and notices to stderr."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

notices = Console(stderr=True, highlight=False, soft_wrap=True)

# Characters that could move the cursor, change colours or reorder text: C0 and C1 controls, bidirectional overrides.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Format(StrEnum):
    """The output formats of `-o`."""

    table = "table"
    json = "json"
    jsonl = "jsonl"


OutputOption = Annotated[Format, typer.Option("--output-format", "-o", help="Format of the data.")]


def escaped(value: object) -> str:
    """Return `value` as one line without control codes."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), str(value))


def notice(message: str, style: str = "") -> None:
    """Print a notice to stderr. Data goes to stdout."""
    notices.print(Text(_CONTROLS.sub(lambda match: match[0] if match[0] == "\n" else escaped(match[0]), message), style=style))


def show(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    form: Format,
    *,
    wrapped: str | None = None,
    nothing: str = "there is nothing",
) -> None:
    """Print `rows` as a table of `columns`, as a JSON array, or as a JSON object per line.

    On a narrow terminal only the column `wrapped` wraps, by default all columns. An empty table prints the notice `nothing`.
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
    """Print one JSON value and a line break, always in UTF-8."""
    sys.stdout.buffer.write(to_json(value).encode() + b"\n")


def to_json(value: object) -> str:
    """Encode `value` as JSON, with escapes for control characters and lone surrogates."""
    try:
        text = msgspec.json.encode(value).decode()
    except UnicodeEncodeError:
        return json.dumps(msgspec.to_builtins(value), separators=(",", ":"))
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def age(seconds: float) -> str:
    """Format a duration roughly, such as `3 h`."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def ago(then: str | datetime | None, now: datetime) -> str | None:
    """Format the time since `then`, such as `3 h ago`."""
    if then is None:
        return None
    at = datetime.fromisoformat(then) if isinstance(then, str) else then
    return f"{age((now - at).total_seconds())} ago"


def failed(message: str, status: int) -> typer.Exit:
    """Print `message` in red to stderr, and return the exception to raise."""
    notice(message, "red")
    return typer.Exit(status)


@contextmanager
def progress_bar(what: str, total: int, *, is_bytes: bool = False, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar for a terminal."""
    if not shown or not notices.is_terminal:
        yield lambda _: None
        return
    from rich.progress import (  # noqa: PLC0415 - most commands show none
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn() if is_bytes else MofNCompleteColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=notices) as progress:
        task = progress.add_task(what, total=total)
        yield lambda by: progress.advance(task, by)
