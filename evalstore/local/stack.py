"""Everything on this machine in one data folder: servers, worker, scheduler, and the API where there is one.

`Local` is what `evalstore up` runs in a terminal and `evalstore demo` runs quietly inside itself. Only one at a time works
in a folder (an flock on its file `lock`); after a kill the next one takes over what is there.
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
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import quote

from evalstore.local import processes, readiness
from evalstore.local.servers import Postgres, Server, ServerError, Valkey, free_port, write_private
from models.errors import EvalstoreError

Show = Callable[[str, str], None]  # the name of a process, and a line of its

LIVED_S = 60.0  # what ran this long and then died starts at the shortest wait again
LONGEST_WAIT_S = 30.0
READY_WITHIN_S = 30.0  # after that it is said what is still starting, and not waited for


class AlreadyRunning(EvalstoreError):
    """Another process works in this folder; the message says which."""


def commands(worker_processes: int, worker_threads: int) -> dict[str, list[str]]:
    """What runs beside the servers. periodiq has no `python -m`, and its script may be missing from the path."""
    python = sys.executable
    size = ["--processes", str(worker_processes), "--threads", str(worker_threads)]
    found = {
        "worker": [python, "-m", "dramatiq", "worker.tasks", *size],
        "scheduler": [python, "-c", "from periodiq import entrypoint; entrypoint()", "worker.tasks"],
    }
    if find_spec("fastapi") and find_spec("uvicorn"):
        found["api"] = [python, "-m", "evalstore.api"]
    return found


def _service(folder: Path) -> dict[str, str]:
    """Where the HTTP service listens and its keys, the same at every start where they can be."""
    kept = folder / "api"
    port, read, write = kept.read_text().split() if kept.exists() else ("8086", secrets.token_hex(24), secrets.token_hex(24))
    port = str(free_port(int(port)))
    write_private(kept, f"{port}\n{read}\n{write}\n")
    return {
        "EVALSTORE_API_HOST": "127.0.0.1",
        "EVALSTORE_API_PORT": port,
        "EVALSTORE_API_URL": f"http://127.0.0.1:{port}",
        "EVALSTORE_READ_API_KEYS": read,
        "EVALSTORE_WRITE_API_KEYS": write,
    }


def _metrics_ports(folder: Path) -> dict[str, str]:
    """Where metrics are answered: at the usual ports, or those of before, if they are free and nothing else was asked for."""
    kept = folder / "metrics"
    ports = kept.read_text().split() if kept.exists() else ["9191", "9192"]
    names = ("EVALSTORE_METRICS_PORT", "EVALSTORE_SCHEDULER_METRICS_PORT")
    found = {name: os.environ.get(name) or str(free_port(int(port))) for name, port in zip(names, ports, strict=True)}
    write_private(kept, " ".join(found.values()))
    return found


def running(folder: Path, *, deadline_s: float = 60.0) -> dict[str, str] | None:
    """The environment of the one that works in this folder, once it is ready; None if there is none, or none gets ready."""
    give_up = time.monotonic() + deadline_s
    while time.monotonic() < give_up and _is_locked(folder / "lock"):
        with contextlib.suppress(FileNotFoundError):
            lines = (folder / "environment").read_text(encoding="utf-8").splitlines()
            return {name: shlex.split(value)[0] for name, _, value in (line.partition("=") for line in lines)}
        time.sleep(0.1)
    return None


class LocalProcess:
    """A command that is kept running. Its lines go to `show`, or to the file NAME.log of the folder."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, show: Show | None) -> None:
        self.name, self.command, self.folder, self.show = name, command, folder, show
        self.environment: Mapping[str, str] = {}
        self._guard: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None

    @property
    def running(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    def start(self) -> None:
        env = {"EVALSTORE_LOG_FORMAT": "text", **os.environ, **self.environment, "PYTHONUNBUFFERED": "1"}
        # In the data folder, not where the user is: `python -m` would find a gateway's own package `tasks` there first.
        if self.show is None:
            with (self.folder / f"{self.name}.log").open("ab") as log:
                self._guard = processes.start(self.command, mark=self.folder, output=log, cwd=self.folder, env=env)
            return
        self._guard = processes.start(self.command, mark=self.folder, output=subprocess.PIPE, cwd=self.folder, env=env)
        self._reader = threading.Thread(target=_pump, args=(self._guard.stdout, self.name, self.show), daemon=True)
        self._reader.start()

    def ask_to_stop(self) -> None:
        if self._guard is not None:
            self._guard.terminate()

    def stop(self) -> None:
        """Within the guard's grace; what is left then is killed, which loses nothing: it was not acknowledged."""
        self.ask_to_stop()
        if self._guard is not None:
            self._guard.wait()
        if self._reader is not None:
            self._reader.join(timeout=1)

    def kill_now(self) -> None:
        if self._guard is not None:
            processes.kill_now(self._guard)


class LocalStack:
    """`start`, use `environment`, `stop`; or `with`. What dies in between is started again, soon or less soon.

    `workers`: how many processes the worker is to have, so that they can be waited for.
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
        self._mender = threading.Thread(target=self._mend, name="mender", daemon=True)

    def start(self) -> None:
        """Return when all of it works, so that what is sent is stored. Raises AlreadyRunning, ServerError, or what a migration
        raises; `stop` then."""
        from evalstore.storage.migrations import upgrade  # noqa: PLC0415  slow to import, and most commands never come here

        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _lock(self.folder / "lock")
        (self.folder / "environment").unlink(missing_ok=True)
        if processes.remains(self.folder):
            self._show("up", "the last run was killed: waiting for what it left behind")
            processes.clear(self.folder)
        self.postgres.start()
        self.valkey.start()
        self.environment = {
            "EVALSTORE_DATABASE_URL": self.postgres.url(),
            "EVALSTORE_REDIS_URL": self.valkey.url(),
            "EVALSTORE_RUNTIME_DIR": str(self.folder / "run"),
            **_metrics_ports(self.folder),
            "EVALSTORE_OBJECT_STORE_URL": f"file://{quote(str(self.objects))}",
            "EVALSTORE_ARCHIVE_URL": f"file://{quote(str(self.archive))}",
        }
        for store in (self.objects, self.archive):
            store.mkdir(mode=0o700, exist_ok=True)
        upgrade(self.postgres.url())
        if any(process.name == "api" for process in self.processes):
            self.environment |= _service(self.folder)
        began = time.time()
        for process in self.processes:
            process.environment = self.environment
            process.start()
        self._mender.start()
        self._await_work(began)
        lines = [f"{name}={shlex.quote(value)}\n" for name, value in self.environment.items()]
        write_private(self.folder / "environment", "".join(lines))

    def _await_work(self, began: float) -> None:
        give_up = time.monotonic() + READY_WITHIN_S
        while starting := self._starting(began):
            if time.monotonic() > give_up:
                self._show("up", f"still starting: {', '.join(starting)}; what is sent waits until then")
                return
            time.sleep(0.05)

    def _starting(self, began: float) -> list[str]:
        """What does not do its work yet."""
        ready = readiness.workers(self.environment, began) if self.workers else 0
        found = [] if ready >= self.workers else [f"worker ({ready} of {self.workers} processes work)"]
        if "EVALSTORE_API_URL" in self.environment and not readiness.answers(self.environment):
            found.append("HTTP service")
        return found

    def stop(self) -> None:
        """In order: what uses the servers, Valkey, PostgreSQL. Bounded: each has its grace and is killed after it."""
        if self._lock is None:
            return
        self._stopping.set()
        if self._mender.ident is not None:
            self._mender.join()
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
        """Kill what the running `stop` waits for now. Safe in a signal handler."""
        for part in self._parts:
            if part.running:
                part.kill_now()
                if isinstance(part, Server):
                    return

    @property
    def _parts(self) -> list[LocalProcess | Server]:
        """In the order of stopping."""
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

    def _mend(self) -> None:
        """One that died is started again after a wait that doubles each time it does not live long. A dramatiq master ends
        whenever one of its workers does, so this is not rare."""
        parts = self._parts[::-1]
        started = {part.name: time.monotonic() for part in parts}
        wait_s = {part.name: 0.25 for part in parts}
        due: dict[str, float] = {}
        while not self._stopping.wait(0.1):
            for part in parts:
                now = time.monotonic()
                if part.name in due and now >= due[part.name]:
                    del due[part.name]
                    started[part.name] = now
                    try:
                        part.start()
                    except (ServerError, OSError) as error:  # tried again, as one that has ended
                        self._show("up", f"{part.name} cannot be started: {str(error).partition(chr(10))[0]}")
                elif part.name not in due and not part.running:
                    lived = now - started[part.name] >= LIVED_S
                    wait_s[part.name] = 0.5 if lived else min(LONGEST_WAIT_S, 2 * wait_s[part.name])
                    due[part.name] = now + wait_s[part.name]
                    self._show("up", f"{part.name} has ended; starting it again in {wait_s[part.name]:g} s")


def _pump(output: IO[bytes], name: str, show: Show) -> None:
    with output:
        for line in iter(lambda: output.readline(65536), b""):
            show(name, line.decode("utf-8", errors="replace").rstrip("\r\n"))


def _lock(path: Path) -> int:
    """Hold the lock until the descriptor is closed, at the latest by the end of this process."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    for _ in range(20):  # `running` may hold it for an instant, to look
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
