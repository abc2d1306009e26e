"""`evalstore send` and `evalstore get`."""

import base64
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer
from dramatiq import Message
from rich.progress import Progress
from sqlalchemy import Connection

from evalstore.cli.dlq_options import parse_time
from evalstore.cli.output import Format, OutputOption, failed, notice, notices, show, write_json
from evalstore.objects.object_store import Stores
from evalstore.storage import as_of, content_reader, database, records
from evalstore.storage.as_of import PastRecord
from evalstore.storage.content_reader import Content, Kind
from evalstore.storage.records import RecordView
from models import content
from models.errors import InvalidEvent, ObjectDamaged, ObjectMissing, ObjectStoreOutage, Outage
from models.events import decode, identity
from models.settings import settings
from tasks import store_evaluation
from tasks.broker import broker

_CHUNK_EVENTS = 1_000
_CHUNK_BYTES = 8 * 1024 * 1024


def send(
    file: Annotated[Path, typer.Argument(help="Events, one JSON object per line; - for standard input.", allow_dash=True)],
    output_format: OutputOption = Format.table,
) -> None:
    """Send a file of events to the queue.

    Good lines are sent. Bad lines are reported with their fields, and the exit status is 4.
    """
    sent, bad, first_unsent = 0, 0, 1
    rows: list[dict[str, Any]] = []
    with _open(file) as lines, Progress(console=notices, transient=True, disable=not notices.is_terminal) as progress:
        size = file.stat().st_size if file.is_file() else None
        task = progress.add_task("sending", total=size)
        try:
            for chunk, read, faults in _chunks(lines):
                for number, fault in faults:
                    notice(f"line {number}: {fault}", "red")
                bad += len(faults)
                first_unsent = chunk[0][0] if chunk else first_unsent
                broker().enqueue_many([message for _, message in chunk])
                sent += len(chunk)
                first_unsent = chunk[-1][0] + 1 if chunk else first_unsent
                for number, message in chunk:
                    row = {"line": number, "eval_id": message.args[0]["eval_id"], "event_id": message.args[0]["event_id"]}
                    if output_format is Format.jsonl:
                        write_json(row)
                    elif output_format is Format.json:
                        rows.append(row)
                progress.update(task, completed=read)
        except (Outage, KeyboardInterrupt):  # If the file were sent again, its lines without event_id would be sent twice.
            notice(f"{sent:,} sent, {bad:,} bad; lines from {first_unsent:,} on may not be sent", "red")
            raise
    if output_format is Format.json:
        write_json(rows)
    notice(f"{sent:,} sent, {bad:,} bad", "yellow" if bad else "green")
    if bad:
        raise typer.Exit(4 if sent else 1)


def _open(file: Path) -> BinaryIO:
    if str(file) == "-":
        return sys.stdin.buffer
    try:
        return file.open("rb")
    except OSError as error:
        raise failed(f"{file}: {error.strerror}", 2) from None


def _chunks(lines: BinaryIO) -> Iterator[tuple[list[tuple[int, Message[None]]], int, list[tuple[int, InvalidEvent]]]]:
    """Yield the messages to send together, the bytes read so far, and the faults of bad lines."""
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
    eval_id: Annotated[str, typer.Argument(help="Id of the evaluation.")],
    output: Annotated[bool, typer.Option("--output", help="Write its output, as bytes.")] = False,
    code: Annotated[bool, typer.Option("--code", help="Write its code, as bytes.")] = False,
    error: Annotated[bool, typer.Option("--error", help="Write its error, as bytes.")] = False,
    at: Annotated[
        datetime | None,
        typer.Option("--as-of", parser=parse_time, help="Show it as it was then: RFC 3339, or an age like 2h.", metavar="TIME"),
    ] = None,
    output_format: OutputOption = Format.table,
) -> None:
    """Show the record of an evaluation, or write its output, code or error to standard output.

    With --as-of: the record that the events stored by then give. `provisional` says that a commit under way may change it.
    """
    flags: list[tuple[Kind, bool]] = [("output", output), ("code", code), ("error", error)]
    wanted = [kind for kind, is_wanted in flags if is_wanted]
    if len(wanted) > 1:
        raise typer.BadParameter("give one of --output, --code and --error")
    loaded = settings()
    engine, stores = database.connect(loaded), Stores(loaded)
    record = past = None
    if identity({"eval_id": eval_id})[0] is not None:  # Other ids cannot be stored.
        with engine.connect() as conn:
            past = as_of.load(conn, eval_id, at) if at else None
            record = (past.view if past else None) if at else records.load(conn, eval_id)
    if record is None:
        raise failed(f"there is no evaluation {eval_id!r}{f' as of {at.isoformat()}' if at else ''}", 3)
    if past and past.is_provisional:
        record.fields["provisional"] = True
        notice("provisional: a commit under way may still change this", "yellow")
    if wanted:
        with engine.connect() as conn:
            part = _content_of(conn, past, eval_id, wanted[0])
        if part is None:
            raise failed(f"evaluation {eval_id!r} has no {wanted[0]}", 3)
        for piece in content_reader.read(engine.connect, stores, part):
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        return
    try:
        record = records.complete(engine.connect, stores, record)
    except (ObjectStoreOutage, ObjectMissing, ObjectDamaged) as problem:
        notice(f"shown without content in the object store: {problem}", "yellow")
    fields = _as_json(record)
    if output_format is Format.table:
        show([{"field": name, "value": value} for name, value in fields.items()], ["field", "value"], output_format)
    else:
        write_json(fields)


def _content_of(conn: Connection, past: PastRecord | None, eval_id: str, kind: Kind) -> Content | None:
    """Content of the record, or of the record as it was."""
    if past is None:
        return content_reader.find(conn, eval_id, kind)
    event_id = past.code_event_id if kind == "code" else past.result_event_id
    return content_reader.find(conn, eval_id, kind, event_id) if event_id else None


def _as_json(record: RecordView) -> dict[str, Any]:
    """Return the record as a JSON object. Larger content than 64 KiB is shown by its size and beginning."""
    fields = dict(record.fields)
    for kind in records.CONTENTS:
        if (part := record.contents.get(kind)) is None:
            fields[kind] = None
            continue
        fields[f"{kind}_size"] = part.size
        if not part.is_complete:
            fields[f"{kind}_preview"] = part.data[: records.PREVIEW_BYTES].decode(errors="replace")
        elif isinstance(text := content.from_bytes(part.data), str):
            fields[kind] = text
        else:
            fields[f"{kind}_b64"] = base64.b64encode(text).decode()
    return fields
