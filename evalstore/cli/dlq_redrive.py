"""`evalstore dlq redrive`: ask a worker to send dead letters again, and watch it."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Annotated, Any, Final
from uuid import UUID

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from sqlalchemy import Connection

from evalstore.cli.dlq_options import (
    ActorOption,
    ReasonOption,
    SelectedDeadLetters,
    YesOption,
    cells,
    confirm,
    connect,
    find_by_prefix,
    none_found,
    operator,
    plural,
    select,
    width,
)
from evalstore.cli.output import Format, OutputOption, escaped, failed, notice, notices, show, write_json
from evalstore.storage import dead_letters
from evalstore.storage import redrives as stored
from evalstore.storage.operator_actions import Intent
from evalstore.storage.redrives import Pace
from models.errors import Outage, RedisOutage
from models.settings import settings
from tasks.broker import broker
from tasks.redrives import ask, refuse_without_redis

_INTERVAL_S: Final = 0.2
_HINT_AFTER_S: Final = 10.0
_TABLE_ROWS: Final = 100
_EXAMPLE_LINES: Final = 4

DetachOption = Annotated[bool, typer.Option("--detach", help="Do not wait for the result.")]


def _rate(text: str) -> float:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)(?:/(s|m|h))?", text, re.ASCII)
    per_s = float(match[1]) / {"s": 1, "m": 60, "h": 3600}[match[2] or "s"] if match else 0
    if per_s < 1e-4:
        raise typer.BadParameter(f"{escaped(text)!r} is no rate like 20/s, 0.5/s or 100/m")
    return per_s


@select(changes=True, state=False)
def redrive(  # noqa: PLR0913 - options
    conn: Connection,
    chosen: SelectedDeadLetters,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the groups that would be sent.")] = False,
    rate: Annotated[float | None, typer.Option(parser=_rate, help="Maximum rate, like 20/s.", metavar="N/s")] = None,
    canary: Annotated[
        int | None, typer.Option(min=1, help="Send this many first, and stop if one of them becomes a dead letter again.")
    ] = None,
    max_redrives: Annotated[
        int | None, typer.Option(min=1, help="Skip dead letters that were redriven this many times.")
    ] = None,
    expect: Annotated[int | None, typer.Option(min=0, help="Continue only if exactly this many match.")] = None,
    reason: ReasonOption = None,
    actor: ActorOption = "",
    detach: DetachOption = False,
    yes: YesOption = False,
    output_format: OutputOption = Format.table,
) -> None:
    """Send dead letters again, each only once. A worker does the work, and Ctrl-C does not stop it.

    Exit status 0 if all were stored, 4 if only some, 1 if none.
    """
    selection = chosen.selection._replace(states=("dead",), fewer_redrives_than=max_redrives)
    groups = dead_letters.groups(conn, selection)
    count = sum(group["count"] for group in groups)
    if expect is not None and expect != count:
        raise failed(f"{plural(count)} and not the {expect:,} expected: nothing is sent", 5)
    if not count:
        raise none_found(chosen)
    if dry_run:
        show_groups(groups, output_format)
        notice(f"{plural(count)} would be sent again")
        return
    confirm(f"Send {plural(count)} in {len(groups):,} group{'' if len(groups) == 1 else 's'} again", count, yes=yes)
    options = {"rate": rate, "canary": canary, "max_redrives": max_redrives, "expect": expect}
    words = chosen.words | {name: value for name, value in options.items() if value is not None}
    intent = Intent("redrive", operator(actor), reason, words)
    refuse_without_redis(broker())
    # Take only dead letters that the operator confirmed and that no other operator has claimed since.
    redrive_id, now = dead_letters.redrive(
        conn,
        selection,
        intent,
        Pace(rate, canary),
        accept=lambda now: now == count if expect is not None else now <= count or yes,
    )
    if redrive_id is None:
        if not now:
            raise failed("no dead letter matches any more: another operator redrove or removed them", 3)
        raise failed(f"{now:,} match by now and not {count:,}: nothing is sent, check again", 5)
    follow(conn, redrive_id, detach=detach, output_format=output_format)


def show_groups(groups: list[dict[str, Any]], output_format: Format) -> None:
    """Print groups of dead letters."""
    if output_format is not Format.table:
        show(groups, [], output_format)
        return
    widths = {"signature": 16, "count": 7, "first": 12, "last": 12}
    widths["example"] = (width() - sum(widths.values()) - 2 * len(widths)) * _EXAMPLE_LINES
    rows = [
        {
            "signature": group["signature"],
            "count": group["count"],
            "first": group["first_at"],
            "last": group["last_at"],
            "example": f"{group['error_class']}: {group['error_message']}",
        }
        for group in groups
    ]
    show([cells(row, widths) for row in rows], list(widths), output_format, wrapped="example")


def follow(conn: Connection, redrive_id: UUID, *, detach: bool, output_format: Format) -> None:
    """Ask a worker to run a redrive, and show its progress until it ends. Raises Exit(1), Exit(4)."""
    hint = f"`evalstore dlq redrives {redrive_id}` shows its progress"
    with _interrupted() as interrupted:
        try:
            _ask(redrive_id)
            notice(f"redrive {redrive_id}")
            if detach:
                notice(f"the redrive runs: {hint}")
                _print(stored.between(conn, redrive_id, redrive_id)[0], output_format)
                return
            row = _watch(conn, redrive_id, interrupted)
        except Outage:
            notice(f"the redrive continues: {hint}", "yellow")
            raise
    if row["finished_at"] is None:
        notice(f"the redrive continues: {hint}, `evalstore dlq cancel {redrive_id}` stops it")
        return
    _print(row, output_format)
    if row["stored"] < row["total"]:
        raise failed(_result_text(row), 4 if row["stored"] else 1)
    notice(_result_text(row), "green")


@contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets. A second Ctrl-C interrupts as usual.

    An interrupt during a query would lose the connection, and look like an outage.
    """
    event = threading.Event()

    def handle(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, default)

    default = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, default)


def _ask(redrive_id: UUID) -> None:
    try:
        ask(broker(), redrive_id)
    except RedisOutage as error:
        notice(f"{error}: the dead letters are claimed, and will be sent once Redis is back", "yellow")


def _watch(conn: Connection, redrive_id: UUID, interrupted: threading.Event) -> dict[str, Any]:
    """Show progress until the redrive ends or Ctrl-C, and return its row."""
    columns = [TextColumn("redriving"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")]
    with Progress(*columns, console=notices, transient=True, disable=not notices.is_terminal) as progress:
        task, started_at = progress.add_task("", total=None), monotonic()
        is_hinted = False
        while True:
            row = stored.between(conn, redrive_id, redrive_id)[0]
            settled = row["stored"] + row["died"] + row["returned"]
            progress_text = f"{row['sent']:,} sent, {row['stored']:,} stored, {row['died']:,} dead again"
            progress.update(task, total=row["total"], completed=settled, description=progress_text)
            if row["finished_at"] is not None or interrupted.is_set():
                return row
            if row["started_at"] is None and not is_hinted and monotonic() - started_at > _HINT_AFTER_S:
                notice("no worker has started the redrive yet: check that a worker runs", "yellow")
                is_hinted = True
            interrupted.wait(_INTERVAL_S)


def _result_text(row: dict[str, Any]) -> str:
    parts = [f"{row['stored']:,} of {row['total']:,} stored"]
    parts += [f"{row[name]:,} {text}" for name, text in (("died", "dead again"), ("returned", "dead as before")) if row[name]]
    reason = f" ({row['state']}: {row['error'] or 'by an operator'})" if row["state"] not in {"done", "running"} else ""
    return ", ".join(parts) + reason


def _print(row: dict[str, Any], output_format: Format) -> None:
    if output_format is not Format.table:
        write_json(row)


def redrives(
    redrive_id: Annotated[str, typer.Argument(metavar="ID", help="Id of one redrive, or its first 4 or more characters.")] = "",
    output_format: OutputOption = Format.table,
) -> None:
    """List redrives, the newest first, or show one: who asked, why, and the result."""
    with connect(settings()) as conn:
        if redrive_id:
            row = find_by_prefix(redrive_id, stored.between, conn)
            if row is None:
                raise failed(f"there is no redrive {redrive_id!r}", 3)
            if output_format is Format.table:
                show([{"field": name, "value": value} for name, value in row.items()], ["field", "value"], output_format)
            else:
                write_json(row)
            return
        rows = stored.latest(conn, _TABLE_ROWS if output_format is Format.table else None)
    if output_format is Format.table:
        widths = {"id": 9, "asked_at": 12, "actor": 12, "state": 9, "total": 7, "stored": 7, "died": 6}
        rows = [cells(row | {"id": str(row["id"])[:8] + "…"}, widths) for row in rows]
        show(rows, list(widths), output_format, nothing="there are no redrives")
    else:
        show(rows, [], output_format)


def cancel(
    redrive_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the redrive, or its first 4 or more characters.")],
    reason: ReasonOption = None,
    actor: ActorOption = "",
) -> None:
    """Stop a redrive. Dead letters not sent yet stay dead letters. Messages sent already are processed."""
    with connect(settings()) as conn:
        row = find_by_prefix(redrive_id, stored.between, conn)
        if row is None:
            raise failed(f"there is no redrive {redrive_id!r}", 3)
        intent = Intent("cancel", operator(actor), reason, {"redrive": str(row["id"])})
        returned = stored.end(conn, row["id"], "cancelled", None, intent)
    if returned is None:
        notice("the redrive has ended already")
    else:
        notice(f"cancelled: {plural(returned)} not sent", "green")
