"""The groups of processes on this machine, and the folders with their counter files (evalstore/telemetry/counters.py).

A command starts a group: the master of `dramatiq worker.tasks` and its processes, a scheduler, a service. Its folder
`<role>;<first process>` holds a file for each process, running or ended. The next group of the same role takes over the
counts of ended groups, so a restart does not reset a counter. A crash at any step neither loses nor doubles a count.
"""

import contextlib
import fcntl
import multiprocessing
import os
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal, NamedTuple

from evalstore.objects import permissions
from evalstore.telemetry.counters import Counters, Schema, loops
from models.errors import EvalstoreError

Role = Literal["worker", "scheduler", "api", "sinks", "bridge"]
ROLES: Final[tuple[Role, ...]] = ("worker", "scheduler", "api", "sinks", "bridge")
_TOTAL: Final = "total"
_PAST: Final = "past;"
_FORGOTTEN_AFTER_S: Final = 60.0


class RegistryUnavailable(EvalstoreError):
    """EVALSTORE_RUNTIME_DIR cannot be used."""


def host_id() -> tuple[str, str]:
    """Return the ids of this boot and of this PID namespace. A pid is unique within both."""
    boot, pids = "?", "?"
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        pids = Path("/proc/self/ns/pid").readlink().name
    return boot, pids


def start_ticks(pid: int) -> str | None:
    """Return the start time of a process in ticks since boot; None if it does not run or is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in {"Z", "X"} else fields[19]


def exists(pid: int) -> bool:
    """Whether a process exists. With `hidepid`, /proc does not show processes of other users."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def name_of(pid: int) -> str:
    """Return a unique name for a process of this machine."""
    return ";".join([*host_id(), str(pid), start_ticks(pid) or "?"])


def _state(name: str) -> Literal["alive", "gone", "elsewhere"]:
    """Return the state of a process; `elsewhere` if it belongs to another PID namespace."""
    boot, pids, pid, ticks = [*name.split(";"), "", "", ""][:4]
    here = host_id()
    if boot != here[0]:
        return "gone"
    if pids != here[1] or "?" in here:
        return "elsewhere"
    now = start_ticks(int(pid)) if pid.isdigit() else None
    return "alive" if now == ticks or (now is None and pid.isdigit() and exists(int(pid))) else "gone"


class RegisteredProcess(NamedTuple):
    """A process with a counter file. `stuck` names its loops that missed their deadline."""

    name: str
    stuck: list[str]

    @property
    def pid(self) -> int:
        return int(self.name.split(";")[2])


class Group:
    """A group of processes on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def role(self) -> str:
        return self.folder.name.partition(";")[0]

    def processes(self) -> Iterator[RegisteredProcess]:
        """Yield the running processes."""
        for path in _counter_files(self.folder):
            if _state(path.name) == "alive":
                data, now = path.read_bytes(), time.monotonic()
                yield RegisteredProcess(path.name, [loop.name for loop in loops(data) if now > loop.deadline])

    def totals(self, layout: Schema) -> list[float]:
        """Return the sums over the group, with the counts of ended groups. Only running processes have gauges."""
        return _totals(self.folder, layout, running=[process.name for process in self.processes()])

    def has_ended(self) -> bool:
        """Whether no process of the group runs."""
        ledgers = _counter_files(self.folder)
        states = {_state(name) for name in (self.folder.name.partition(";")[2], *(path.name for path in ledgers))}
        if states == {"elsewhere"}:
            dues = [loop.deadline for path in ledgers for loop in loops(path.read_bytes())]
            return time.monotonic() > max(dues, default=0.0) + _FORGOTTEN_AFTER_S
        return states == {"gone"}


def runtime(runtime_dir: Path | None) -> Path:
    """Return the folder of all groups, and create it if it is missing. Raises RegistryUnavailable."""
    folder = runtime_dir or Path(tempfile.gettempdir(), f"evalstore-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            why = permissions.explain(folder)
            raise RegistryUnavailable(
                f"{folder} belongs to another user: {why}: give each user an EVALSTORE_RUNTIME_DIR of its own"
            )
    except PermissionError as error:
        raise RegistryUnavailable(f"{folder} cannot be used: {error.strerror}: {permissions.explain(folder)}") from error
    except OSError as error:
        raise RegistryUnavailable(f"{folder} cannot be used: {error.strerror}") from error
    return folder


def groups(runtime_dir: Path | None) -> list[Group]:
    """Return the groups with a running process. Raises RegistryUnavailable."""
    found = [Group(folder) for folder in sorted(runtime(runtime_dir).iterdir()) if folder.name.partition(";")[0] in ROLES]
    return [group for group in found if next(group.processes(), None)]


def join(role: Role, ledger: Counters, runtime_dir: Path | None) -> Group:
    """Move the counters of this process into its group's folder, and take over ended groups. Raises RegistryUnavailable."""
    parent = multiprocessing.parent_process()
    runtime_folder = runtime(runtime_dir)
    group = Group(runtime_folder / f"{role};{name_of(parent.pid if parent and parent.pid else os.getpid())}")
    try:
        with _locked(runtime_folder / "lock"):
            group.folder.mkdir(mode=0o700, exist_ok=True)
            for folder in runtime_folder.glob(f"{role};*"):
                if folder != group.folder and Group(folder).has_ended():
                    _adopt(folder, group.folder, ledger.schema)
            ledger.keep_in(group.folder / name_of(os.getpid()))
    except OSError as error:
        raise RegistryUnavailable(f"{group.folder} cannot be used: {error.strerror}") from error
    return group


def _counter_files(folder: Path) -> list[Path]:
    """Return the counter files of a group, with those of ended processes."""
    return [path for path in _files(folder) if path.name.count(";") == 3]


def _files(folder: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(folder.iterdir())
    return []


def _totals(folder: Path, layout: Schema, running: Collection[str]) -> list[float]:
    """Merge the files of a folder: sums, or maxima for metrics with `across="max"`, plus the counts taken over."""
    total, most = [0.0] * layout.size, [0.0] * layout.size
    for path in _files(folder):
        data = path.read_bytes()
        if path.name == _TOTAL or not layout.matches(data):
            continue
        is_running, is_past = path.name in running, path.name.startswith(_PAST)
        for at, number in enumerate(layout.numbers(data)):
            if number and (is_running or not layout.is_gauge[at]):
                if layout.is_largest[at] and not is_past:
                    most[at] = max(most[at], number)
                else:
                    total[at] += number
    return [one + other for one, other in zip(total, most, strict=True)]


def _adopt(ended: Path, heir: Path, layout: Schema) -> None:
    """Move the counts of an ended group to another. A crash after any step neither loses nor doubles a count."""
    total = ended / _TOTAL
    if _files(ended) and not total.exists():
        new = ended / "total.new"
        new.unlink(missing_ok=True)  # left by a crash; it would be counted twice
        new.write_bytes(layout.data(_totals(ended, layout, running=())))
        new.rename(total)
    for path in _files(ended):
        if path != total:
            path.unlink()
    if total.exists():
        total.rename(heir / f"{_PAST}{ended.name}")
    ended.rmdir()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
