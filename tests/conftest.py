"""Real servers, private to the test run, and taken along with it however it ends."""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
import redis
from psycopg import sql

from evalstore.local.servers import Postgres, Valkey
from tests import kafka
from tests.polling import looks

if TYPE_CHECKING:
    from tests.bigquery import BigQuery
    from tests.chaos.world import World
    from tests.clickhouse import ClickHouse
    from tests.seaweedfs import SeaweedFS

# Only a crash of the machine may lose data. So these settings suit tests that kill the server too.
FAST = {"fsync": "off", "full_page_writes": "off", "shared_buffers": "128MB"}
EMPTY, MIGRATED = "template0", "evalstore_migrated"
# Databases of the shared Valkey: some for single tests in turn, and one for the shared service.
DATABASES, OF_SERVICE = 64, 64

_numbers = itertools.count(1)


def pytest_configure() -> None:
    """Whoever runs the tests in the background may have them ignore signals, which programs inherit."""
    for ignored in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(ignored) is signal.SIG_IGN:
            signal.signal(ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL)


def pytest_report_header() -> str:
    """Say which broker stands for Kafka."""
    return kafka.described()


@pytest.fixture(autouse=True)
def _processes_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test starts finds none of what another one started, and no port that another one holds."""
    monkeypatch.setenv("EVALSTORE_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
    monkeypatch.setenv("EVALSTORE_METRICS_PORT", "0")
    monkeypatch.setenv("EVALSTORE_SCHEDULER_METRICS_PORT", "0")
    monkeypatch.setenv("EVALSTORE_SINKS_METRICS_PORT", "0")


@pytest.fixture(scope="session")
def shared_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """One for all tests: take `database_url` instead, a database of the test's own in it."""
    with Postgres(tmp_path_factory.mktemp("postgres"), settings=FAST) as server:
        yield server


@pytest.fixture(scope="session")
def shared_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """One for all tests: take `redis_url` instead, a database of the test's own in it."""
    with Valkey(tmp_path_factory.mktemp("valkey"), settings={"databases": str(DATABASES + 1)}) as server:
        yield server


@pytest.fixture(scope="session")
def migrated(shared_postgres: Postgres) -> str:
    """The name of a database with every migration applied, for cloning, to which nobody stays connected."""
    from evalstore.storage.migrations import upgrade  # noqa: PLC0415  a test of something else runs without storage

    _administer(shared_postgres, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(MIGRATED)))
    upgrade(shared_postgres.url(MIGRATED))
    return MIGRATED


@pytest.fixture
def database_url(shared_postgres: Postgres, migrated: str) -> Iterator[str]:
    """A fresh database with every migration applied."""
    with new_database(shared_postgres, migrated) as url:
        yield url


@pytest.fixture
def empty_database_url(shared_postgres: Postgres) -> Iterator[str]:
    """A fresh database with nothing in it."""
    with new_database(shared_postgres, EMPTY) as url:
        yield url


@pytest.fixture
def redis_url(shared_valkey: Valkey) -> Iterator[str]:
    """An empty database, other than the last test's: what a thread of that one still writes does not show here."""
    url = shared_valkey.url(next(_numbers) % DATABASES)
    with redis.Redis.from_url(url) as client:
        client.flushdb()
        yield url
        client.flushdb()


@pytest.fixture(scope="session")
def initialised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a PostgreSQL that was started once, for copying: what initdb does takes longer than the rest of a start."""
    folder = tmp_path_factory.mktemp("initialised")
    with Postgres(folder, settings=FAST):
        pass
    (folder / "port").unlink()
    return folder


@pytest.fixture
def postgres_server(tmp_path: Path, initialised: Path) -> Iterator[Postgres]:
    """A PostgreSQL of the test's own, to kill, freeze, stop and start; its database `evalstore` is empty."""
    subprocess.run(["cp", "-a", initialised, tmp_path / "postgres"], check=True)
    with Postgres(tmp_path / "postgres", settings=FAST) as server:
        yield server


@pytest.fixture
def valkey_server(tmp_path: Path) -> Iterator[Valkey]:
    """A Valkey of the test's own, to kill, freeze, stop and start."""
    with Valkey(tmp_path / "valkey") as server:
        yield server


@pytest.fixture
def worlds(tmp_path: Path) -> Iterator[Callable[..., "World"]]:
    """`worlds(database_url, redis_url)` makes one; its workers end with the test, and their logs show if it failed."""
    from tests.chaos.world import World  # noqa: PLC0415  most runs need no worker

    made: list[World] = []

    def make(database_url: str, redis_url: str, namespace: str = "dramatiq") -> World:
        made.append(World(database_url, redis_url, tmp_path, namespace))
        return made[-1]

    yield make
    for world in made:
        world.close()
        for workers in world.fleet:
            if workers.log.exists():
                print(f"--- {workers.log.name}\n{workers.log.read_text(errors='replace')[-6000:]}")


@pytest.fixture
def world(worlds: Callable[..., "World"], database_url: str, redis_url: str) -> "World":
    """Workers of the test's own, on the servers that all tests share."""
    return worlds(database_url, redis_url)


@pytest.fixture(scope="session")
def eventually() -> Callable[..., None]:
    """`eventually(lambda: ..., within_s=10)`: wait until that is true, or fail with what was waited for."""
    return _eventually


def _eventually(is_so: Callable[[], object], *, within_s: float = 10.0, what: str = "what was waited for") -> None:
    if not any(is_so() for _ in looks(within_s)):
        pytest.fail(f"{what} did not come about within {within_s:g} s")


def _administer(server: Postgres, statement: sql.Composed) -> None:
    with psycopg.connect(server.url("postgres"), autocommit=True) as conn:
        conn.execute(statement)


@contextlib.contextmanager
def new_database(server: Postgres, template: str) -> Iterator[str]:
    """Its address; it goes at the end, whoever is connected."""
    name = f"test_{next(_numbers)}"
    create = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
    _administer(server, create.format(sql.Identifier(name), sql.Identifier(template)))
    yield server.url(name)
    _administer(server, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="session")
def living_in() -> Callable[[Path], list[str]]:
    """What runs of a folder, seen from outside: whatever works in it, or names it in its arguments or environment."""
    return _living_in


def _living_in(folder: Path) -> list[str]:
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            if str(folder).encode() in words or (process / "cwd").readlink().is_relative_to(folder):
                found.append(f"{process.name}: {(process / 'cmdline').read_bytes().replace(bytes(1), b' ').decode()}")
    return found


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="session")
def for_anyone() -> Iterator[dict[str, str]]:
    """The environment, PYTHON in it, with which any user runs our code. A test that needs it runs as root."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    paths = f"{Path(__file__).parent.parent}:{Path(psycopg.__file__).parent.parent}"
    env = {"PYTHON": sys.executable, "PYTHONPATH": paths, "PATH": os.defpath}
    with tempfile.TemporaryDirectory() as copy:
        if not _runs_for_nobody(env):
            env |= {"PYTHON": f"{copy}/bin/python", "LD_LIBRARY_PATH": f"{copy}/lib"}
            _copy_python(Path(copy))
        if not _runs_for_nobody(env):
            pytest.skip("the code or its dependencies lie where no other user may read")
        yield env


def _runs_for_nobody(env: dict[str, str]) -> bool:
    with contextlib.suppress(PermissionError):
        command = [env["PYTHON"], "-c", "import evalstore.local.stack"]
        done = subprocess.run(command, env=env, cwd="/", user=65534, group=65534, check=False, capture_output=True)
        return done.returncode == 0
    return False


def _copy_python(to: Path) -> None:
    """The one that runs here may be in root's home."""
    to.chmod(0o755)
    (to / "bin").mkdir()
    shutil.copy(Path(sys.executable).resolve(), to / "bin/python")
    library, unused = Path(sysconfig.get_path("stdlib")), ("test", "site-packages", "idlelib", "tkinter", "config-*")
    shutil.copytree(library, to / "lib" / library.name, ignore=shutil.ignore_patterns(*unused))
    for shared in library.parent.glob("libpython*.so*"):
        shutil.copy(shared, to / "lib")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator["SeaweedFS"]:
    """One for all tests: take `s3_url` instead, a prefix of the test's own in its bucket. What cannot start fails the test."""
    from tests.seaweedfs import SeaweedFS  # noqa: PLC0415  most runs need no S3

    server = SeaweedFS(tmp_path_factory.mktemp("seaweedfs"))
    server.start()
    yield server
    server.kill()  # A clean shutdown takes ten seconds, and nobody reads the data again.


@pytest.fixture(scope="session")
def kafka_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kafka.Kafka]:
    """One for all tests, which take topics of their own."""
    server = kafka.broker(tmp_path_factory.mktemp("kafka"))
    if server is None:
        pytest.skip("neither Apache Kafka nor Tansu is here")
    with server:
        yield server


@pytest.fixture(scope="session")
def clickhouse_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator["ClickHouse"]:
    """One for all tests, which take tables of their own."""
    from tests import clickhouse  # noqa: PLC0415  most runs need none

    if not clickhouse.is_installed():
        pytest.skip("chdb is not installed: make setup-integrations")
    with clickhouse.ClickHouse(tmp_path_factory.mktemp("clickhouse")) as server:
        yield server


@pytest.fixture(scope="session")
def bigquery_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator["BigQuery"]:
    """One for all tests, which take datasets of their own."""
    from tests import bigquery  # noqa: PLC0415

    if not bigquery.is_installed():
        pytest.skip("bqemulator is not installed: make setup-integrations")
    with bigquery.BigQuery(tmp_path_factory.mktemp("bigquery")) as server:
        yield server


@pytest.fixture
def s3_url(s3_server: "SeaweedFS", monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place in the bucket, which is shared: the first object in a new one takes the server a second."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.bucket}/test-{next(_numbers)}"
