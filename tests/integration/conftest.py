"""Connections to real servers, and the HTTP service as a process of its own in front of them."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGTERM
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import psycopg
import pytest
import redis
from sqlalchemy import Connection, Engine

from evalstore.local import processes
from evalstore.local.servers import Postgres, Valkey, free_port
from evalstore.storage import database
from evalstore.storage.tables import metadata
from models import jobs
from tasks.keys import QUEUE
from tests.conftest import OF_SERVICE, new_database
from tests.integration.shell import Operator
from worker.broker import Broker

ROOT = Path(__file__).parents[2]
READ, WRITE, BOTH, ADMIN = "read-key-0001", "write-key-0001", "both-key-0001", "admin-key-0001"


class Api:
    """A running service; `read`, `write` and `both` speak to it with such a key, `nobody` with none."""

    def __init__(self, folder: Path, environment: dict[str, str], command: tuple[str, ...] = ("-m", "evalstore.api")) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = command
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("EVALSTORE_")},
            "EVALSTORE_API_HOST": "127.0.0.1",
            "EVALSTORE_API_PORT": str(self.port),
            "EVALSTORE_READ_API_KEYS": f"{READ},{BOTH}",
            "EVALSTORE_WRITE_API_KEYS": f"{BOTH}, {WRITE}",
            "EVALSTORE_ADMIN_API_KEYS": ADMIN,
            "PYTHONPATH": str(ROOT),
            # A private folder, so that its counts are not added to others.
            "EVALSTORE_RUNTIME_DIR": str(folder.resolve() / "running"),
            **environment,
        }
        self.database_url = environment["EVALSTORE_DATABASE_URL"]
        self.redis_url = environment["EVALSTORE_REDIS_URL"]
        self._process: subprocess.Popen[bytes] | None = None
        self._clients: dict[str | None, httpx.Client] = {}
        self._others: list[httpx.Client] = []
        self.log = folder / "api.log"
        self._logged_before = 0

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = processes.start(
                [sys.executable, *self._command], mark=self.folder, output=log, env=self._environment, cwd=self.folder
            )
        give_up = time.monotonic() + 30
        while not self.lives():
            if time.monotonic() > give_up or self._process.poll() is not None:
                pytest.fail(f"the service did not start:\n{self.log.read_text()}")
            time.sleep(0.05)

    def lives(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/live", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    @property
    def pid(self) -> int:
        """Of the process that listens."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(one.status == "LISTEN" and one.laddr.port == self.port for one in process.net_connections("tcp")):
                    return int(process.pid)
        pytest.fail("nothing listens")

    def client(self, key: str | None, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        made = httpx.Client(base_url=self.url, headers=headers, timeout=options.pop("timeout", 60), **options)
        self._others.append(made)
        return made

    @property
    def both(self) -> httpx.Client:
        return self._cached(BOTH)

    @property
    def read(self) -> httpx.Client:
        return self._cached(READ)

    @property
    def write(self) -> httpx.Client:
        return self._cached(WRITE)

    @property
    def admin(self) -> httpx.Client:
        return self._cached(ADMIN)

    @property
    def nobody(self) -> httpx.Client:
        return self._cached(None)

    def _cached(self, key: str | None) -> httpx.Client:
        if key not in self._clients:
            self._clients[key] = self.client(key)
        return self._clients[key]

    @property
    def said(self) -> str:
        """What it logged since it was last emptied."""
        return self.log.read_bytes()[self._logged_before :].decode()

    def empty(self) -> None:
        """Nothing is stored, queued or cached any more, and nobody is connected."""
        self._close_clients()
        with psycopg.connect(self.database_url, autocommit=True) as conn:
            conn.execute(f"TRUNCATE {', '.join(set(metadata.tables) - {'confirmation_position', 'erasure_key'})}")
        with redis.Redis.from_url(self.redis_url) as client:
            client.flushdb()
        self._logged_before = self.log.stat().st_size

    def _close_clients(self) -> None:
        for client in self._others:
            client.close()
        self._others.clear()
        self._clients.clear()

    def terminate(self) -> None:
        """Ask it to stop, and go on."""
        if self._process is not None:
            self._process.send_signal(SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            processes.kill_now(self._process)
            self._process.wait()

    def wait(self) -> None:
        """Until it has ended."""
        if self._process is not None:
            self._process.wait(timeout=40)

    def stop(self) -> None:
        self._close_clients()
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def lines(self, answer: httpx.Response) -> list[dict[str, Any]]:
        return [json.loads(line) for line in answer.text.splitlines()]


@pytest.fixture
def start_api(tmp_path: Path, database_url: str, redis_url: str) -> Iterator[Callable[..., Api]]:
    """`start_api(NAME=value, …)`: a service with these settings besides the usual."""
    started: list[Api] = []

    def start(*, command: tuple[str, ...] = ("-m", "evalstore.api"), **environment: str) -> Api:
        servers = {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url}
        api = Api(tmp_path / f"api-{len(started)}", {**servers, **environment}, command)
        started.append(api)
        api.start()
        return api

    yield start
    for api in started:
        api.stop()


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """For the test's own database."""
    made = database.engine(database_url)
    yield made
    made.dispose()


@pytest.fixture
def conn(engine: Engine) -> Iterator[Connection]:
    with engine.connect() as conn:
        yield conn


@pytest.fixture
def broker(redis_url: str) -> Iterator[Broker]:
    """As a worker has it, without one."""
    made = Broker(url=redis_url, middleware=[])
    for queue in (QUEUE, jobs.QUEUE):
        made.declare_queue(queue)
    yield made
    made.client.close()


@pytest.fixture
def operator(database_url: str, redis_url: str, tmp_path: Path) -> Operator:
    return Operator(database_url, redis_url, tmp_path)


@pytest.fixture(scope="session")
def shared_api(
    tmp_path_factory: pytest.TempPathFactory, shared_postgres: Postgres, migrated: str, shared_valkey: Valkey
) -> Iterator[Api]:
    """One for all tests: take `api` instead, in which nothing is stored."""
    with new_database(shared_postgres, migrated) as database_url:
        servers = {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": shared_valkey.url(OF_SERVICE)}
        made = Api(tmp_path_factory.mktemp("api"), servers)
        made.start()
        yield made
        made.stop()


@pytest.fixture
def api(shared_api: Api) -> Api:
    """A running service with nothing in it, and databases of its own: `api.database_url`, `api.redis_url`.

    What changes how it runs, or reads what it counted since its start, takes `start_api`.
    """
    shared_api.empty()
    return shared_api


class _Peak:
    """How much more memory a process holds at its peak than before."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._before = self._most = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._most = max(self._most, self._process.memory_info().rss)

    def __enter__(self) -> "_Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def grown_bytes(self) -> int:
        return int(self._most - self._before)


@pytest.fixture
def peak_rss() -> Callable[[int], _Peak]:
    """`with peak_rss(pid) as peak: …; peak.grown_bytes`."""
    return _Peak
