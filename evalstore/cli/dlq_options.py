"""What the verbs of `evalstore dlq` share: which letters, whether that is meant, by whom, and where the old ones are kept."""

import base64
import getpass
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
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
from evalstore.storage.dead_letters import Selection
from models.errors import InvalidEvent, printable
from models.events import decode
from models.settings import settings

TYPED_ABOVE: Final = 1000


class DeadLetterState(StrEnum):
    """What `--state` takes."""

    dead = "dead"
    redriving = "redriving"
    stored = "stored"
    all = "all"


def _when(text: str) -> datetime:
    """A time in RFC 3339, or an age."""
    seconds = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
    if age := re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhdw])", text, re.ASCII):
        try:
            return datetime.now(UTC) - timedelta(seconds=float(age[1]) * seconds[age[2]])
        except OverflowError:
            return datetime.min.replace(tzinfo=UTC)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.utcoffset() is None:
        raise typer.BadParameter(f"{escaped(text)!r} is neither RFC 3339 like 2026-01-31T09:30:00Z nor an age like 90s, 2h, 7d")
    return moment


_FILTERS: Final[dict[str, Any]] = {
    "ids": Annotated[list[str] | None, typer.Argument(help="Ids, or their first 4 or more characters.", metavar="ID")],
    "queue": Annotated[str | None, typer.Option(help="Of this queue.")],
    "error_class": Annotated[str | None, typer.Option(help="Dead of this class of error.")],
    "signature": Annotated[str | None, typer.Option(help="Of this group.")],
    "eval_id": Annotated[str | None, typer.Option(help="Of this evaluation.")],
    "match": Annotated[str | None, typer.Option(help="With this text in the error or the message.", metavar="TEXT")],
    "since": Annotated[datetime | None, typer.Option(parser=_when, help="Dead since: RFC 3339 or 2h, 7d.", metavar="TIME")],
    "until": Annotated[datetime | None, typer.Option(parser=_when, help="Dead before: RFC 3339 or 2h, 7d.", metavar="TIME")],
    "limit": Annotated[int | None, typer.Option(min=1, help="At most so many.")],
}
_STATE: Final = Annotated[list[DeadLetterState] | None, typer.Option(help="In this state; by default dead and redriving.")]
_ALL: Final = Annotated[bool, typer.Option("--all", help="All there are.")]

ActorOption = Annotated[str, typer.Option("--actor", envvar="EVALSTORE_ACTOR", help="Who does this; by default you.")]
ReasonOption = Annotated[str | None, typer.Option(help="Why; kept with what was done.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
FolderOption = Annotated[Path, typer.Option("--export-dir", help="Where the old messages are kept.", file_okay=False)]


class SelectedDeadLetters(NamedTuple):
    """The letters an operator named, and in which words."""

    selection: Selection
    words: dict[str, Any]


def connect() -> Connection:
    """A connection that waits longer than a worker's. Raises DatabaseOutage."""
    return database.connect(settings(), pool_size=1, statement_timeout_s=900, lock_timeout_s=60).connect()


def select(*, changes: bool = False, state: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb the options that choose letters; it is called with a connection and what they chose.

    One that `changes` something must be told which letters, or `--all`.
    """
    options = _FILTERS | ({"state": _STATE} if state else {}) | ({"all_": _ALL} if changes else {})

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            own = {name: value for name, value in given.items() if name not in options}
            words = {name: given[name] for name in options if given[name] not in (None, [], False)}
            if empty := [name for name, value in words.items() if value == ""]:
                raise typer.BadParameter(f"--{empty[0].replace('_', '-')} is empty: it would choose what was not meant")
            if changes and not words.keys() - {"limit", "state"}:
                raise typer.BadParameter("name letters by id or by a filter, or say --all")
            with connect() as conn:
                chosen, unknown = _chosen(conn, words)
                verb(conn, chosen, **own)
            if unknown:
                raise typer.Exit(4)

        own = list(inspect.signature(verb).parameters.values())[2:]
        kinds = {"annotation": None, "default": None, "kind": inspect.Parameter.KEYWORD_ONLY}
        shared = [inspect.Parameter(name, **kinds | {"annotation": option}) for name, option in options.items()]
        shared = [one.replace(default=False) if one.name == "all_" else one for one in shared]
        own = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
        signature = inspect.Signature([*shared, *own])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in signature.parameters.values()}
        run.__doc__, run.__name__ = verb.__doc__, verb.__name__
        return run

    return decorate


def _chosen(conn: Connection, words: Mapping[str, Any]) -> tuple[SelectedDeadLetters, list[str]]:
    """What these words choose, and the ids of which there is no letter."""
    fields = {name: value for name, value in words.items() if name not in {"all_", "state", "ids"}}
    unwritable = [name for name, value in words.items() if printable(str(value)) != str(value)]
    if unwritable:
        raise typer.BadParameter(f"--{unwritable[0].replace('_', '-')} is not text in UTF-8")
    states = {str(state) for state in words.get("state", ())}
    if states:
        fields["states"] = tuple(sorted(states)) if "all" not in states else ("dead", "redriving", "stored")
    unknown: list[str] = []
    if "ids" in words:
        found = {text: one(text, dead_letters.between, conn) for text in words["ids"]}
        unknown = [text for text, letter_id in found.items() if letter_id is None]
        for text in unknown:
            notice(f"there is no dead letter {escaped(text)}", "red")
        fields["ids"] = tuple(letter_id for letter_id in found.values() if letter_id)
        if not fields["ids"]:
            raise typer.Exit(3)
    said = {name.rstrip("_"): value.isoformat() if isinstance(value, datetime) else value for name, value in words.items()}
    said |= {"ids": [str(letter_id) for letter_id in fields["ids"]]} if "ids" in fields else {}
    return SelectedDeadLetters(Selection(**fields), said), unknown


def one(text: str, between: Callable[[Connection, UUID, UUID], list[Any]], conn: Connection) -> Any:
    """What `between` finds under an id or the beginning of one, or None where it finds nothing; one of two is refused."""
    digits = text.replace("-", "").lower()
    if not re.fullmatch(r"[0-9a-f]{4,32}", digits, re.ASCII):
        raise typer.BadParameter(f"{escaped(text)!r} is no id, nor 4 or more characters of one")
    found = between(conn, UUID(digits.ljust(32, "0")), UUID(digits.ljust(32, "f")))
    if len(found) > 1:
        raise typer.BadParameter(f"{escaped(text)!r} begins more than one id")
    return found[0] if found else None


def nothing(chosen: SelectedDeadLetters) -> typer.Exit:
    """Say that there is no such letter; raise what this returns."""
    if chosen.words.keys() <= {"all", "limit"}:
        notice("there are no dead letters", "green")
        return typer.Exit(0)
    return failed("no dead letter matches", 3)


def operator(name: str) -> str:
    """Who does this: the name given, or else the user's."""
    if name:
        return printable(name)
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def confirm(what: str, count: int, *, yes: bool) -> None:
    """Go on only if somebody at a terminal says so, for many letters by typing their number. Raises Exit(5)."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise failed(f"{what}: not confirmed. Without a terminal, say --yes", 5)
    try:
        if count > TYPED_ABOVE:
            typed = typer.prompt(f"{what}? Type their number to go on", err=True, default="", show_default=False)
            sure = str(typed).strip().replace(",", "") == str(count)
        else:
            sure = typer.confirm(f"{what}?", err=True)
    except typer.Abort:
        sure = False
    if not sure:
        raise failed("not confirmed: nothing is changed", 5)


def plural(count: int) -> str:
    """So many dead letters."""
    return f"{count:,} dead letter{'' if count == 1 else 's'}"


def message_of(letter: Mapping[str, Any]) -> Any:
    """The letter's message, decoded. Raises InvalidEvent where it is no JSON."""
    return decode(letter["message"])


def as_json(letter: Mapping[str, Any]) -> str:
    """A whole letter as one line: the message as base64, and decoded where it is JSON that JSON can hold again."""
    fields = {name: value for name, value in letter.items() if name != "message"}
    fields["message_b64"] = base64.b64encode(letter["message"]).decode()
    try:
        return to_json(fields | {"message": message_of(letter)})
    except (InvalidEvent, ValueError, OverflowError, RecursionError):
        return to_json(fields | {"message": None})


def pretty(message: object) -> str:
    """JSON for people, as they may edit it."""
    return json.dumps(message, indent=2, ensure_ascii=False)


def write(lines: Iterable[str], to: TextIO) -> int:
    """Write lines; returns how many."""
    count = 0
    for count, line in enumerate(lines, 1):  # noqa: B007
        to.write(line + "\n")
    return count


def write_file(lines: Iterable[str], path: Path) -> int:
    """Write a new file that only its owner can read, on disk when this returns; returns how many lines.

    Raises Exit(1) where that is not possible; then there is no such file.
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
    """So that the file's name is on disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def new_path(folder: Path) -> Path:
    """Where to keep letters: the name tells the time, and no two are the same."""
    return folder / f"evalstore-dlq-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}.jsonl"


def cells(row: Mapping[str, Any], widths: Mapping[str, int]) -> dict[str, Any]:
    """`row` with texts cut to their widths, so that a table has a line for each row."""
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
    """Of the terminal, or 80."""
    return Console(file=sys.stdout).width
