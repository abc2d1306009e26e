"""`evalstore dlq`: list, show, export and repair dead letters."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final
from uuid import UUID

import typer
from sqlalchemy import Connection

from evalstore.cli import dlq_edit, dlq_redrive
from evalstore.cli.dlq_options import (
    SelectedDeadLetters,
    as_json,
    cells,
    connect,
    find_by_prefix,
    new_path,
    none_found,
    plural,
    select,
    width,
    write,
    write_file,
)
from evalstore.cli.output import Format, OutputOption, escaped, failed, notice, show
from evalstore.storage import dead_letters, operator_actions
from evalstore.storage.dead_letter_messages import message_of, pretty
from models.errors import InvalidEvent
from models.settings import settings

app = typer.Typer(
    help="Dead letters: messages that need an operator before they can be stored. They stay until an operator removes them.",
    no_args_is_help=True,
)
_TABLE_ROWS: Final = 100
_SHOWN_CHARACTERS: Final = 64 * 1024


@app.command()
@select()
def ls(conn: Connection, chosen: SelectedDeadLetters, *, output_format: OutputOption = Format.table) -> None:
    """List dead letters, the newest first.

    A table shows 100 unless --limit is given; json and jsonl contain all.
    """
    selection = chosen.selection
    if output_format is not Format.table:
        if not _print_all(dead_letters.find(conn, selection), output_format):
            raise none_found(chosen)
        return
    rows = list(dead_letters.find(conn, selection._replace(limit=selection.limit or _TABLE_ROWS + 1)))
    if not rows:
        raise none_found(chosen)
    more = not selection.limit and len(rows) > _TABLE_ROWS
    shown = [_row(row) for row in (rows[:_TABLE_ROWS] if more else rows)]
    widths = {"id": 9, "died": 12, "state": 9, "times": 5, "evaluation": max(12, (width() - 50) // 3)}
    for name, usual in (("state", "dead"), ("times", 1)):  # hide columns with only the usual value
        if all(row[name] == usual for row in shown):
            del widths[name]
    widths["error"] = width() - sum(widths.values()) - 2 * len(widths)
    show([cells(row, widths) for row in shown], list(widths), output_format)
    if more:
        total = dead_letters.count_of(conn, selection)
        notice(f"{_TABLE_ROWS} of {total:,}: --limit shows more, -o jsonl shows all, `evalstore dlq groups` shows groups")


def _row(dead_letter: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": str(dead_letter["id"])[:8] + "…",
        "died": dead_letter["last_at"],
        "state": dead_letter["state"],
        "times": dead_letter["deliveries"],
        "evaluation": dead_letter["eval_id"],
        "error": f"{dead_letter['error_class']}: {dead_letter['error_message']}",
    }


def _print_all(rows: Iterator[dict[str, Any]], output_format: Format) -> int:
    """Print rows, jsonl one by one. Returns their number."""
    count = 0
    if output_format is Format.jsonl:
        for count, row in enumerate(rows, 1):  # noqa: B007
            show([row], [], output_format)
    else:
        all_rows = list(rows)
        count = len(all_rows)
        show(all_rows, [], output_format)
    return count


@app.command()
@select()
def groups(conn: Connection, chosen: SelectedDeadLetters, *, output_format: OutputOption = Format.table) -> None:
    """Group dead letters by their errors. Errors that differ only in ids, numbers and quoted texts are one group."""
    error_groups = dead_letters.groups(conn, chosen.selection)
    if error_groups or output_format is not Format.table:
        dlq_redrive.show_groups(error_groups, output_format)
    if not error_groups:
        raise none_found(chosen)


@app.command("show")
def show_dead_letter(
    dead_letter_id: Annotated[
        str, typer.Argument(metavar="ID", help="Id of the dead letter, or its first 4 or more characters.")
    ],
    output_format: OutputOption = Format.table,
) -> None:
    """Show a dead letter with its cause, message and traceback."""
    with connect(settings()) as conn:
        full_id: UUID | None = find_by_prefix(dead_letter_id, dead_letters.between, conn)
        dead_letter = dead_letters.get(conn, full_id) if full_id else None
    if dead_letter is None:
        raise failed(f"there is no dead letter {dead_letter_id!r}", 3)
    if output_format is not Format.table:
        sys.stdout.write(as_json(dead_letter) + "\n")
        return
    fields = [name for name in dead_letters.COLUMNS if dead_letter[name] is not None]
    show([{"field": name, "value": _value(dead_letter[name])} for name in fields], ["field", "value"], output_format)
    try:
        message = pretty(message_of(dead_letter))
    except (InvalidEvent, RecursionError):
        message = repr(dead_letter["message"])
    for title, text in (("message", message), ("traceback", dead_letter["traceback"])):
        sys.stdout.write(f"\n{title}\n")
        for line in text[:_SHOWN_CHARACTERS].rstrip().split("\n"):
            sys.stdout.write(f"  {escaped(line)}\n")
        if len(text) > _SHOWN_CHARACTERS:
            sys.stdout.write(f"  … {len(text) - _SHOWN_CHARACTERS:,} characters more: -o json shows all\n")


def _value(value: Any) -> str:
    return f"{value:%Y-%m-%dT%H:%M:%S.%fZ}" if hasattr(value, "strftime") else str(value)


@app.command()
@select()
def export(
    conn: Connection,
    chosen: SelectedDeadLetters,
    *,
    to: Annotated[str, typer.Option("--to", help="Path of a new file, or - for standard output.", metavar="FILE")] = "",
) -> None:
    """Write dead letters as lines of JSON. Each has the received message in base64, and decoded.

    The file must not exist. Only you can read it.
    """
    lines = map(as_json, dead_letters.find(conn, chosen.selection, whole=True, oldest_first=True))
    if to == "-":
        count = write(lines, sys.stdout)
        sys.stdout.flush()
    elif not dead_letters.count_of(conn, chosen.selection):
        count = 0
    else:
        path = Path(to) if to else new_path(Path())
        count = write_file(lines, path)
        notice(f"{plural(count)} in {path}", "green")
    if not count:
        raise none_found(chosen)


@app.command()
def actions(
    output_format: OutputOption = Format.table,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number; by default 100 in a table.")] = None,
) -> None:
    """List the changes by operators, the newest first: who, when, why."""
    with connect(settings()) as conn:
        rows = operator_actions.latest(conn, limit or (_TABLE_ROWS if output_format is Format.table else None))
    if output_format is not Format.table:
        show(rows, [], output_format)
        return
    widths = {"at": 12, "actor": 12, "verb": 8, "count": 7, "redrive": 9}
    widths["reason"] = width() - sum(widths.values()) - 2 * len(widths)
    short = [row | {"redrive": str(row["redrive"])[:8] + "…" if row["redrive"] else None} for row in rows]
    nothing = "there are no changes by operators"
    show([cells(row, widths) for row in short], list(widths), output_format, nothing=nothing)


app.command("redrive")(dlq_redrive.redrive)
app.command("redrives")(dlq_redrive.redrives)
app.command("cancel")(dlq_redrive.cancel)
app.command("edit")(dlq_edit.edit)
app.command("rm")(dlq_edit.rm)
