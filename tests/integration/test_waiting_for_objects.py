"""An event whose object is missing or out of reach waits for it, and keeps nothing else waiting."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from dramatiq import Message

from evalstore.local import processes
from evalstore.objects import object_store
from models.content import Reference
from models.settings import Settings
from tasks.broker import SendingBroker
from tasks.keys import QUEUE
from tests.integration.s3_relay import Fault, S3Relay
from tests.seaweedfs import SeaweedFS

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]
Eventually = Callable[..., None]
StartWorker = Callable[..., Path]
Outage = tuple[list[Reference], Json, Callable[[], None]]


@pytest.fixture
def start_worker(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[StartWorker]:
    """Start a worker with these settings; returns its log."""
    started: list[subprocess.Popen[bytes]] = []
    log = tmp_path / "worker.log"

    def start(**environment: str) -> Path:
        env = {**os.environ, "EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url, **environment}
        command = [sys.executable, "-m", "dramatiq", "worker.tasks", "--processes", "1", "--threads", "2"]
        with log.open("ab") as output:
            started.append(processes.start(command, mark=tmp_path, output=output, cwd=ROOT, env=env))
        return log

    yield start
    for guard in started:
        guard.terminate()
        guard.wait()
    if log.exists():
        print(log.read_text(errors="replace")[-6000:])


def send(broker: SendingBroker, reference: Reference | None = None, *, waited_s: float = 0) -> str:
    """Put an event in the queue, as a sender of `waited_s` ago did; returns its id."""
    event_id = str(uuid4())
    event: Json = {"type": "evaluation:failed", "eval_id": f"e-{event_id}", "event_id": event_id, "exit_code": 1}
    event |= {"error_ref": reference._asdict()} if reference else {"error": "boom"}
    event["occurred_at"] = "2026-01-31T09:30:00Z"
    sent_ms = int((time.time() - waited_s) * 1000)
    broker.enqueue(Message(QUEUE, "store_evaluation", (event,), {}, {}, event_id, sent_ms))
    return event_id


def applied(database_url: str) -> set[str]:
    with psycopg.connect(database_url) as conn:
        return {str(event_id) for (event_id,) in conn.execute("SELECT event_id FROM evaluation_events")}


def letters(database_url: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(database_url) as conn:
        return conn.execute("SELECT event_id::text, error_class, error_message, message, attempts FROM dead_letters").fetchall()


def missing(content: bytes = b"nobody put this there") -> Reference:
    return Reference(hashlib.sha256(content).hexdigest(), len(content), "identity")


def file_store(tmp_path: Path) -> tuple[object_store.Store, str]:
    url = f"file://{tmp_path}/mount/objects"
    (tmp_path / "mount").mkdir()
    return object_store.open_store(url, Settings()), url


def test_a_missing_object_is_waited_for_until_the_grace_is_over(
    broker: SendingBroker, database_url: str, start_worker: StartWorker, tmp_path: Path, eventually: Eventually
) -> None:
    store, url = file_store(tmp_path)
    there, _ = object_store.put(store, b"there")
    late, never = missing(b"late"), missing()
    ids = {name: send(broker, reference) for name, reference in (("good", None), ("there", there), ("late", late))}
    ids["never"] = send(broker, never, waited_s=55)
    ids["wrong size"] = send(broker, there._replace(size=there.size + 1), waited_s=55)
    ids["another clock"] = send(broker, never, waited_s=-1e9)
    start_worker(EVALSTORE_OBJECT_STORE_URL=url, EVALSTORE_OBJECT_GRACE_S="60")

    eventually(lambda: applied(database_url) == {ids["good"], ids["there"]}, within_s=20)
    object_store.put(store, b"late")
    eventually(lambda: ids["late"] in applied(database_url), within_s=30)
    eventually(lambda: len(letters(database_url)) == 3, within_s=30)
    found = {event_id: (error, message) for event_id, error, message, _, _ in letters(database_url)}
    assert found[ids["never"]][0] == found[ids["another clock"]][0] == "ObjectMissing"
    assert never.key in found[ids["never"]][1]
    assert found[ids["wrong size"]][0] == "ObjectDamaged"
    assert all(attempts == 1 for *_, attempts in letters(database_url))
    assert broker.counts(QUEUE) == {"ready": 0, "inflight": 0, "delayed": 0, "dead": 0}


def test_a_refused_object_holds_up_no_other_and_is_a_dead_letter_when_the_grace_is_over(
    broker: SendingBroker, database_url: str, start_worker: StartWorker, tmp_path: Path, eventually: Eventually
) -> None:
    store, url = file_store(tmp_path)
    there, refused = object_store.put(store, b"there").reference, object_store.put(store, b"refused").reference
    path = tmp_path / "mount/objects" / refused.key[:2] / refused.key[2:4] / refused.key
    path.unlink()
    path.mkdir()  # which no user can read as a file
    waits, expired, good = send(broker, refused), send(broker, refused, waited_s=9999), send(broker, there)
    log = start_worker(EVALSTORE_OBJECT_STORE_URL=url, EVALSTORE_OBJECT_GRACE_S="600")
    eventually(lambda: applied(database_url) == {good}, within_s=20)
    eventually(
        lambda: [(found[0], found[1]) for found in letters(database_url)] == [(expired, "ObjectUnavailable")], within_s=20
    )
    assert refused.key in letters(database_url)[0][2]
    assert log.read_text().count("the object store refuses an object") == 1
    path.rmdir()
    object_store.put(store, b"refused")
    eventually(lambda: applied(database_url) == {good, waits}, within_s=40)


def fill(store: object_store.Store) -> list[Reference]:
    return [object_store.put(store, f"content {number}".encode()).reference for number in range(20)]


@pytest.fixture(params=["folder", "reset", "hold", "SlowDown"])
def outage(request: Any, tmp_path: Path) -> Iterator[Outage]:
    """Objects in a store, the settings of a worker from which that is away, and what brings it back."""
    if request.param == "folder":
        store, url = file_store(tmp_path)
        references = fill(store)
        mount = tmp_path / "mount"
        mount.rename(tmp_path / "unmounted")

        def mounted() -> None:
            (tmp_path / "unmounted").rename(mount)

        yield references, {"EVALSTORE_OBJECT_STORE_URL": url}, mounted
        return
    s3_url: str = request.getfixturevalue("s3_url")
    server: SeaweedFS = request.getfixturevalue("s3_server")
    with S3Relay(server.port) as relay:
        fault = Fault("answer", (503, "SlowDown")) if request.param == "SlowDown" else Fault(request.param)
        relay.fail(lambda _: True, fault)
        references = fill(object_store.open_store(s3_url, Settings(s3_endpoint_url=server.endpoint)))
        environment = {"EVALSTORE_OBJECT_STORE_URL": s3_url, "EVALSTORE_S3_ENDPOINT_URL": relay.endpoint}

        def heal() -> None:
            relay.heal()
            relay.done.set()  # what it holds back is let go

        yield references, environment, heal


def test_while_the_object_store_is_away_only_events_that_need_it_wait(
    outage: Outage,
    broker: SendingBroker,
    database_url: str,
    start_worker: StartWorker,
    eventually: Eventually,
) -> None:
    references, environment, heal = outage
    # The grace is for objects that are known to be missing, and long over.
    environment["EVALSTORE_OBJECT_GRACE_S"] = "0"
    waiting = {send(broker, reference, waited_s=9999) for reference in references}
    good = {send(broker) for _ in range(20)}
    log = start_worker(**environment)
    eventually(lambda: applied(database_url) == good, within_s=30)
    eventually(lambda: broker.counts(QUEUE)["delayed"] == len(waiting), within_s=30)
    good |= {send(broker) for _ in range(20)}
    eventually(lambda: applied(database_url) == good, within_s=10)
    eventually(lambda: b"object store outage" in log.read_bytes())

    heal()
    eventually(lambda: applied(database_url) == good | waiting, within_s=40)
    eventually(lambda: b"answers again" in log.read_bytes())
    assert letters(database_url) == []
    assert log.read_text().count("object store outage") == 1
    assert broker.counts(QUEUE) == {"ready": 0, "inflight": 0, "delayed": 0, "dead": 0}


def test_an_event_that_waits_is_kept_as_it_was_sent(
    broker: SendingBroker, start_worker: StartWorker, tmp_path: Path, eventually: Eventually
) -> None:
    store, url = file_store(tmp_path)
    object_store.put(store, b"")
    send(broker, missing())
    (before,) = [body for _, body in broker.held(QUEUE)]
    start_worker(EVALSTORE_OBJECT_STORE_URL=url)
    eventually(lambda: broker.counts(QUEUE)["delayed"] == 1, within_s=20)
    assert [body for _, body in broker.held(QUEUE)] == [before]
    assert "retries" not in json.loads(before)["options"]
