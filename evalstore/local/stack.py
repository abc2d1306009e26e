"""Run servers, worker, scheduler and HTTP service on this machine, with all data in one folder.

`evalstore up` and `evalstore demo` use `LocalStack`. An flock on the file `lock` lets one stack at a time use a folder. After a
kill, the next stack continues with its data.
"""

import contextlib
import fcntl
import os
import secrets
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import quote

from evalstore.local import processes, readiness
from evalstore.local.servers import Postgres, Server, ServerError, Valkey, free_port, write_private
from models.addresses import url_of
from models.errors import EvalstoreError
from models.extras import is_installed
from models.settings import DEFAULT_REDIS_NAMESPACE, Settings

Show = Callable[[str, str], None]  # (name of a process, line of its output)

STABLE_AFTER_S = 60.0  # a process that ran this long is restarted after the shortest wait
MAX_RESTART_WAIT_S = 30.0
READY_TIMEOUT_S = 30.0  # then `up` names the processes that still start, and stops waiting for them


class AlreadyRunning(EvalstoreError):
    """Another process uses this folder. The message names it."""


def commands(worker_processes: int, worker_threads: int) -> dict[str, list[str]]:
    """Return the commands of the processes. periodiq has no `python -m`, and its script may not be on the path."""
    python = sys.executable
    size = ["--processes", str(worker_processes), "--threads", str(worker_threads)]
    return {
        "worker": [python, "-m", "dramatiq", "worker.tasks", *size],
        "scheduler": [python, "-c", "from periodiq import entrypoint; entrypoint()", "worker.tasks"],
        "api": [python, "-m", "evalstore.api"],
        "sinks": [python, "-m", "evalstore.cli.app", "sinks", "run"],
    }


def _api_environment(folder: Path) -> dict[str, str]:
    """Return the address and keys of the HTTP service. They stay the same at the next start, if the port is free."""
    path = folder / "api"
    before = path.read_text().split() if path.exists() else ["8086"]
    port, read, write, admin = before + [secrets.token_hex(24) for _ in range(4 - len(before))]
    settings = Settings.from_environment(os.environ)
    host = settings.api_host if "api_host" in settings.model_fields_set else "127.0.0.1"
    port = str(free_port(int(port), host))
    write_private(path, f"{port}\n{read}\n{write}\n{admin}\n")
    return {
        "EVALSTORE_API_HOST": host,
        "EVALSTORE_API_PORT": port,
        "EVALSTORE_API_URL": url_of(host, port),
        "EVALSTORE_READ_API_KEYS": read,
        "EVALSTORE_WRITE_API_KEYS": write,
        "EVALSTORE_ADMIN_API_KEYS": admin,
    }


def _metrics_environment(folder: Path) -> dict[str, str]:
    """Return the addresses of metrics: ports of the environment, else of the last start, else the default ports if free."""
    host = Settings.from_environment(os.environ).metrics_host
    path = folder / "metrics"
    usual = ["9191", "9192", "9193"]
    before = path.read_text().split() if path.exists() else []
    ports = before + usual[len(before) :]
    names = ("EVALSTORE_METRICS_PORT", "EVALSTORE_SCHEDULER_METRICS_PORT", "EVALSTORE_SINKS_METRICS_PORT")
    chosen = {name: os.environ.get(name) or str(free_port(int(port), host)) for name, port in zip(names, ports, strict=True)}
    write_private(path, " ".join(chosen.values()))
    return chosen | {"EVALSTORE_METRICS_HOST": host}


def running(folder: Path, *, deadline_s: float = 60.0) -> dict[str, str] | None:
    """Return the environment of the stack that uses this folder, once it is ready. None if there is none by `deadline_s`."""
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline and _is_locked(folder / "lock"):
        with contextlib.suppress(FileNotFoundError):
            lines = (folder / "environment").read_text(encoding="utf-8").splitlines()
            return {name: shlex.split(value)[0] for name, _, value in (line.partition("=") for line in lines)}
        time.sleep(0.1)
    return None


class LocalProcess:
    """A command of the stack. Its output goes to `show`, or to the file NAME.log in the folder."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, show: Show | None) -> None:
        self.name, self.command, self.folder, self.show = name, command, folder, show
        self.environment: Mapping[str, str] = {}
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None

    @property
    def running(self) -> bool:
        return self._supervisor is not None and self._supervisor.poll() is None

    def start(self) -> None:
        env = {"EVALSTORE_LOG_FORMAT": "text", **os.environ, **self.environment, "PYTHONUNBUFFERED": "1"}
        # Start in the data folder: in the user's folder, `python -m` would find a gateway's own package `tasks` first.
        if self.show is None:
            with (self.folder / f"{self.name}.log").open("ab") as log:
                self._supervisor = processes.start(self.command, mark=self.folder, output=log, cwd=self.folder, env=env)
            return
        self._supervisor = processes.start(self.command, mark=self.folder, output=subprocess.PIPE, cwd=self.folder, env=env)
        self._reader = threading.Thread(target=_pump, args=(self._supervisor.stdout, self.name, self.show), daemon=True)
        self._reader.start()

    def ask_to_stop(self) -> None:
        if self._supervisor is not None:
            self._supervisor.terminate()

    def stop(self) -> None:
        """Stop, and kill after the grace. A kill loses nothing: unfinished messages are not acknowledged."""
        self.ask_to_stop()
        if self._supervisor is not None:
            self._supervisor.wait()
        if self._reader is not None:
            self._reader.join(timeout=1)

    def kill_now(self) -> None:
        if self._supervisor is not None:
            processes.kill_now(self._supervisor)


class LocalStack:
    """Servers and processes that are restarted when they end. Use it with `start` and `stop`, or as a context manager.

    `workers`: the number of worker processes that `start` waits for.
    """

    def __init__(
        self, folder: Path, commands: Mapping[str, Sequence[str]], *, workers: int = 0, show: Show | None = None
    ) -> None:
        self.folder, self.workers = folder.resolve(), workers
        self.environment: dict[str, str] = {}
        self.postgres = Postgres(self.folder / "postgres")
        self.valkey = Valkey(self.folder / "valkey")
        self.objects, self.archive = self.folder / "objects", self.folder / "archive"
        self.processes = [LocalProcess(name, command, self.folder, show) for name, command in commands.items()]
        self._show = show or (lambda _name, _line: None)
        self._lock: int | None = None
        self._stopping = threading.Event()
        self._restarter = threading.Thread(target=self._restart_ended, name="restarter", daemon=True)

    def start(self) -> None:
        """Start, and return once events can be sent and stored.

        Raises AlreadyRunning, ServerError, or the errors of a migration. Call `stop` afterwards.
        """
        from evalstore.storage.migrations import upgrade  # noqa: PLC0415  slow to import

        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _lock(self.folder / "lock")
        (self.folder / "environment").unlink(missing_ok=True)
        if processes.remains(self.folder):
            self._show("up", "the last run was killed: waiting for its processes to end")
            processes.clear(self.folder)
        self.postgres.start()
        self.valkey.start()
        self.environment = {
            "EVALSTORE_DATABASE_URL": self.postgres.url(),
            "EVALSTORE_REDIS_URL": self.valkey.url(),
            "EVALSTORE_REDIS_NAMESPACE": os.environ.get("EVALSTORE_REDIS_NAMESPACE") or DEFAULT_REDIS_NAMESPACE,
            "EVALSTORE_RUNTIME_DIR": str(self.folder / "run"),
            **_metrics_environment(self.folder),
            "EVALSTORE_OBJECT_STORE_URL": f"file://{quote(str(self.objects))}",
            "EVALSTORE_ARCHIVE_URL": f"file://{quote(str(self.archive))}",
        }
        if is_installed("lake"):
            self.environment["EVALSTORE_LAKE_URL"] = f"file://{quote(str(self.folder / 'lake'))}"
        for store in (self.objects, self.archive):
            store.mkdir(mode=0o700, exist_ok=True)
        upgrade(self.postgres.url())
        if any(process.name == "api" for process in self.processes):
            self.environment |= _api_environment(self.folder)
        started_at = time.time()
        for process in self.processes:
            process.environment = self.environment
            process.start()
        self._restarter.start()
        self._await_ready(started_at)
        lines = [f"{name}={shlex.quote(value)}\n" for name, value in self.environment.items()]
        write_private(self.folder / "environment", "".join(lines))

    def _await_ready(self, started_at: float) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while starting := self._starting(started_at):
            if time.monotonic() > deadline:
                self._show("up", f"still starting: {', '.join(starting)}; events wait in Redis until then")
                return
            time.sleep(0.05)

    def _starting(self, started_at: float) -> list[str]:
        """Describe the processes that are not ready."""
        ready = readiness.count_workers(self.environment, started_at) if self.workers else 0
        names = [] if ready >= self.workers else [f"worker ({ready} of {self.workers} processes ready)"]
        if "EVALSTORE_API_URL" in self.environment and not readiness.is_api_live(self.environment):
            names.append("HTTP service")
        return names

    def stop(self) -> None:
        """Stop the processes, then Valkey, then PostgreSQL. Each is killed after its grace."""
        if self._lock is None:
            return
        self._stopping.set()
        if self._restarter.ident is not None:
            self._restarter.join()
        started = [part for part in self._parts if part.running]
        for process in self.processes:
            process.ask_to_stop()
        for part in self._parts:
            part.stop()
            if part in started:
                self._show("up", f"{part.name} stopped")
        (self.folder / "environment").unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None

    def kill_now(self) -> None:
        """Kill the processes, or the server, that a running `stop` waits for. A signal handler may call it."""
        for part in self._parts:
            if part.running:
                part.kill_now()
                if isinstance(part, Server):
                    return

    @property
    def _parts(self) -> list[LocalProcess | Server]:
        """All processes and servers, in the order in which they stop."""
        return [*self.processes, self.valkey, self.postgres]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _restart_ended(self) -> None:
        """Restart each part that ended. The wait doubles while the part keeps ending early.

        A dramatiq master ends whenever one of its worker processes does, so this is not rare.
        """
        parts = self._parts[::-1]
        started = {part.name: time.monotonic() for part in parts}
        wait_s = {part.name: 0.25 for part in parts}
        restart_at: dict[str, float] = {}
        while not self._stopping.wait(0.1):
            for part in parts:
                now = time.monotonic()
                if part.name in restart_at and now >= restart_at[part.name]:
                    del restart_at[part.name]
                    started[part.name] = now
                    try:
                        part.start()
                    except (ServerError, OSError) as error:  # the loop tries again
                        self._show("up", f"{part.name} cannot be started: {str(error).partition(chr(10))[0]}")
                elif part.name not in restart_at and not part.running:
                    was_stable = now - started[part.name] >= STABLE_AFTER_S
                    wait_s[part.name] = 0.5 if was_stable else min(MAX_RESTART_WAIT_S, 2 * wait_s[part.name])
                    restart_at[part.name] = now + wait_s[part.name]
                    self._show("up", f"{part.name} has ended; starting it again in {wait_s[part.name]:g} s")


def _pump(output: IO[bytes], name: str, show: Show) -> None:
    with output:
        for line in iter(lambda: output.readline(65536), b""):
            show(name, line.decode("utf-8", errors="replace").rstrip("\r\n"))


def _lock(path: Path) -> int:
    """Lock the file, and return its descriptor. Closing it, or the end of the process, unlocks."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    for _ in range(20):  # `running` holds the lock for an instant when it checks
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
            return lock
        time.sleep(0.05)
    pid = os.pread(lock, 20, 0).decode() or "unknown"
    os.close(lock)
    raise AlreadyRunning(f"evalstore already runs in {path.parent}, as process {pid}")


def _is_locked(path: Path) -> bool:
    try:
        lock = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
