"""Waiting for an evaluation, and streams of changes: nobody misses a change, whatever ends meanwhile."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import httpx
import psycopg
import pytest
from sqlalchemy import Engine

from evalstore.client import Change, NotFound, ServiceError, StorageClient
from evalstore.storage import api_keys, database, outbox_tail
from evalstore.storage.outbox_tail import OutboxTail, Position
from evalstore.storage.visibility import Visibility
from tests.integration.conftest import BOTH, READ

E = "/storage/evaluations"
STREAM = "/storage/stream"


class Listener:
    """A stream that is read in a thread: the messages as (event, data), and the last id."""

    def __init__(self, client: httpx.Client, last_id: str = "", **query: Any) -> None:
        self.messages: list[tuple[str, dict[str, Any]]] = []
        self.last_id, self.is_over = last_id, False
        headers = {"Last-Event-ID": last_id} if last_id else {}
        self._open = client.stream("GET", STREAM, params=query, headers=headers)
        self.answer = self._open.__enter__()
        assert self.answer.status_code == 200, self.answer.read()
        assert self.answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        self._connected = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        assert self._connected.wait(10)

    def _read(self) -> None:
        event, data = "", ""
        with contextlib.suppress(httpx.HTTPError, RuntimeError):
            for line in self.answer.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    event = value
                elif name == "data":
                    data = value
                elif name == "id":
                    self.last_id = value
                elif not line and data:
                    self.messages.append((event, json.loads(data)))
                    event, data = "", ""
                if not line:
                    self._connected.set()
        self.is_over = True

    def seen(self) -> list[tuple[str, int]]:
        return [(message["eval_id"], message["version"]) for event, message in self.messages if event != "snapshot"]

    def close(self) -> None:
        with contextlib.suppress(OSError):  # Ends the read of the thread.
            self.answer.extensions["network_stream"].get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._open.__exit__(None, None, None)


@pytest.fixture
def listen(api: Any) -> Iterator[Callable[..., Listener]]:
    made: list[Listener] = []

    def start(client: httpx.Client | None = None, **options: Any) -> Listener:
        made.append(Listener(client or api.client(READ), **options))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(20) as made:
        yield made


@pytest.fixture
def engine(api: Any) -> Iterator[Engine]:
    made = database.engine(api.database_url)
    yield made
    made.dispose()


def create(api: Any, eval_id: str, **fields: Any) -> None:
    assert api.both.post(E, json={"eval_id": eval_id, "code": "c", **fields}).status_code == 201


def finish(api: Any, eval_id: str) -> None:
    assert api.both.put(f"{E}/{eval_id}", json={"status": "completed", "exit_code": 0}).status_code in {200, 201}


def is_waiting(api: Any, number: int = 1, kind: str = "wait") -> bool:
    return f'evalstore_http_followers{{kind="{kind}"}} {number}' in api.nobody.get("/metrics").text


def waiting(threads: ThreadPoolExecutor, api: Any, path: str, **options: Any) -> Future[httpx.Response]:
    return threads.submit(api.client(READ).get, path, **options)


def test_a_wait_is_answered_when_the_evaluation_is_finished(api: Any, threads: Any, eventually: Callable[..., None]) -> None:
    create(api, "e")
    answer = waiting(threads, api, f"{E}/e?wait=30")
    eventually(lambda: is_waiting(api))
    api.both.put(f"{E}/e", json={"status": "running"})
    finish(api, "e")
    began = time.monotonic()
    record = answer.result(timeout=10)
    assert (record.status_code, record.json()["status"], record.headers["etag"]) == (200, "completed", '"3"')
    assert time.monotonic() - began < 2
    assert api.read.get(f"{E}/e?wait=30").json()["status"] == "completed"  # Finished before: no wait.


def test_a_wait_ends_in_time_with_the_record_as_it_is(api: Any) -> None:
    create(api, "e")
    began = time.monotonic()
    answer = api.read.get(f"{E}/e?wait=0.5")
    assert (answer.status_code, answer.json()["status"]) == (200, "queued")
    assert 0.5 <= time.monotonic() - began < 5


def test_a_wait_with_an_etag_ends_with_the_next_change_or_304(api: Any, threads: Any, eventually: Callable[..., None]) -> None:
    create(api, "e")
    assert api.read.get(f"{E}/e?wait=1", headers={"If-None-Match": '"1"'}).status_code == 304
    answer = waiting(threads, api, f"{E}/e?wait=30", headers={"If-None-Match": '"1"'})
    eventually(lambda: is_waiting(api))
    api.both.put(f"{E}/e", json={"status": "running"})
    assert answer.result(timeout=10).json()["status"] == "running"


def test_an_evaluation_may_be_created_while_a_client_waits(api: Any, threads: Any, eventually: Callable[..., None]) -> None:
    assert api.read.get(f"{E}/e?wait=0.2").status_code == 404
    answer = waiting(threads, api, f"{E}/e?wait=30")
    eventually(lambda: is_waiting(api))
    create(api, "e")
    finish(api, "e")
    assert answer.result(timeout=10).json()["status"] == "completed"


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("wait=61", "wait"),
        ("wait=-1", "wait"),
        ("wait=nan", "wait"),
        ("wait=soon", "wait"),
        ("wait=1&as_of=2026-01-31T09:30:00Z", "wait"),
    ],
)
def test_a_wrong_wait_is_refused_with_its_field(query: str, field: str, api: Any) -> None:
    answer = api.read.get(f"{E}/e?{query}")
    assert answer.status_code == 422
    assert [fault["field"] for fault in answer.json()["faults"]] == [field]


@pytest.mark.parametrize("query", ["eval_id=a/b", "run_id=", "status=done", "metadata.team=x", "eval=e"])
def test_a_wrong_filter_of_a_stream_is_refused_with_its_field(query: str, api: Any) -> None:
    answer = api.read.get(f"{STREAM}?{query}")
    assert answer.status_code == 422
    assert answer.json()["faults"][0]["field"] == query.partition("=")[0]
    answer = api.read.get(STREAM, headers={"Last-Event-ID": "42"})
    assert (answer.status_code, answer.json()["faults"][0]["field"]) == (422, "Last-Event-ID")


def test_a_stream_tells_each_change_that_its_filter_chooses(api: Any, listen: Any, eventually: Callable[..., None]) -> None:
    everything, of_one, of_run = listen(), listen(eval_id="b"), listen(run_id="r")
    failed, both = listen(status=["failed", "completed"]), listen(run_id="r", status="queued")
    create(api, "a", run_id="r")
    create(api, "b")
    finish(api, "a")
    finish(api, "b")
    eventually(lambda: len(everything.messages) == 4)
    assert everything.seen() == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    event, message = everything.messages[0]
    assert event == message["type"] == "storage:evaluation:created"
    assert (message["status"], message["run_id"], len(message["event_ids"])) == ("queued", "r", 1)
    eventually(lambda: of_one.seen() == [("b", 1), ("b", 2)])
    eventually(lambda: of_run.seen() == [("a", 1), ("a", 2)])
    eventually(lambda: failed.seen() == [("a", 2), ("b", 2)])
    eventually(lambda: both.seen() == [("a", 1)])
    api.admin.delete(f"{E}/b").raise_for_status()
    eventually(lambda: of_one.messages[-1][0] == "storage:evaluation:erased")


def test_a_stream_is_resumed_without_a_gap_at_any_process(
    api: Any, listen: Any, start_api: Callable[..., Any], eventually: Callable[..., None]
) -> None:
    first = listen(run_id="r")
    create(api, "a", run_id="r")
    create(api, "other")
    eventually(lambda: first.seen() == [("a", 1)])
    first.close()
    finish(api, "a")
    finish(api, "other")
    create(api, "b", run_id="r")
    again = listen(run_id="r", last_id=first.last_id)
    eventually(lambda: again.seen() == [("a", 2), ("b", 1)])
    other = start_api(EVALSTORE_DATABASE_URL=api.database_url, EVALSTORE_REDIS_URL=api.redis_url)
    elsewhere = listen(other.client(READ), run_id="r", last_id=first.last_id)
    eventually(lambda: elsewhere.seen() == [("a", 2), ("b", 1)])
    finish(api, "b")
    eventually(lambda: elsewhere.seen()[2:] == again.seen()[2:] == [("b", 2)])


def test_a_stream_whose_place_is_gone_begins_with_a_snapshot(api: Any, listen: Any, eventually: Callable[..., None]) -> None:
    create(api, "e")
    stream = listen(eval_id="e")
    finish(api, "e")
    eventually(lambda: stream.messages)
    row_id, number, at = stream.last_id.split("-")
    for place in (f"{row_id}-{number}-{int(at) - 541}", f"{int(row_id) + 100}-0-{at}"):
        late = listen(eval_id="e", last_id=place)
        assert late.messages[0] == (
            "snapshot",
            {"type": "snapshot", "evaluations": [{"eval_id": "e", "version": 2, "status": "completed", "run_id": None}]},
        )
        assert late.last_id != place
    assert listen(last_id=place).messages[0][1]["evaluations"] is None
    create(api, "f")
    assert late.seen() == []


def test_a_key_has_at_most_100_streams(api: Any, eventually: Callable[..., None]) -> None:
    eventually(lambda: is_waiting(api, 0, "stream"), within_s=30, what="the streams of other tests are over")
    with contextlib.ExitStack() as stack:
        client = api.client(READ, limits=httpx.Limits(max_connections=200))
        for _ in range(100):
            assert stack.enter_context(client.stream("GET", STREAM, params={"eval_id": "e"})).status_code == 200
        refused = api.read.get(STREAM)
        assert (refused.status_code, refused.json()["type"]) == (429, "urn:evalstore:problem:too-many-streams")
        assert int(refused.headers["retry-after"]) > 0
        with api.both.stream("GET", STREAM) as other:
            assert other.status_code == 200
    eventually(lambda: is_waiting(api, 0, "stream"), what="streams end with their clients")
    with api.read.stream("GET", STREAM) as again:
        assert again.status_code == 200


def test_a_stopping_service_ends_waits_and_streams_at_once(
    start_api: Callable[..., Any], threads: Any, eventually: Callable[..., None]
) -> None:
    api = start_api()
    create(api, "e")
    stream = Listener(api.client(READ), eval_id="e")
    answers = [waiting(threads, api, f"{E}/{eval_id}?wait=60") for eval_id in ("e", "absent")]
    eventually(lambda: is_waiting(api, 2))
    began = time.monotonic()
    api.terminate()
    assert [answer.result(timeout=10).status_code for answer in answers] == [200, 503]
    eventually(lambda: stream.is_over)
    assert time.monotonic() - began < 5
    stream.close()


def test_a_revoked_key_gets_no_further_change(api: Any, listen: Any, engine: Engine, eventually: Callable[..., None]) -> None:
    with engine.connect() as conn:
        key, kept = api_keys.create(conn, "soon revoked", ["read"])
        eventually(lambda: api.client(key).get(E).status_code == 200)
        stream = listen(api.client(key))
        create(api, "a")
        eventually(stream.seen)
        api_keys.revoke(conn, [kept.key_id])
    eventually(lambda: api.client(key).get(E).status_code == 401)
    create(api, "b")
    eventually(lambda: stream.is_over)
    assert stream.seen() == [("a", 1)]


def test_a_restricted_stream_tells_only_of_what_its_key_may_see(
    api: Any, listen: Any, engine: Engine, eventually: Callable[..., None]
) -> None:
    with engine.connect() as conn:
        keys = {
            "ann": api_keys.create(conn, "ann", ["read"], visibility=Visibility(submitter="ann"))[0],
            "runs": api_keys.create(conn, "runs", ["read"], visibility=Visibility(run_prefix="team-"))[0],
            "both": api_keys.create(conn, "both", ["read"], visibility=Visibility("ann", "team-"))[0],
        }
    eventually(lambda: all(api.client(key).get(E).status_code == 200 for key in keys.values()))
    streams = {name: listen(api.client(key)) for name, key in keys.items()}
    of_one = listen(api.client(keys["ann"]), eval_id="e1")
    hidden = listen(api.client(keys["ann"]), eval_id="e2")
    create(api, "e1", submitter="ann", run_id="team-1")
    create(api, "e2", submitter="bob", run_id="team-2")
    create(api, "e3", submitter="ann")
    create(api, "e4")
    finish(api, "e1")
    eventually(lambda: streams["ann"].seen() == [("e1", 1), ("e3", 1), ("e1", 2)])
    eventually(lambda: streams["runs"].seen() == [("e1", 1), ("e2", 1), ("e1", 2)])
    eventually(lambda: streams["both"].seen() == [("e1", 1), ("e1", 2)])
    eventually(lambda: of_one.seen() == [("e1", 1), ("e1", 2)])
    for eval_id in ("e1", "e2"):
        api.admin.delete(f"{E}/{eval_id}").raise_for_status()
    eventually(lambda: of_one.messages[-1][0] == "storage:evaluation:erased")
    assert hidden.messages == []


def test_a_transaction_in_progress_holds_up_nobody_and_is_not_missed(
    api: Any, listen: Any, eventually: Callable[..., None]
) -> None:
    stream = listen()
    body = (
        '{"type":"storage:evaluation:created","eval_id":"slow","version":1,"status":"queued","event_ids":[],"recorded_at":"x"}'
    )
    with psycopg.connect(api.database_url) as conn:
        conn.execute("INSERT INTO confirmations (count, body) VALUES (1, %s)", [body])
        create(api, "a")
        eventually(lambda: stream.seen() == [("a", 1)])
        place = stream.last_id
        conn.commit()
    eventually(lambda: stream.seen() == [("a", 1), ("slow", 1)])
    resumed = listen(last_id=place)
    eventually(lambda: ("slow", 1) in resumed.seen())


def test_the_tail_of_the_outbox_finds_rows_that_commit_late(database_url: str) -> None:
    engine = database.engine(database_url)
    insert = "INSERT INTO confirmations (count, body) VALUES (1, %s)"
    tail = OutboxTail()
    with (
        engine.connect() as conn,
        psycopg.connect(database_url) as slow,
        psycopg.connect(database_url) as broken,
        psycopg.connect(database_url, autocommit=True) as quick,
    ):
        slow.execute(insert, ["before the start"])
        quick.execute(insert, ["old"])
        tail.start(conn)
        assert tail.poll(conn) == ([], False)
        broken.execute(insert, ["rolled back"])
        quick.execute(insert, ["new"])
        assert [row.body for row in tail.poll(conn)[0]] == ["new"]
        slow.commit()
        assert [row.body for row in tail.poll(conn)[0]] == ["before the start"]
        gap = tail.position.row_id
        assert gap <= tail.high
        broken.rollback()
        for _ in range(2):
            assert tail.poll(conn) == ([], False)
        assert tail.position.row_id == tail.high + 1 > gap
        assert outbox_tail.can_resume(conn, tail.position)
        assert not outbox_tail.can_resume(conn, Position(tail.high + 2, 0, tail.position.at))
        quick.execute("SELECT setval(pg_get_serial_sequence('confirmations', 'id'), 1)")
        with pytest.raises(outbox_tail.ChangesLost):
            tail.poll(conn)
    engine.dispose()


def test_the_client_waits_and_streams(api: Any, threads: Any, eventually: Callable[..., None]) -> None:
    with StorageClient(api.url, BOTH) as storage:
        storage.create_evaluation("e", code="c", run_id="r")
        with pytest.raises(TimeoutError):
            storage.wait("e", timeout_s=0.3)
        with pytest.raises(NotFound):
            storage.wait("absent", timeout_s=0.3)
        finished = threads.submit(storage.wait, "e", timeout_s=30)
        changes: list[Change] = []
        threads.submit(lambda: changes.extend(islice(storage.stream(run_id="r"), 2)))
        eventually(lambda: is_waiting(api) and is_waiting(api, 1, "stream"))
        storage.update_evaluation("e", "running")
        storage.update_evaluation("e", "completed", exit_code=0)
        assert finished.result(timeout=10).status == "completed"
        eventually(lambda: [change.version for change in changes] == [2, 3])
        with pytest.raises(ServiceError):
            next(storage.stream(status="done"))
