"""`evalstore send` and `evalstore get`."""

import base64
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer
from dramatiq import Message
from rich.progress import Progress

from models import content
from models.errors import InvalidEvent, Outage
from models.events import decode, identity
from models.record import Record
from models.settings import settings
from ops.output import Format, OutputOption, failed, notice, notices, show, write_json
from storage import database
from storage import evaluations as stored
from tasks import store_evaluation
from tasks.broker import broker

_CHUNK_EVENTS = 1_000
_CHUNK_BYTES = 8 * 1024 * 1024
_INLINE_BYTES = 64 * 1024


def send(
    file: Annotated[Path, typer.Argument(help="Events, one JSON object a line; - for standard input.", allow_dash=True)],
    output_format: OutputOption = Format.table,
) -> None:
    """Send a file of events to the queue.

    Good lines are sent; bad ones are named by line and field, and the exit status is 4.
    """
    sent, bad = 0, 0
    rows: list[dict[str, Any]] = []
    with _opened(file) as lines, Progress(console=notices, transient=True, disable=not notices.is_terminal) as progress:
        size = file.stat().st_size if file.is_file() else None
        task = progress.add_task("sending", total=size)
        for chunk, read, faults in _chunks(lines):
            for number, fault in faults:
                notice(f"line {number}: {fault}", "red")
            bad += len(faults)
            try:
                broker().enqueue_many([message for _, message in chunk])
            except Outage:
                notice(f"{sent:,} sent, {bad:,} bad; from line {chunk[0][0]:,} on nothing is known to be sent", "red")
                raise
            sent += len(chunk)
            for number, message in chunk:
                row = {"line": number, "eval_id": message.args[0]["eval_id"], "event_id": message.args[0]["event_id"]}
                if output_format is Format.jsonl:
                    write_json(row)
                elif output_format is Format.json:
                    rows.append(row)
            progress.update(task, completed=read)
    if output_format is Format.json:
        write_json(rows)
    notice(f"{sent:,} sent, {bad:,} bad", "yellow" if bad else "green")
    if bad:
        raise typer.Exit(4 if sent else 1)


def _opened(file: Path) -> BinaryIO:
    if str(file) == "-":
        return sys.stdin.buffer
    try:
        return file.open("rb")
    except OSError as error:
        raise failed(f"{file}: {error.strerror}", 2) from None


def _chunks(lines: BinaryIO) -> Iterator[tuple[list[tuple[int, Message[None]]], int, list[tuple[int, InvalidEvent]]]]:
    """Messages to send together, how many bytes were read so far, and what was wrong on the way."""
    chunk: list[tuple[int, Message[None]]] = []
    faults: list[tuple[int, InvalidEvent]] = []
    size = read = 0
    for number, line in enumerate(lines, 1):
        read += len(line)
        if not line.strip():
            continue
        try:
            chunk.append((number, store_evaluation.message(decode(line))))
            size += len(line)
        except InvalidEvent as error:
            faults.append((number, error))
        if len(chunk) + len(faults) >= _CHUNK_EVENTS or size >= _CHUNK_BYTES:
            yield chunk, read, faults
            chunk, faults, size = [], [], 0
    yield chunk, read, faults


def get(
    eval_id: Annotated[str, typer.Argument(help="The evaluation.")],
    output: Annotated[bool, typer.Option("--output", help="Its standard output, as bytes.")] = False,
    code: Annotated[bool, typer.Option("--code", help="Its code, as bytes.")] = False,
    error: Annotated[bool, typer.Option("--error", help="Its standard error, as bytes.")] = False,
    output_format: OutputOption = Format.table,
) -> None:
    """Show the record of an evaluation, or write one of its contents to standard output."""
    wanted = [name for name, is_wanted in (("output", output), ("code", code), ("error", error)) if is_wanted]
    if len(wanted) > 1:
        raise typer.BadParameter("give one of --output, --code and --error")
    engine = database.engine(settings().database_url.get_secret_value())
    record = None
    if identity({"eval_id": eval_id})[0] is not None:  # nothing else is ever stored, nor could be asked for
        with engine.connect() as conn:
            record = stored.get(conn, eval_id)
    if record is None:
        raise failed(f"there is no evaluation {eval_id!r}", 3)
    if wanted:
        value = getattr(record, wanted[0])
        if value is None:
            raise failed(f"evaluation {eval_id!r} has no {wanted[0]}", 3)
        sys.stdout.buffer.write(content.to_bytes(value) if isinstance(value, str) else value)
        sys.stdout.buffer.flush()
        return
    fields = _as_json(record)
    if output_format is Format.table:
        show([{"field": name, "value": value} for name, value in fields.items()], ["field", "value"], output_format)
    else:
        write_json(fields)


def _as_json(record: Record) -> dict[str, Any]:
    """The record as a JSON object; content above 64 KiB by its size and beginning."""
    fields = {name: value for name, value in record if name not in {"code", "output", "error"}}
    for name in ("code", "output", "error"):
        value = getattr(record, name)
        if value is None:
            fields[name] = None
            continue
        data = content.to_bytes(value) if isinstance(value, str) else value
        fields[f"{name}_size"] = len(data)
        if len(data) > _INLINE_BYTES:
            fields[f"{name}_preview"] = data[:1024].decode(errors="replace")
        elif isinstance(value, str):
            fields[name] = value
        else:
            fields[f"{name}_b64"] = base64.b64encode(data).decode()
    return fields
