"""`evalstore dlq edit` and `evalstore dlq rm`. Both first write the old messages to a file."""

import copy
import json
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Any, Final
from uuid import UUID

import typer
from sqlalchemy import Connection

from evalstore.cli.dlq_options import (
    ActorOption,
    FolderOption,
    ReasonOption,
    SelectedDeadLetters,
    YesOption,
    as_json,
    confirm,
    connect,
    find_by_prefix,
    new_path,
    none_found,
    operator,
    plural,
    select,
    write_file,
)
from evalstore.cli.dlq_redrive import DetachOption, follow
from evalstore.cli.output import Format, OutputOption, escaped, failed, notice, write_json
from evalstore.storage import dead_letter_messages as messages
from evalstore.storage import dead_letters
from evalstore.storage.dead_letter_messages import message_of, pretty
from evalstore.storage.dead_letters import Selection
from evalstore.storage.operator_actions import Intent
from evalstore.storage.redrives import Pace
from models.errors import InvalidEvent
from models.events import decode
from models.settings import settings
from tasks import store_evaluation
from tasks.broker import broker
from tasks.redrives import refuse_without_redis

_MISSING: Final = object()


@select(changes=True)
def rm(
    conn: Connection,
    chosen: SelectedDeadLetters,
    *,
    expect: Annotated[int | None, typer.Option(min=0, help="Continue only if exactly this many match.")] = None,
    reason: ReasonOption = None,
    actor: ActorOption = "",
    folder: FolderOption = Path(),
    yes: YesOption = False,
    output_format: OutputOption = Format.table,
) -> None:
    """Remove dead letters, after they are written to a file of JSON lines that only you can read.

    Dead letters in a running redrive stay.
    """
    states = tuple(state for state in chosen.selection.states if state != "redriving")
    count = dead_letters.count_of(conn, chosen.selection._replace(states=states)) if states else 0
    if expect is not None and expect != count:
        raise failed(f"{plural(count)} and not the {expect:,} expected: nothing is removed", 5)
    if not count:
        raise none_found(chosen)
    confirm(f"Remove {plural(count)}", count, yes=yes)
    path = new_path(folder)

    def export(letters: Any) -> dict[str, Any]:
        write_file(map(as_json, letters), path)
        return {"export": str(path.absolute())}

    intent = Intent("rm", operator(actor), reason, chosen.words)
    removed = dead_letters.remove(
        conn, chosen.selection, intent, export, accept=lambda now: now == count if expect is not None else now <= count or yes
    )
    if removed is None:
        raise failed(f"more than {count:,} match by now: nothing is removed, check again", 5)
    if not removed:
        raise failed("no dead letter matches any more: another operator redrove or removed them", 3)
    if output_format is not Format.table:
        write_json({"removed": removed, "export": str(path)})
    notice(f"{plural(removed)} removed, and written to {path}", "green")


def edit(  # noqa: PLR0913 - options
    dead_letter_id: Annotated[
        str, typer.Argument(metavar="ID", help="Id of the dead letter, or its first 4 or more characters.")
    ],
    *,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Set a field: event.exit_code=0, options.x='\"text\"'.", metavar="PATH=JSON"),
    ] = None,
    unset: Annotated[list[str] | None, typer.Option(help="Remove a field: event.metadata.tags.0", metavar="PATH")] = None,
    editor: Annotated[bool, typer.Option("--editor", help="Edit the message in $VISUAL or $EDITOR.")] = False,
    reason: ReasonOption = None,
    actor: ActorOption = "",
    folder: FolderOption = Path(),
    detach: DetachOption = False,
    yes: YesOption = False,
    output_format: OutputOption = Format.table,
) -> None:
    """Change the message of a dead letter, and send it again. `event` is short for `args.0`.

    The old message is first written to a file that only you can read. An edit that cannot be stored is refused.
    """
    if not set_ and not unset and not editor:
        raise typer.BadParameter("give a change: --set, --unset or --editor")
    loaded = settings()
    with connect(loaded) as conn:
        dead_letter = _load(conn, dead_letter_id)
        old = _decoded(dead_letter["message"]) if editor else message_of(dead_letter)
        new = copy.deepcopy(old)
        for assignment in set_ or ():
            path, separator, value = assignment.partition("=")
            if not separator:
                raise typer.BadParameter(f"{escaped(assignment)!r} is not PATH=JSON")
            _change(new, path, _json(path, value))
        for path in unset or ():
            _change(new, path, _MISSING)
        if editor:
            new = _in_editor(new)
        if new == old:
            notice("the message is unchanged")
            return
        edited = messages.edited(dead_letter["message"], new, store_evaluation.actor_name, loaded.max_content_bytes)
        diff = messages.difference(old, new)
        for line in diff:
            notice(escaped(line), {"+": "green", "-": "red"}.get(line[:1], ""))
        confirm("Send the edited message again", 1, yes=yes)
        refuse_without_redis(broker())
        export_path = new_path(folder)
        write_file([as_json(dead_letter)], export_path)
        notice(f"the old message is in {export_path}")
        details = {"export": str(export_path.absolute()), "diff": messages.recorded(diff)}
        intent = Intent(
            "edit", operator(actor), reason, {"ids": [str(dead_letter["id"])], "set": set_ or [], "unset": unset or []}
        )
        redrive_id, _ = dead_letters.redrive(
            conn, Selection(ids=(dead_letter["id"],)), intent, Pace(), edited=edited, details=details
        )
        if redrive_id is None:
            raise failed("another operator redrove, changed or removed it meanwhile: nothing is changed", 1)
        follow(conn, redrive_id, detach=detach, output_format=output_format)


def _load(conn: Connection, text: str) -> dict[str, Any]:
    full_id: UUID | None = find_by_prefix(text, dead_letters.between, conn)
    dead_letter = dead_letters.get(conn, full_id) if full_id else None
    if dead_letter is None:
        raise failed(f"there is no dead letter {text!r}", 3)
    if dead_letter["state"] != "dead":
        raise failed(f"{dead_letter['id']} is {dead_letter['state']}: only dead letters in the state dead can be edited", 1)
    return dead_letter


def _decoded(body: bytes) -> Any:
    """Decode the message, or return its text for the editor if it is no JSON."""
    try:
        return decode(body)
    except InvalidEvent:
        return body.decode(errors="backslashreplace")


def _json(path: str, text: str) -> Any:
    try:
        return decode(text.encode())
    except (InvalidEvent, UnicodeEncodeError):
        hint = f"{path}={json.dumps(text)}"
        raise typer.BadParameter(
            f"the value of {escaped(path)} is no JSON; a text needs quotes: {escaped(shlex.quote(hint))}"
        ) from None


def _change(message: Any, path: str, value: Any) -> None:
    """Set the value at `path`, whose names and indexes are separated by dots, or remove it if `value` is _MISSING."""
    steps = path.split(".")
    if steps[0] == "event":
        steps[:1] = ["args", "0"]
    at, so_far = message, "the message"
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        if isinstance(at, dict) and (step in at or (last and value is not _MISSING)):
            key: Any = step
        elif isinstance(at, list) and step.isdecimal() and int(step) < len(at) + (last and value is not _MISSING):
            key = int(step)
        else:
            raise typer.BadParameter(f"{escaped(path)}: {escaped(so_far)} has no {escaped(step)!r}")
        so_far = ".".join(steps[: number + 1])
        if not last:
            at = at[key]
        elif value is _MISSING:
            del at[key]
        elif isinstance(at, list) and key == len(at):
            at.append(value)
        else:
            at[key] = value


def _in_editor(message: Any) -> Any:
    """Open the message in the operator's editor, and return the result."""
    command = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi")
    with tempfile.TemporaryDirectory() as folder:  # only its owner can read it
        path = Path(folder) / "message.json"
        text = message if isinstance(message, str) else pretty(message) + "\n"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            status = subprocess.run([*command, str(path)], check=False).returncode
        except OSError as error:
            raise failed(f"{command[0]}: {error.strerror}; set EDITOR", 2) from None
        if status:
            raise failed(f"{command[0]} ended with status {status}: nothing is changed", 1)
        after = path.read_bytes()
    return message if after == text.encode(errors="surrogatepass") else decode(after)
