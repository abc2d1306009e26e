"""The sweep removes what nothing refers to, and never what a message, a dead letter or a row still needs."""

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from dramatiq import Message
from sqlalchemy import Connection
from uuid_utils.compat import uuid4

from evalstore.objects import object_store
from evalstore.objects.s3 import S3Store
from evalstore.storage import archive, database, event_store, garbage_collect, redrives
from evalstore.storage.archive import Archive
from evalstore.storage.garbage_collect import Collected, Target
from evalstore.telemetry import backlog
from models.content import Reference
from models.errors import ObjectMissing, ObjectStoreOutage, ObjectUnavailable, RedisOutage
from models.events import parse
from models.settings import Settings
from tasks.keys import QUEUE
from tasks.spool import Spool
from tasks.touch import ObjectToucher
from tests.chaos.world import wait_until
from tests.factories import unique_event
from tests.integration.s3_relay import Fault, S3Relay
from worker import dead_letter_mover
from worker.broker import Broker

GRACE = timedelta(days=7)
MONTH = timedelta(days=30)


@pytest.fixture(params=["directory", "bucket"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    if request.param == "directory":
        return Settings(object_store_url=f"file://{tmp_path}/objects")
    url, server = request.getfixturevalue("s3_url"), request.getfixturevalue("s3_server")
    return Settings(object_store_url=url, s3_endpoint_url=server.endpoint)


@pytest.fixture
def target(settings: Settings) -> Iterator[Target]:
    (found,) = garbage_collect.targets(settings)
    yield found
    found.store.close()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool", max_bytes=1_000_000)


@pytest.mark.parametrize("there", [True, False])
def test_a_directory_with_two_names_is_one_store(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "objects").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "objects")
    for other in ("objects/", "link"):
        settings = Settings(object_store_url=f"file://{tmp_path}/objects", archive_url=f"file://{tmp_path}/{other}")
        assert [target.places for target in garbage_collect.targets(settings)] == [("objects", "archive")]
        assert Archive.of(settings).place == "objects"
    apart = Settings(object_store_url=f"file://{tmp_path}/objects", archive_url=f"file://{tmp_path}/elsewhere")
    assert [target.places for target in garbage_collect.targets(apart)] == [("objects",), ("archive",)]


class Sweeper:
    """Sweeps as if after some time."""

    def __init__(self, conn: Connection, target: Target, broker: Broker, spool: Spool) -> None:
        self._given, self._broker, self._spool = (conn, target), broker, spool

    def after(self, time: timedelta, **options: Any) -> Collected:
        longest_s = garbage_collect.longest_wait(GRACE).total_seconds()
        return garbage_collect.run_once(
            *self._given,
            datetime.now(UTC) + time,
            GRACE,
            lambda: backlog.snapshot(self._broker, self._spool, longest_s=longest_s),
            **options,
        )


@pytest.fixture
def sweeper(conn: Connection, target: Target, broker: Broker, spool: Spool) -> Sweeper:
    return Sweeper(conn, target, broker, spool)


def put(target: Target) -> Reference:
    """Content that is nowhere else."""
    return object_store.put(target.store, os.urandom(2000)).reference


def event(reference: Reference) -> dict[str, Any]:
    return unique_event("completed", occurred_at=datetime.now(UTC).isoformat(), exit_code=0, output_ref=reference._asdict())


def message(reference: Reference, sent_at: datetime | None = None) -> Message[None]:
    sent_ms = int((sent_at or datetime.now(UTC)).timestamp() * 1000)
    return Message(QUEUE, "store_evaluation", (event(reference),), {}, {}, str(uuid4()), sent_ms)


def keys(target: Target) -> set[str]:
    return {found.key for found in target.store.objects()}


def test_what_nothing_names_goes_once_it_is_older_than_the_grace(sweeper: Sweeper, target: Target) -> None:
    orphans = [put(target) for _ in range(3)]

    assert sweeper.after(timedelta(days=6)).removed == 0
    looked = sweeper.after(timedelta(days=8), remove=False)
    assert (looked.objects, looked.removed, looked.bytes) == (3, 3, 6000)
    assert len(keys(target)) == 3
    assert sweeper.after(timedelta(days=8)).removed == 3
    assert keys(target) == set()
    for orphan in orphans:
        with pytest.raises(ObjectMissing):
            object_store.head(target.store, orphan)


def test_an_object_that_the_store_keeps_does_not_keep_the_others(
    conn: Connection, broker: Broker, spool: Spool, s3_url: str, s3_server: Any
) -> None:
    with S3Relay(s3_server.port) as relay:
        settings = Settings(object_store_url=s3_url, s3_endpoint_url=relay.endpoint)
        (target,) = garbage_collect.targets(settings)
        locked = min((put(target) for _ in range(3)), key=lambda reference: reference.key)  # the first of the listing
        path = f"{s3_url.rpartition('/')[2]}/{locked.key}"
        relay.fail(
            lambda request: request.method == "DELETE" and request.path.endswith(path), Fault("answer", (403, "AccessDenied"))
        )
        with pytest.raises(ObjectUnavailable, match=locked.key):
            Sweeper(conn, target, broker, spool).after(timedelta(days=8))
        assert keys(target) == {locked.key}
        target.store.close()


def test_what_a_message_a_dead_letter_or_a_row_names_stays(
    sweeper: Sweeper, target: Target, broker: Broker, conn: Connection, spool: Spool
) -> None:
    queued, delayed, dead, buried, kept, stored, orphan = [put(target) for _ in range(7)]
    broker.enqueue(message(queued))
    broker.enqueue(message(delayed), delay=60_000)
    broker.enqueue(message(buried))
    bury(broker, broker.client.rpop(broker.keys(QUEUE).queue))
    assert dead_letter_mover.move(conn, broker, broker.lua) == 1
    broker.enqueue(message(dead))
    broker.enqueue(message(queued))
    bury(broker, broker.client.lpop(broker.keys(QUEUE).queue))
    spool.append(["an id", message(kept).encode()])
    event_store.store(conn, [parse(event(stored))])

    assert sweeper.after(timedelta(days=8)).removed == 1

    assert keys(target) == {one.key for one in (queued, delayed, dead, buried, kept, stored)}
    assert orphan.key not in keys(target)


def bury(broker: Broker, redis_id: Any) -> None:
    """Do with a message what the broker does with one that died."""
    found = broker.keys(QUEUE)
    body = broker.client.hget(found.bodies, redis_id)
    broker.client.hdel(found.bodies, redis_id)
    broker.client.hset(found.dead_bodies, redis_id, body)
    broker.client.zadd(found.dead, {redis_id: datetime.now(UTC).timestamp() * 1000})


def test_while_a_backlog_of_a_week_waits_nothing_is_removed(sweeper: Sweeper, target: Target, broker: Broker) -> None:
    put(target)
    broker.enqueue(message(put(target), datetime.now(UTC) - GRACE))

    done = sweeper.after(MONTH)

    assert done.removed == 0
    assert done.paused
    assert len(keys(target)) == 2


def test_a_dead_letter_redriven_after_a_month_finds_its_content(
    sweeper: Sweeper, target: Target, broker: Broker, conn: Connection
) -> None:
    content = put(target)
    sent = message(content)
    broker.enqueue(sent)
    bury(broker, broker.client.lpop(broker.keys(QUEUE).queue))
    dead_letter_mover.move(conn, broker, broker.lua)
    with conn.begin():
        ((letter_id,),) = database.driver(conn).execute("SELECT id FROM dead_letters").fetchall()
        database.driver(conn).execute("UPDATE dead_letters SET state = 'redriving'")
    assert sweeper.after(MONTH).removed == 0

    event_store.store(conn, [parse(sent.args[0])])
    redrives.stored(conn, [letter_id])

    assert sweeper.after(2 * MONTH).removed == 0
    assert len(b"".join(object_store.read(target.store, content))) == 2000


def test_what_an_archiver_that_died_left_is_found(
    sweeper: Sweeper, target: Target, conn: Connection, settings: Settings
) -> None:
    event_store.store(conn, [parse(event(put(target)) | {"output_ref": None, "output": "o" * 2_000_000})])

    def die(step: archive.Step, row: archive.Row) -> None:
        if step == "verified":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        archive.run_once(conn, Archive.of(settings), datetime.now(UTC), watch=die)
    assert sweeper.after(timedelta(days=8)).removed == 2
    archive.run_once(conn, Archive.of(settings), datetime.now(UTC))
    assert sweeper.after(timedelta(days=8)).removed == 0


def test_a_part_of_all_names_is_looked_at_in_each_run_and_all_of_them_in_as_many(sweeper: Sweeper, target: Target) -> None:
    for _ in range(20):
        put(target)
    looked = [sweeper.after(timedelta(days=8), part=(number, 7), remove=False).objects for number in range(7)]
    assert sum(looked) == 20
    assert max(looked) < 20


def test_senders_that_find_an_orphan_while_it_is_swept_never_lose_it(
    tmp_path: Path, conn: Connection, broker: Broker, spool: Spool
) -> None:
    (target,) = garbage_collect.targets(Settings(object_store_url=f"file://{tmp_path}/objects"))
    sweeper = Sweeper(conn, target, broker, spool)
    content = os.urandom(2000)
    reference, _ = object_store.put(target.store, content)
    path = next((tmp_path / "objects").glob("*/*/*"))
    long_ago = (datetime.now(UTC) - MONTH).timestamp()
    stop, removed = threading.Event(), [0]

    def sweep_on() -> None:
        while not stop.is_set():
            removed[0] += sweeper.after(timedelta()).removed

    sweeping = threading.Thread(target=sweep_on)
    sweeping.start()
    try:
        for _ in range(500):
            with suppress(FileNotFoundError):
                os.utime(path, (long_ago, long_ago))
            assert object_store.put(target.store, content, touch_before=datetime.now(UTC) - GRACE / 2).reference == reference
            object_store.verify(target.store, reference)
    finally:
        stop.set()
        sweeping.join()
    assert removed[0] > 0


def test_the_spool_keeps_the_objects_young_that_its_events_need(tmp_path: Path, target: Target, settings: Settings) -> None:
    def away(_: list[str | bytes]) -> None:
        raise RedisOutage("away")

    content, other = put(target), put(target)
    long_ago = datetime.now(UTC)
    hurried = settings.model_copy(update={"sweep_grace_days": 1 / 86_400_000})  # at once half as old as that
    spool = Spool(tmp_path / "spool", max_bytes=100_000, on_outage=ObjectToucher(hurried))
    spool.append(["an id", message(content).encode()])
    spool.append(["another", message(Reference("0" * 64, 5, "identity")).encode()])

    def is_younger() -> bool:  # S3 tells whole seconds
        with pytest.raises(RedisOutage):
            spool.forward(away)
        return object_store.head(target.store, content).modified_at > long_ago

    wait_until(is_younger, what="it is young again")
    assert object_store.head(target.store, other).modified_at <= long_ago


def test_a_sender_waits_for_a_deletion_on_s3_that_has_looked_already(
    s3_url: str, s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, prefix = s3_url.removeprefix("s3://").split("/")
    sweeping, sending = (S3Store(bucket, prefix, Settings(s3_endpoint_url=s3_server.endpoint)) for _ in range(2))
    content = os.urandom(2000)
    reference, _ = object_store.put(sweeping, content)
    touched = threading.Event()
    is_there: list[bool] = []
    copy, delete = sending._s3.copy_object, sweeping._s3.delete_object

    def copy_object(**given: Any) -> Any:
        answer = copy(**given)
        touched.set()
        return answer

    def delete_object(**given: Any) -> Any:
        if given["Key"].endswith(f"/{reference.key}") and "deleting" not in given["Key"]:
            sender.start()
            touched.wait(10)
        return delete(**given)

    def send() -> None:
        object_store.put(sending, content, touch_before=datetime.now(UTC) + MONTH)
        is_there.append(b"".join(object_store.read(sending, reference)) == content)

    sender = threading.Thread(target=send)
    monkeypatch.setattr(sending._s3, "copy_object", copy_object)
    monkeypatch.setattr(sweeping._s3, "delete_object", delete_object)
    assert sweeping.delete(reference.key, unmodified_since=datetime.now(UTC) + MONTH)
    sender.join()
    assert is_there == [True]
    assert object_store.head(sending, reference).size == 2000
    assert sending.orphans(datetime.now(UTC) + MONTH) == []


def test_a_deletion_that_never_ends_is_an_outage_for_a_while_and_its_mark_a_leftover(
    s3_url: str, s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, prefix = s3_url.removeprefix("s3://").split("/")
    store = S3Store(bucket, prefix, Settings(s3_endpoint_url=s3_server.endpoint))
    reference, _ = object_store.put(store, os.urandom(2000))
    store._s3.put_object(**store._mark(reference.key), Body=b"")
    monkeypatch.setattr("evalstore.objects.s3._DELETION_WAIT_S", 0.2)
    with pytest.raises(ObjectStoreOutage, match="is being deleted"):
        store.touch(reference.key)
    monkeypatch.setattr("evalstore.objects.s3._MARK_S", 0)
    store.touch(reference.key)
    assert len(store.orphans(datetime.now(UTC) + MONTH, remove=True)) == 1
    assert store.orphans(datetime.now(UTC) + MONTH) == []
