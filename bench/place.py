"""Start the servers of a run and the processes of the sides, and describe the machine."""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import psutil
import psycopg
import redis

from bench.sides import Shape, Side
from evalstore.local import processes
from evalstore.local.servers import Postgres, Valkey
from evalstore.storage import migrations

ROOT: Final = Path(__file__).parents[1]
_MIGRATED: Final = "evalstore_migrated"


class Stored(NamedTuple):
    """The number of committed events, and the time of the last commit in seconds since 1970."""

    events: int
    last_s: float


class Totals(NamedTuple):
    """The numbers of records, of complete records, and of confirmations."""

    evaluations: int
    complete: int
    confirmations: int


class Cpu(NamedTuple):
    """Processor time in seconds."""

    workers: float
    postgres: float
    valkey: float


class Place:
    """A PostgreSQL and a Valkey for this run, set up as `evalstore up` does. `peers` is the Python of the peers, or None."""

    def __init__(self, peers: Path | None) -> None:
        self.peers = peers
        self.more: dict[str, str] = {}  # Variables for all processes, until they are removed.
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            # Not the folder for temporary files, which may be in memory: writes must reach a disk.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evalstore-bench-", dir="/var/tmp")))
            folder.chmod(0o755)
            self.folder = folder
            # Records commit times, so that counting need not compete with storing.
            self.postgres = stack.enter_context(Postgres(folder / "postgres", settings={"track_commit_timestamp": "on"}))
            self.valkey = stack.enter_context(Valkey(folder / "valkey"))
            migrations.upgrade(self.postgres.url())
            with psycopg.connect(self.postgres.url("postgres"), autocommit=True) as conn:
                conn.execute(f"CREATE DATABASE {_MIGRATED} TEMPLATE evalstore")
            self.redis = stack.enter_context(redis.Redis.from_url(self.valkey.url()))
            self._exit = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._exit.close()

    def python(self, side: Side | None) -> str:
        if side is None or not side.is_peer:
            return sys.executable
        if self.peers is None:
            raise RuntimeError(f"{side.title} is not here: `make bench` installs it")
        return str(self.peers)

    def environment(self, shape: Shape | None = None) -> dict[str, str]:
        """Return the environment for a side's processes."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("EVALSTORE_")}
        variables |= {"EVALSTORE_DATABASE_URL": self.postgres.url(), "EVALSTORE_REDIS_URL": self.valkey.url()}
        variables |= {"RQ_REDIS_URL": self.valkey.url(), "BENCH_THREADS": str(shape.threads if shape else 1)}
        return variables | self.more

    def reset(self, *, keep_rows: bool = False) -> None:
        """Remove all messages, and all rows (or only the log and the records), and let the servers settle."""
        self.redis.flushall()
        with psycopg.connect(self.postgres.url("postgres"), autocommit=True) as conn:
            if not keep_rows:
                conn.execute("DROP DATABASE evalstore WITH (FORCE)")
                conn.execute(f"CREATE DATABASE evalstore TEMPLATE {_MIGRATED}")
            conn.execute("CHECKPOINT")
        if keep_rows:
            with psycopg.connect(self.postgres.url(), autocommit=True) as conn:
                conn.execute("TRUNCATE confirmations")
                conn.execute("UPDATE confirmation_position SET stream_ms = 0, stream_seq = 0")

    def settle(self) -> None:
        """Let Valkey rewrite its append-only file now. Otherwise filling the queue starts a rewrite during some rounds only."""
        with suppress(redis.ResponseError):  # A rewrite is already running.
            self.redis.bgrewriteaof()
        while (state := self.redis.info("persistence"))["aof_rewrite_in_progress"] or state["aof_rewrite_scheduled"]:
            time.sleep(0.05)

    def run(self, side: Side | None, module: str, *options: str) -> str:
        """Run a module of ours in a side's environment and return its output. Raises RuntimeError with its errors."""
        command = [self.python(side), "-m", module, *options]
        done = subprocess.run(command, cwd=ROOT, env=self.environment(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr[-2000:]}")
        return done.stdout

    def fill(self, side: Side, count: int, *, seed: int, ordered: bool = False) -> None:
        """Enqueue events for a side."""
        options = ["--side", side.name, "--count", str(count), "--seed", str(seed)]
        self.run(side, "bench.fill", *options, *(["--ordered"] if ordered else []))

    @contextmanager
    def workers(self, side: Side, shape: Shape) -> Iterator["Workers"]:
        """Run a side's workers until the end of the block."""
        command = [self.python(side), *side.command(shape)]
        log_path = self.folder / f"{side.name}.log"
        with log_path.open("wb") as log, ExitStack() as stack:
            guards = []
            for _ in range(shape.processes if side.each else 1):
                guard = processes.start(command, mark=self.folder, output=log, grace_s=5, cwd=ROOT, env=self.environment(shape))
                stack.callback(guard.wait)
                stack.callback(guard.terminate)
                guards.append(guard)
            yield Workers(guards, log_path)

    def stored(self, eval_ids: list[str]) -> Stored:
        """Return how many events of these evaluations are committed, and the time of the last commit."""
        with psycopg.connect(self.postgres.url()) as conn:
            query = "SELECT count(*), extract(epoch FROM max(pg_xact_commit_timestamp(xmin)))::float8 FROM evaluation_events"
            events, last = conn.execute(f"{query} WHERE eval_id = ANY(%s)".encode(), [eval_ids]).fetchone() or (0, None)
            return Stored(events, last or 0.0)

    def totals(self, eval_ids: list[str]) -> Totals:
        """Count the records of these evaluations, and the confirmations in the outbox."""
        query = "SELECT count(*), count(*) FILTER (WHERE version = 3 AND status = 'completed') FROM evaluations"
        with psycopg.connect(self.postgres.url()) as conn:
            evaluations, complete = conn.execute(f"{query} WHERE eval_id = ANY(%s)".encode(), [eval_ids]).fetchone() or (0, 0)
            (confirmations,) = _row(conn, "SELECT coalesce(sum(count), 0)::bigint FROM confirmations")
            return Totals(evaluations, complete, confirmations)

    def cpu(self, workers: "Workers | None" = None) -> Cpu:
        """Return the processor time used until now."""
        return Cpu(
            workers.cpu_s() if workers else 0.0,
            _cpu_s([psutil.Process(self.postgres.pid)]),
            _cpu_s([psutil.Process(self.valkey.pid)]),
        )

    def describe(self) -> dict[str, Any]:
        """Describe the machine, the servers and the libraries."""
        with psycopg.connect(self.postgres.url()) as conn:
            (postgres,) = _row(conn, "SHOW server_version")
        info = self.redis.info("server")
        names = ["dramatiq", "redis", "psycopg", "SQLAlchemy", "msgspec", "pydantic"]
        return {
            "cpu": _first("/proc/cpuinfo", "model name") or platform.processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "file_system": next((part.fstype for part in _mounts() if str(self.folder).startswith(part.mountpoint)), "unknown"),
            "fsync_ms": round(self._fsync_ms(), 2),
            "postgresql": postgres,
            "valkey": info.get("valkey_version", info["redis_version"]),
            "libraries": {name: version(name) for name in names} | self._peer_versions(),
            "load_before": round(os.getloadavg()[0], 2),
        }

    def _fsync_ms(self) -> float:
        """Return the milliseconds that this disk needs to make 8 KiB durable: the median of 50."""
        taken = []
        with (self.folder / "fsync").open("wb") as file:
            for _ in range(50):
                file.write(bytes(8192))
                file.flush()
                begin = time.perf_counter()
                os.fdatasync(file.fileno())
                taken.append(time.perf_counter() - begin)
        return statistics.median(taken) * 1000

    def _peer_versions(self) -> dict[str, str]:
        if self.peers is None:
            return {}
        code = "from importlib.metadata import version as v\nfor n in 'celery rq arq taskiq taskiq-redis saq hiredis'.split(): "
        done = subprocess.run([self.peers, "-c", code + "print(n, v(n))"], capture_output=True, text=True, check=True)
        return dict(line.split() for line in done.stdout.splitlines())


class Workers:
    """All running processes of one side."""

    def __init__(self, guards: Sequence["subprocess.Popen[bytes]"], log: Path) -> None:
        self._guards, self._log = guards, log

    def tree(self) -> list[psutil.Process]:
        """Return all processes except the guards, which use no time."""
        processes = []
        for guard in self._guards:
            if guard.poll() is not None:
                raise RuntimeError(f"a worker ended with status {guard.returncode}:\n{self.tail()}")
            processes += psutil.Process(guard.pid).children(recursive=True)
        return processes

    def tail(self) -> str:
        """Return the end of the processes' output."""
        return self._log.read_text(errors="replace")[-3000:]

    def cpu_s(self) -> float:
        return _cpu_s(self.tree(), recursive=False)

    def rss_bytes(self) -> list[int]:
        """Return the resident memory of each process."""
        sizes = []
        for process in self.tree():
            try:
                sizes.append(process.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        return sizes

    def wait_until_idle(self, *, within_s: float = 15.0) -> None:
        """Wait until the processes use less than a tenth of one core over half a second."""
        give_up = time.monotonic() + within_s
        before = self.cpu_s()
        while time.monotonic() < give_up:
            time.sleep(0.5)
            now = self.cpu_s()
            if now - before < 0.05:
                return
            before = now


def _cpu_s(roots: Sequence[psutil.Process], *, recursive: bool = True) -> float:
    """Return the processor time of processes and of their children, also of those that have ended."""
    total = 0.0
    for root in roots:
        for process in [root, *(root.children(recursive=True) if recursive else [])]:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system + (times.children_user + times.children_system if process == root else 0)
    return total


def _row(conn: psycopg.Connection[Any], query: str) -> tuple[Any, ...]:
    row = conn.execute(query.encode()).fetchone()
    return row or ()


def _first(path: str, name: str) -> str:
    lines = Path(path).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _mounts() -> list[Any]:
    return sorted(psutil.disk_partitions(all=True), key=lambda part: -len(part.mountpoint))
