"""Content moves to the archive, verified, by however many at once and whoever dies over it, and leaves the database."""

import base64
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import cycle
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine
from uuid_utils.compat import uuid4

from evalstore.objects import object_store
from evalstore.objects.directory import DirectoryStore
from evalstore.objects.object_store import Stores
from evalstore.storage import archive, content_reader, database, event_store
from evalstore.storage.archive import Archive, Row
from models.content import Reference
from models.errors import ObjectStoreOutage
from models.events import parse
from models.settings import Settings
from tests.integration.commands import python

ROOT = Path(__file__).parents[2]
THRESHOLD = 100_000


@pytest.fixture(params=["directory", "bucket"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """An archive in a directory, and one in S3."""
    if request.param == "directory":
        return Settings(object_store_url=f"file://{tmp_path}/objects", archive_threshold_bytes=THRESHOLD)
    url, server = request.getfixturevalue("s3_url"), request.getfixturevalue("s3_server")
    return Settings(object_store_url=url, s3_endpoint_url=server.endpoint, archive_threshold_bytes=THRESHOLD)


@pytest.fixture
def at(settings: Settings) -> Iterator[Archive]:
    opened = Archive.of(settings)
    yield opened
    opened.close()


def environment(settings: Settings, database_url: str) -> dict[str, str]:
    """That of a process of its own with these settings."""
    given = {"DATABASE_URL": database_url, "OBJECT_STORE_URL": settings.object_store_url or ""}
    given |= {"ARCHIVE_THRESHOLD_BYTES": str(THRESHOLD), "S3_ENDPOINT_URL": settings.s3_endpoint_url or ""}
    return {**os.environ, **{f"EVALSTORE_{name}": value for name, value in given.items()}}


def finish(conn: Connection, eval_id: str, output: bytes | Reference, **fields: Any) -> None:
    """Store the result of an evaluation."""
    given = {"event_id": uuid4(), "occurred_at": datetime.now(UTC).isoformat(), "exit_code": 0, **fields}
    if isinstance(output, bytes):
        given["output_b64"] = base64.b64encode(output).decode()
    else:
        given["output_ref"] = output._asdict()
    event_store.store(conn, [parse({"type": "evaluation:completed", "eval_id": eval_id, **given})])


def rows(conn: Connection) -> dict[str, tuple[Any, ...]]:
    """By evaluation: where its content is, its bytes in the database, what went wrong with moving it."""
    with conn.begin():
        found = database.driver(conn).execute("SELECT eval_id, store, data, failures, failure FROM contents").fetchall()
    return {eval_id: tuple(rest) for eval_id, *rest in found}


def archived(conn: Connection, at: Archive, eval_id: str) -> bytes:
    """The content of an evaluation, as its row says, out of the archive."""
    with conn.begin():
        query = "SELECT size, sha256, store, encoding, data FROM contents WHERE eval_id = %s"
        ((size, sha256, store, encoding, data),) = database.driver(conn).execute(query, [eval_id]).fetchall()
    assert data is None
    assert store == at.place
    return b"".join(object_store.read(at.store, Reference(sha256.hex(), size, encoding)))


def run(conn: Connection, at: Archive, **options: Any) -> archive.Moved:
    return archive.run_once(conn, at, datetime.now(UTC), **options)


def counts(moved: archive.Moved) -> tuple[int, int, int]:
    return moved.moved, moved.bytes, moved.failed


def test_what_is_above_the_threshold_moves_and_what_is_not_stays(conn: Connection, at: Archive) -> None:
    large, small = os.urandom(THRESHOLD + 1), os.urandom(THRESHOLD)
    finish(conn, "large", large)
    finish(conn, "small", small)

    assert counts(run(conn, at)) == (1, len(large), 0)

    assert archived(conn, at, "large") == large
    assert rows(conn)["small"] == (None, small, 0, None)
    assert counts(run(conn, at)) == (0, 0, 0)


def test_three_megabytes_eight_times_leave_the_tables_as_large_as_the_rest_needs(
    conn: Connection, at: Archive, database_url: str
) -> None:
    def table_bytes() -> int:
        with psycopg.connect(database_url, autocommit=True) as own:
            own.execute("VACUUM FULL contents")
            ((size,),) = own.execute("SELECT pg_total_relation_size('contents')").fetchall()
        return int(size)

    finish(conn, "small", os.urandom(20_000))
    before = table_bytes()
    outputs = {f"e{number}": os.urandom(3_000_000) for number in range(8)}
    for eval_id, output in outputs.items():
        finish(conn, eval_id, output)
    assert table_bytes() > before + 24_000_000

    assert counts(run(conn, at)) == (8, 24_000_000, 0)

    assert table_bytes() <= before + 8192
    for eval_id, output in outputs.items():
        assert archived(conn, at, eval_id) == output


@pytest.mark.parametrize(
    ("fields", "moves"),
    [
        ({"occurred_at": "2026-01-01T00:00:00Z"}, True),
        ({}, False),
    ],
)
def test_with_an_age_set_all_content_of_what_finished_before_moves(
    conn: Connection, settings: Settings, fields: dict[str, Any], moves: bool
) -> None:
    at = Archive.of(settings.model_copy(update={"archive_after_days": 7.0}))
    queued = {"type": "evaluation:queued", "eval_id": "e", "event_id": uuid4(), "occurred_at": "2025-12-31T00:00:00Z"}
    event_store.store(conn, [parse({**queued, "code": "c" * 5000})])
    event_store.store(conn, [parse({**queued, "eval_id": "open", "code": "o" * 5000})])
    finish(conn, "e", b"o" * 5000, **fields)

    assert run(conn, at).moved == (2 if moves else 0)
    assert rows(conn)["open"][0] is None
    at.close()


def test_content_moves_from_a_directory_to_an_archive_elsewhere_and_its_copy_is_left_to_the_sweep(
    conn: Connection, tmp_path: Path, settings: Settings
) -> None:
    apart = settings.model_copy(
        update={"object_store_url": f"file://{tmp_path}/near", "archive_url": settings.object_store_url}
    )
    near = DirectoryStore(tmp_path / "near")
    output, other = os.urandom(THRESHOLD + 1), os.urandom(1000)
    finish(conn, "e", object_store.put(near, output).reference)
    finish(conn, "small", object_store.put(near, other).reference)
    finish(conn, "inline", os.urandom(THRESHOLD + 2))
    at = Archive.of(apart)

    assert run(conn, at).moved == 2

    assert archived(conn, at, "e") == output
    assert {eval_id: row[0] for eval_id, row in rows(conn).items()} == {"e": "archive", "small": "objects", "inline": "archive"}
    assert len(list(near.objects())) == 2
    at.close()


def test_content_that_is_not_what_its_hash_says_stays_is_reported_and_holds_up_nothing(conn: Connection, at: Archive) -> None:
    finish(conn, "bad", os.urandom(THRESHOLD + 2))
    finish(conn, "good", os.urandom(THRESHOLD + 1))
    with conn.begin():
        database.driver(conn).execute("UPDATE contents SET data = '\\x00' || substring(data, 2) WHERE eval_id = 'bad'")

    assert counts(run(conn, at))[::2] == (1, 1)

    store, data, failures, failure = rows(conn)["bad"]
    assert (store, len(data), failures) == (None, THRESHOLD + 2, 1)
    assert "expected" in failure
    assert counts(run(conn, at)) == (0, 0, 0)  # It is retried only after a delay.
    assert counts(archive.run_once(conn, at, datetime.now(UTC) + timedelta(minutes=3))) == (0, 0, 1)
    assert archive.retry_failed(conn, datetime.now(UTC)) == 1
    assert run(conn, at).failed == 1
    assert len(list(at.store.objects())) == 1


def test_an_object_that_is_there_and_damaged_is_replaced_before_the_other_copy_goes(conn: Connection, tmp_path: Path) -> None:
    at = Archive.of(Settings(object_store_url=f"file://{tmp_path}/objects", archive_threshold_bytes=THRESHOLD))
    output = os.urandom(THRESHOLD + 1)
    key = object_store.put(at.store, output).reference.key
    path = tmp_path / "objects" / key[:2] / key[2:4] / key
    path.write_bytes(output[:-1] + bytes([output[-1] ^ 1]))
    finish(conn, "e", output)

    assert run(conn, at).moved == 1
    assert archived(conn, at, "e") == output


def test_the_archive_away_ends_the_run_and_the_next_one_does_the_rest(conn: Connection, tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    settings = Settings(object_store_url=f"file://{tmp_path}/mount/objects", archive_threshold_bytes=THRESHOLD)
    at = Archive.of(settings)
    for number in range(10):
        finish(conn, f"e{number}", os.urandom(THRESHOLD + 1 + number))
    (tmp_path / "mount").rename(tmp_path / "unmounted")

    ended = run(conn, at)
    assert isinstance(ended.outage, ObjectStoreOutage)
    assert counts(ended) == (0, 0, 3)

    (tmp_path / "unmounted").rename(tmp_path / "mount")
    assert run(conn, at).moved == 7
    assert archive.run_once(conn, at, datetime.now(UTC) + timedelta(minutes=3)).moved == 3
    assert {row[0] for row in rows(conn).values()} == {"objects"}


DIES = """
import os, signal, sys
from datetime import UTC, datetime
from models.settings import settings
from evalstore.storage import archive, database
def watch(step, row):
    if step == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
with database.engine(settings().database_url.get_secret_value()).connect() as conn:
    archive.run_once(conn, archive.Archive.of(settings()), datetime.now(UTC), watch=watch)
"""


@pytest.mark.parametrize("step", ["claimed", "uploaded", "verified", "pointed", "moved"])
def test_killed_at_any_step_nothing_is_lost_and_nothing_is_there_twice(
    conn: Connection, at: Archive, settings: Settings, database_url: str, step: str
) -> None:
    outputs = {f"e{number}": os.urandom(THRESHOLD + 1 + number) for number in range(3)}
    for eval_id, output in outputs.items():
        finish(conn, eval_id, output)
    object_store.put(at.store, b"there is a store")

    died = subprocess.run(
        [*python(), "-c", DIES, step], env=environment(settings, database_url), cwd=ROOT, check=False, timeout=60
    )

    assert died.returncode == -signal.SIGKILL
    gone = [eval_id for eval_id, (store, data, *_) in rows(conn).items() if store is not None or data is None]
    assert len(gone) == (1 if step == "moved" else 0)
    assert len(list(at.store.objects())) == (1 if step == "claimed" else 2)
    assert run(conn, at).moved == 3 - len(gone)
    assert len(list(at.store.objects())) == 4
    for eval_id, output in outputs.items():
        assert archived(conn, at, eval_id) == output


def test_several_at_once_share_the_work(engine: Engine, conn: Connection, at: Archive) -> None:
    outputs = {f"e{number}": os.urandom(THRESHOLD + 1 + number) for number in range(40)}
    outputs |= {f"same{number}": outputs["e0"] for number in range(5)}
    for eval_id, output in outputs.items():
        finish(conn, eval_id, output)
    uploads: list[Row] = []
    moved: list[int] = []

    def work() -> None:
        with engine.connect() as own:
            moved.append(run(own, at, watch=lambda step, row: uploads.append(row) if step == "uploaded" else None).moved)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(moved) == 45
    assert sorted(row.eval_id for row in uploads) == sorted(outputs)
    assert len(list(at.store.objects())) == 40
    for eval_id, output in outputs.items():
        assert hashlib.sha256(archived(conn, at, eval_id)).digest() == hashlib.sha256(output).digest()


def test_readers_see_the_right_bytes_while_two_archivers_work(
    engine: Engine, conn: Connection, at: Archive, settings: Settings
) -> None:
    at = at._replace(threshold_bytes=8000)
    count = 1000
    outputs = {f"e{number}": os.urandom(8001 + number) for number in range(count)}
    for eval_id, output in outputs.items():
        finish(conn, eval_id, output)
    read = dict.fromkeys(outputs, 0)
    wrong: list[str] = []
    done = threading.Event()
    stores = Stores(settings)

    def read_on(seed: int) -> None:
        names = sorted(outputs, key=lambda name: hashlib.sha256(f"{seed}{name}".encode()).digest())
        for eval_id in cycle(names):
            if done.is_set():
                return
            with engine.connect() as own:
                found = content_reader.find(own, eval_id, "output")
            assert found
            if b"".join(content_reader.read(engine.connect, stores, found)) != outputs[eval_id]:
                wrong.append(eval_id)
            read[eval_id] += 1

    def work() -> None:
        with engine.connect() as own:
            while rows_left(own):
                run(own, at)

    with ThreadPoolExecutor(4) as pool:
        reading = [pool.submit(read_on, seed) for seed in range(2)]
        for archiving in [pool.submit(work) for _ in range(2)]:
            archiving.result()
        done.set()
        for reader in reading:
            reader.result()
    assert wrong == []
    assert sum(read.values()) > 0
    assert all(archived(conn, at, eval_id) == output for eval_id, output in outputs.items())
    stores.close()


def rows_left(conn: Connection) -> bool:
    """Whether anything is in the database still."""
    with conn.begin():
        return bool(database.driver(conn).execute("SELECT 1 FROM contents WHERE store IS NULL LIMIT 1").fetchall())


FILL = """
INSERT INTO evaluations (eval_id, status, attempt, version, metadata, finished_at, result_event_id)
SELECT 'f' || n, 'completed', 1, 1, '{}', now(), md5(n::text)::uuid FROM generate_series(1, 20000) n;
INSERT INTO contents (eval_id, event_id, kind, size, sha256, data, store, occurred_at)
SELECT 'f' || n, md5(n::text)::uuid, 'output', 5000, sha256(n::text::bytea), 'x', CASE WHEN n % 2 = 0 THEN 'objects' END, now()
FROM generate_series(1, 20000) n;
"""


def test_what_is_not_due_is_not_read(conn: Connection, tmp_path: Path, database_url: str) -> None:
    near, far = f"file://{tmp_path}/near", f"file://{tmp_path}/far"
    at = Archive.of(Settings(object_store_url=near, archive_url=far, archive_after_days=7.0))
    finish(conn, "large", os.urandom(1_000_001))
    finish(conn, "old", os.urandom(5000), occurred_at="2026-01-01T00:00:00Z")
    with conn.begin():
        database.driver(conn).execute(FILL)
    with psycopg.connect(database_url, autocommit=True) as own:
        own.execute("VACUUM ANALYZE")

    for query in archive.due(at):
        with conn.begin():
            raw = database.driver(conn)
            raw.execute(archive.PLAN)
            plan = raw.execute(
                "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + query, archive.values(at, datetime.now(UTC))
            ).fetchall()[0][0][0]["Plan"]
        assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 30, plan
        assert plan["Actual Rows"] <= 1
        assert "Sort" not in str(plan)
    assert run(conn, at).moved == 2


MEMORY = """
import os
from datetime import UTC, datetime
from pathlib import Path
from models.settings import settings
from evalstore.storage import archive, database; from evalstore.objects import object_store as objects

def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024

with database.engine(settings().database_url.get_secret_value()).connect() as conn:
    at = archive.Archive.of(settings())
    objects.verify(at.store, objects.put(at.store, os.urandom(1000)).reference)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
    before = status("VmRSS")
    done = archive.run_once(conn, at, datetime.now(UTC))
    print(done.moved, status("VmHWM") - before)
"""


def test_memory_does_not_grow_with_the_size_of_content(
    conn: Connection, at: Archive, settings: Settings, database_url: str
) -> None:
    finish(conn, "e", os.urandom(100 * 2**20))

    done = subprocess.run(
        [sys.executable, "-c", MEMORY], env=environment(settings, database_url), cwd=ROOT, capture_output=True, check=True
    )

    moved, grown = map(int, done.stdout.split())
    print(f"memory grew by {grown / 2**20:.1f} MiB")
    assert moved == 1
    assert grown < 32 * 2**20
