"""`evalstore dlq redrive`: dead letters sent again, by a worker; here it is asked for and watched."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Annotated, Any, Final
from uuid import UUID

import redis
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
    nothing,
    one,
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
from tasks.broker import broker
from tasks.redrives import ask

_LOOK_S: Final = 0.2
_HINT_AFTER_S: Final = 10.0
_TABLE_ROWS: Final = 100
_EXAMPLE_LINES: Final = 4

DetachOption = Annotated[bool, typer.Option("--detach", help="Do not wait for what comes of it.")]


def _rate(text: str) -> float:
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)(?:/(s|m|h))?", text, re.ASCII)
    per_s = float(found[1]) / {"s": 1, "m": 60, "h": 3600}[found[2] or "s"] if found else 0
    if per_s < 1e-4:
        raise typer.BadParameter(f"{escaped(text)!r} is no rate like 20/s, 0.5/s or 100/m")
    return per_s


@select(changes=True, state=False)
def redrive(  # noqa: PLR0913 - options
    conn: Connection,
    chosen: SelectedDeadLetters,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be sent, by group.")] = False,
    rate: Annotated[float | None, typer.Option(parser=_rate, help="At most so many, like 20/s.", metavar="N/s")] = None,
    canary: Annotated[int | None, typer.Option(min=1, help="Send so many first; stop if one of them dies again.")] = None,
    max_redrives: Annotated[
        int | None, typer.Option(min=1, help="Leave out what was sent again so many times already.")
    ] = None,
    expect: Annotated[int | None, typer.Option(min=0, help="Go on only if there are exactly so many.")] = None,
    reason: ReasonOption = None,
    actor: ActorOption = "",
    detach: DetachOption = False,
    yes: YesOption = False,
    output_format: OutputOption = Format.table,
) -> None:
    """Send dead letters again, each once however many ask. A worker does it; Ctrl-C here does not stop it.

    Exit status 0 if all were stored, 4 if only some, 1 if none.
    """
    selection = chosen.selection._replace(states=("dead",), fewer_redrives_than=max_redrives)
    found = dead_letters.groups(conn, selection)
    count = sum(group["count"] for group in found)
    if expect is not None and expect != count:
        raise failed(f"{plural(count)} and not the {expect:,} expected: nothing is sent", 5)
    if not count:
        raise nothing(chosen)
    if dry_run:
        show_groups(found, output_format)
        notice(f"{plural(count)} would be sent again")
        return
    confirm(f"Send {plural(count)} in {len(found):,} group{'' if len(found) == 1 else 's'} again", count, yes=yes)
    options = {"rate": rate, "canary": canary, "max_redrives": max_redrives, "expect": expect}
    words = chosen.words | {name: value for name, value in options.items() if value is not None}
    intent = Intent("redrive", operator(actor), reason, words)
    refuse_without_redis()
    # What came in since was not confirmed. What others took meanwhile is theirs.
    redrive_id, now = dead_letters.redrive(
        conn,
        selection,
        intent,
        Pace(rate, canary),
        accept=lambda now: now == count if expect is not None else now <= count or yes,
    )
    if redrive_id is None:
        if not now:
            raise failed("no dead letter matches any more: somebody else sent or removed them", 3)
        raise failed(f"there are {now:,} by now and not {count:,}: nothing is sent, look again", 5)
    follow(conn, redrive_id, detach=detach, output_format=output_format)


def show_groups(found: list[dict[str, Any]], output_format: Format) -> None:
    """Print groups of letters."""
    if output_format is not Format.table:
        show(found, [], output_format)
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
        for group in found
    ]
    show([cells(row, widths) for row in rows], list(widths), output_format, wrapped="example")


def refuse_without_redis() -> None:
    """Raise RedisOutage before anything is changed, rather than after."""
    try:
        broker().client.ping()
    except redis.RedisError as error:
        raise RedisOutage(str(error)) from error


def follow(conn: Connection, redrive_id: UUID, *, detach: bool, output_format: Format) -> None:
    """Have a worker begin with a redrive, and show how it goes until it is done. Raises Exit(1), Exit(4)."""
    again = f"`evalstore dlq redrives {redrive_id}` shows how it goes"
    with _interrupted() as interrupted:
        try:
            _ask(redrive_id)
            notice(f"redrive {redrive_id}")
            if detach:
                notice(f"it is on its way: {again}")
                _print(stored.between(conn, redrive_id, redrive_id)[0], output_format)
                return
            row = _watch(conn, redrive_id, interrupted)
        except Outage:
            notice(f"the redrive goes on: {again}", "yellow")
            raise
    if row["finished_at"] is None:
        notice(f"the redrive goes on without you: {again}, `evalstore dlq cancel {redrive_id}` stops it")
        return
    _print(row, output_format)
    if row["stored"] < row["total"]:
        raise failed(_told(row), 4 if row["stored"] else 1)
    notice(_told(row), "green")


@contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """Set at the first Ctrl-C, which so breaks off no query: its connection would be lost, and the operator told of an outage.
    The second one does as usual."""
    event = threading.Event()

    def note(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, usual)

    usual = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, usual)


def _ask(redrive_id: UUID) -> None:
    try:
        ask(broker(), redrive_id)
    except RedisOutage as error:
        notice(f"{error}: the letters are claimed, and sent once Redis is back", "yellow")


def _watch(conn: Connection, redrive_id: UUID, interrupted: threading.Event) -> dict[str, Any]:
    """How the redrive stands when it is done, or when nobody wants to wait for that any more."""
    columns = [TextColumn("redriving"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")]
    with Progress(*columns, console=notices, transient=True, disable=not notices.is_terminal) as progress:
        task, began = progress.add_task("", total=None), monotonic()
        hinted = False
        while True:
            row = stored.between(conn, redrive_id, redrive_id)[0]
            settled = row["stored"] + row["died"] + row["returned"]
            told = f"{row['sent']:,} sent, {row['stored']:,} stored, {row['died']:,} dead again"
            progress.update(task, total=row["total"], completed=settled, description=told)
            if row["finished_at"] is not None or interrupted.is_set():
                return row
            if row["started_at"] is None and not hinted and monotonic() - began > _HINT_AFTER_S:
                notice("no worker has begun with it yet: is one running?", "yellow")
                hinted = True
            interrupted.wait(_LOOK_S)


def _told(row: dict[str, Any]) -> str:
    parts = [f"{row['stored']:,} of {row['total']:,} stored"]
    parts += [f"{row[name]:,} {words}" for name, words in (("died", "dead again"), ("returned", "dead as before")) if row[name]]
    why = f" ({row['state']}: {row['error'] or 'by an operator'})" if row["state"] not in {"done", "running"} else ""
    return ", ".join(parts) + why


def _print(row: dict[str, Any], output_format: Format) -> None:
    if output_format is not Format.table:
        write_json(row)


def redrives(
    redrive_id: Annotated[str, typer.Argument(metavar="ID", help="One, by its id or the first 4 or more characters.")] = "",
    output_format: OutputOption = Format.table,
) -> None:
    """List redrives, the newest first, or show one: who asked, why, and what came of it."""
    with connect() as conn:
        if redrive_id:
            row = one(redrive_id, stored.between, conn)
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
    redrive_id: Annotated[str, typer.Argument(metavar="ID", help="Its id, or the first 4 or more characters.")],
    reason: ReasonOption = None,
    actor: ActorOption = "",
) -> None:
    """Stop a redrive: what is not sent yet is dead again. What is sent already takes its course."""
    with connect() as conn:
        row = one(redrive_id, stored.between, conn)
        if row is None:
            raise failed(f"there is no redrive {redrive_id!r}", 3)
        intent = Intent("cancel", operator(actor), reason, {"redrive": str(row["id"])})
        returned = stored.end(conn, row["id"], "cancelled", None, intent)
    if returned is None:
        notice("it had ended already")
    else:
        notice(f"cancelled: {plural(returned)} not sent", "green")
