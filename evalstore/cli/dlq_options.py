"""Options and helpers that the commands of `evalstore dlq` share: selection, confirmation, operator, and export files."""

import getpass
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, TextIO
from uuid import UUID

import typer
from rich.console import Console
from rich.text import Text
from sqlalchemy import Connection

from evalstore.cli.output import escaped, failed, notice, to_json
from evalstore.storage import database, dead_letters
from evalstore.storage.dead_letter_messages import export_line
from evalstore.storage.dead_letters import Selection
from models import times
from models.errors import printable
from models.settings import Settings, settings

TYPE_COUNT_ABOVE: Final = 1000


class DeadLetterState(StrEnum):
    """The values of `--state`."""

    dead = "dead"
    redriving = "redriving"
    stored = "stored"
    all = "all"


def parse_time(text: str) -> datetime:
    """Parse a time in RFC 3339, or an age such as 2h."""
    if (moment := times.parse_time(text)) is None:
        raise typer.BadParameter(f"{escaped(text)!r} is neither RFC 3339 like 2026-01-31T09:30:00Z nor an age like 90s, 2h, 7d")
    return moment


_FILTERS: Final[dict[str, Any]] = {
    "ids": Annotated[
        list[str] | None, typer.Argument(help="Ids of dead letters, or their first 4 or more characters.", metavar="ID")
    ],
    "queue": Annotated[str | None, typer.Option(help="Only dead letters of this queue.")],
    "error_class": Annotated[str | None, typer.Option(help="Only dead letters with this error class.")],
    "signature": Annotated[str | None, typer.Option(help="Only dead letters of the group with this signature.")],
    "eval_id": Annotated[str | None, typer.Option(help="Only dead letters of this evaluation.")],
    "match": Annotated[
        str | None, typer.Option(help="Only dead letters with this text in the error or message.", metavar="TEXT")
    ],
    "since": Annotated[
        datetime | None,
        typer.Option(
            parser=parse_time, help="Only dead letters since this time: RFC 3339, or an age like 2h, 7d.", metavar="TIME"
        ),
    ],
    "until": Annotated[
        datetime | None,
        typer.Option(
            parser=parse_time, help="Only dead letters before this time: RFC 3339, or an age like 2h, 7d.", metavar="TIME"
        ),
    ],
    "limit": Annotated[int | None, typer.Option(min=1, help="Maximum number of dead letters.")],
}
_STATE: Final = Annotated[
    list[DeadLetterState] | None, typer.Option(help="Only dead letters in this state; by default dead and redriving.")
]
_ALL: Final = Annotated[bool, typer.Option("--all", help="All dead letters.")]

ActorOption = Annotated[
    str, typer.Option("--actor", envvar="EVALSTORE_ACTOR", help="Name of the operator; by default your user name.")
]
ReasonOption = Annotated[str | None, typer.Option(help="Reason; stored with the action.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
FolderOption = Annotated[Path, typer.Option("--export-dir", help="Folder for the file with the old messages.", file_okay=False)]


class SelectedDeadLetters(NamedTuple):
    """The dead letters that an operator selected, and the options that select them."""

    selection: Selection
    words: dict[str, Any]


def connect(loaded: Settings) -> Connection:
    """Connect with longer timeouts than a worker. Raises DatabaseOutage."""
    return database.connect(loaded, pool_size=1, statement_timeout_s=900, lock_timeout_s=60).connect()


def select(*, changes: bool = False, state: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command with the options that select dead letters.

    The command gets a connection and the selection. With `changes`, a selection or `--all` is required.
    """
    options = _FILTERS | ({"state": _STATE} if state else {}) | ({"all_": _ALL} if changes else {})

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            own = {name: value for name, value in values.items() if name not in options}
            words = {name: values[name] for name in options if values[name] not in (None, [], False)}
            if empty := [name for name, value in words.items() if value == ""]:
                raise typer.BadParameter(f"--{empty[0].replace('_', '-')} is empty")
            if changes and not words.keys() - {"limit", "state"}:
                raise typer.BadParameter("give ids, a filter, or --all")
            with connect(settings()) as conn:
                chosen, unknown = _chosen(conn, words)
                command(conn, chosen, **own)
            if unknown:
                raise typer.Exit(4)

        own = list(inspect.signature(command).parameters.values())[2:]
        kinds = {"annotation": None, "default": None, "kind": inspect.Parameter.KEYWORD_ONLY}
        shared = [inspect.Parameter(name, **kinds | {"annotation": option}) for name, option in options.items()]
        shared = [option.replace(default=False) if option.name == "all_" else option for option in shared]
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        signature = inspect.Signature([*shared, *own])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        return run

    return decorate


def _chosen(conn: Connection, words: Mapping[str, Any]) -> tuple[SelectedDeadLetters, list[str]]:
    """Return the selection, and the ids that match no dead letter."""
    fields = {name: value for name, value in words.items() if name not in {"all_", "state", "ids"}}
    unwritable = [name for name, value in words.items() if printable(str(value)) != str(value)]
    if unwritable:
        raise typer.BadParameter(f"--{unwritable[0].replace('_', '-')} is not text in UTF-8")
    states = {str(state) for state in words.get("state", ())}
    if states:
        fields["states"] = tuple(sorted(states)) if "all" not in states else ("dead", "redriving", "stored")
    unknown: list[str] = []
    if "ids" in words:
        matches = {text: find_by_prefix(text, dead_letters.between, conn) for text in words["ids"]}
        unknown = [text for text, dead_letter_id in matches.items() if dead_letter_id is None]
        for text in unknown:
            notice(f"there is no dead letter {escaped(text)}", "red")
        fields["ids"] = tuple(dead_letter_id for dead_letter_id in matches.values() if dead_letter_id)
        if not fields["ids"]:
            raise typer.Exit(3)
    written = {name.rstrip("_"): value.isoformat() if isinstance(value, datetime) else value for name, value in words.items()}
    written |= {"ids": [str(dead_letter_id) for dead_letter_id in fields["ids"]]} if "ids" in fields else {}
    return SelectedDeadLetters(Selection(**fields), written), unknown


def find_by_prefix(text: str, between: Callable[[Connection, UUID, UUID], list[Any]], conn: Connection) -> Any:
    """Return the row that `between` finds for an id or its beginning, or None. Raises BadParameter for several rows."""
    digits = text.replace("-", "").lower()
    if not re.fullmatch(r"[0-9a-f]{4,32}", digits, re.ASCII):
        raise typer.BadParameter(f"{escaped(text)!r} is no id, nor the first 4 or more characters of an id")
    matches = between(conn, UUID(digits.ljust(32, "0")), UUID(digits.ljust(32, "f")))
    if len(matches) > 1:
        raise typer.BadParameter(f"{escaped(text)!r} matches more than one id")
    return matches[0] if matches else None


def none_found(chosen: SelectedDeadLetters) -> typer.Exit:
    """Report that no dead letter matches, and return the exception to raise."""
    if chosen.words.keys() <= {"all", "limit"}:
        notice("there are no dead letters", "green")
        return typer.Exit(0)
    return failed("no dead letter matches", 3)


def operator(name: str) -> str:
    """Return the name of the operator, by default the user name."""
    if name:
        return printable(name)
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def confirm(action: str, count: int, *, yes: bool) -> None:
    """Ask for confirmation on the terminal. A large count must be typed. Raises Exit(5) without confirmation."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise failed(f"{action}: not confirmed. Without a terminal, give --yes", 5)
    try:
        if count > TYPE_COUNT_ABOVE:
            typed = typer.prompt(f"{action}? Type their number to continue", err=True, default="", show_default=False)
            is_confirmed = str(typed).strip().replace(",", "") == str(count)
        else:
            is_confirmed = typer.confirm(f"{action}?", err=True)
    except typer.Abort:
        is_confirmed = False
    if not is_confirmed:
        raise failed("not confirmed: nothing is changed", 5)


def plural(count: int) -> str:
    """Return `1 dead letter`, `2 dead letters`, …"""
    return f"{count:,} dead letter{'' if count == 1 else 's'}"


def as_json(dead_letter: Mapping[str, Any]) -> str:
    """Encode a dead letter as a line of JSON, with its message in base64, and decoded if possible."""
    return export_line(dead_letter, to_json)


def write(lines: Iterable[str], to: TextIO) -> int:
    """Write lines, and return their number."""
    count = 0
    for count, line in enumerate(lines, 1):  # noqa: B007
        to.write(line + "\n")
    return count


def write_file(lines: Iterable[str], path: Path) -> int:
    """Write a new file that only its owner can read, and return the number of lines once it is on disk.

    Raises Exit(1) if that fails, and leaves no file.
    """
    try:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8")
    except OSError as error:
        raise failed(f"{path}: {error.strerror}: nothing is changed", 1) from None
    try:
        with file:
            count = write(lines, file)
            file.flush()
            os.fsync(file.fileno())
        _fsync_folder(path.parent)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise failed(f"{path}: {error.strerror}: nothing is changed", 1) from None
        raise
    return count


def _fsync_folder(folder: Path) -> None:
    """Sync a folder, so that the names of new files are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def new_path(folder: Path) -> Path:
    """Return a path for an export file, with the current time in its name."""
    return folder / f"evalstore-dlq-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}.jsonl"


def cells(row: Mapping[str, Any], widths: Mapping[str, int]) -> dict[str, Any]:
    """Shorten the texts of a row to `widths`, so that each row of a table takes one line."""
    cut = {}
    for name, width in widths.items():
        value = row[name]
        if isinstance(value, datetime):
            value = f"{value:%m-%d %H:%MZ}" if value.year == datetime.now(UTC).year else f"{value:%Y-%m-%d}"
        if isinstance(value, str):
            text = Text(escaped(value))
            text.truncate(max(4, width), overflow="ellipsis")
            value = text.plain
        cut[name] = value
    return cut


def width() -> int:
    """Return the width of the terminal, or 80."""
    return Console(file=sys.stdout).width
