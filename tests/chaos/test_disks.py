"""PostgreSQL on a disk that is full: an outage like others, whatever it is that finds no room."""

import shutil
import time
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from evalstore.local.servers import Postgres
from evalstore.storage.migrations import upgrade
from tests.chaos.conftest import Worlds
from tests.chaos.namespaces import Disk, in_namespaces
from tests.chaos.world import wait_until
from tests.conftest import FAST

_SMALL = FAST | {"min_wal_size": "32MB", "max_wal_size": "48MB", "shared_buffers": "16MB"}


def on_a_small_disk(folder: Path, what: str) -> tuple[Postgres, Disk]:
    """A server whose write-ahead log, or all but that, is on a disk of its own; and that disk."""
    disk = Disk(folder / ("log" if what == "log" else "postgres"), megabytes=128)
    server = Postgres(folder / "postgres", settings=_SMALL)
    server.start()
    upgrade(server.url())
    server.stop()
    place = (disk.folder if what == "log" else folder) / "pg_wal"
    shutil.move(server.data / "pg_wal", place)
    (server.data / "pg_wal").symlink_to(place)
    server.start()
    return server, disk


@pytest.mark.parametrize("what", ["data", "log"])
@in_namespaces
def test_a_full_disk_costs_nothing_but_time(what: str, worlds: Worlds, redis_url: str, tmp_path: Path) -> None:
    """Where no file can grow, statements fail; where the log cannot, the server panics, and again, and then stays away."""
    server, disk = on_a_small_disk(tmp_path, what)
    world = worlds(server.url(), redis_url)
    workers = world.workers(n=1, EVALSTORE_BATCH_EVENTS="500")
    workers.start()
    with world.sending():
        wait_until(lambda: world.applied() > 500, what="work has begun")
        with disk.full():
            if what == "log":
                use_up(server)
            wait_until(world.is_waiting, what="the outage is noticed")
            time.sleep(5)  # Time for several failures.
        if not serves(server):
            server.kill()
            server.start()
        then = world.applied()
        wait_until(lambda: world.applied() > then, within_s=5, what="storing goes on within 5 s of the return")
    world.audit()
    assert workers.stop() < 6
    server.stop()


def use_up(server: Postgres) -> None:
    """What room is left in the log's files: it takes events long to fill them."""
    with suppress(psycopg.Error), psycopg.connect(server.url(), autocommit=True) as conn:
        while True:
            conn.execute("SELECT pg_logical_emit_message(false, 'somebody else', repeat('x', 4000000))")


def serves(server: Postgres) -> bool:
    """Whether it is up; it may be recovering by itself."""
    give_up = time.monotonic() + 3
    while server.running and time.monotonic() < give_up:
        try:
            psycopg.connect(server.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            time.sleep(0.1)
        else:
            return True
    return False
