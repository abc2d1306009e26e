"""From `send` through Redis and a worker into PostgreSQL: what arrives is what was sent; what is refused changes nothing."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import redis
from dramatiq import Message
from sqlalchemy import Engine

from evalstore.local import processes
from evalstore.local.servers import Valkey
from evalstore.storage import event_store
from models import EvaluationStarted, InvalidEvent, Record, RedisOutage, merge
from models.content import MAX_CONTENT_BYTES, to_bytes
from models.errors import NotDurable
from models.events import parse
from models.settings import settings
from tasks import store_evaluation, store_evaluations
from tasks.broker import SendingBroker, broker
from tasks.spool import Spool
from tests.integration.commands import python

Json = dict[str, Any]
Eventually = Callable[..., None]
ROOT = Path(__file__).parents[2]
QUEUE, BODIES = "dramatiq:evaluations", "dramatiq:evaluations.msgs"
QUEUED: Json = {"type": "evaluation:queued", "eval_id": "e", "code": "print(1)"}
ID, AT = "0190a2f5-7a4c-7000-8000-000000000001", "2026-01-31T09:30:00.250000Z"


@pytest.fixture
def client(redis_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[redis.Redis]:
    """This process sends to a Redis of the test's own, and the client looks into it."""
    yield from sending_to(redis_url, database_url, monkeypatch)


def sending_to(redis_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[redis.Redis]:
    monkeypatch.setenv("EVALSTORE_REDIS_URL", redis_url)
    monkeypatch.setenv("EVALSTORE_DATABASE_URL", database_url)
    forget_settings()
    with redis.Redis.from_url(redis_url) as client:
        yield client
    broker().client.close()
    forget_settings()


def forget_settings() -> None:
    settings.cache_clear()
    broker.cache_clear()


@pytest.fixture
def worker(client: redis.Redis, tmp_path: Path) -> Iterator[Path]:
    """A real worker; what it logs."""
    log = tmp_path / "worker.log"
    command = [sys.executable, "-m", "dramatiq", "worker.tasks", "--processes", "1", "--threads", "2"]
    with log.open("wb") as output:
        guard = processes.start(command, mark=tmp_path, output=output, cwd=ROOT, env=dict(os.environ))
    yield log
    guard.terminate()
    guard.wait()
    print(log.read_text(errors="replace")[-6000:])


def get(engine: Engine, eval_id: str) -> Record | None:
    with engine.connect() as conn:
        return event_store.get(conn, eval_id)


def version(engine: Engine, eval_id: str) -> int:
    record = get(engine, eval_id)
    return record.version if record else 0


def stored(engine: Engine, eval_id: str, events: int) -> bool:
    return version(engine, eval_id) == events


def everything_in(client: redis.Redis) -> Json:
    return {str(key): client.dump(key) for key in client.scan_iter()}


def sent(client: redis.Redis) -> list[Json]:
    """The messages in the queue, the first to be fetched first."""
    ids: Any = client.lrange(QUEUE, 0, -1)
    assert client.hlen(BODIES) == len(ids)
    return [json.loads(body_of(client, redis_id)) for redis_id in ids]


def body_of(client: redis.Redis, redis_id: Any) -> bytes:
    body: Any = client.hget(BODIES, redis_id)
    assert isinstance(body, bytes)
    return body


# ---- what is in Redis


def test_what_is_sent_is_a_plain_dramatiq_message(client: redis.Redis) -> None:
    before = datetime.now(UTC)
    message = store_evaluation.send(QUEUED)
    (body,) = sent(client)
    assert {name: body[name] for name in ("queue_name", "actor_name", "kwargs")} == {
        "queue_name": "evaluations",
        "actor_name": "store_evaluation",
        "kwargs": {},
    }
    (event,) = body["args"]
    assert {name: event[name] for name in QUEUED} == QUEUED
    assert set(event) == {*QUEUED, "event_id", "occurred_at"}
    assert UUID(event["event_id"]).version == 7
    assert before <= datetime.fromisoformat(event["occurred_at"]) <= datetime.now(UTC)
    assert Message.decode(json.dumps(body).encode()).message_id == message.message_id


def test_what_the_sender_gave_is_kept_and_nulls_are_not_sent(client: redis.Redis) -> None:
    metadata = {"a": None, "b": [1e16, 2**53 + 1, -0.0]}
    given = {**QUEUED, "event_id": ID.upper(), "occurred_at": "2026-01-31T10:30:00.25+01:00", "metadata": metadata}
    store_evaluation.send({**given, "submitter": None, "future": None})
    store_evaluation.send(EvaluationStarted(eval_id="e", event_id=UUID(ID), metadata=metadata))
    queued, started = (body["args"][0] for body in sent(client))
    assert queued == {**given, "event_id": ID, "occurred_at": AT}
    assert repr(queued["metadata"]) == repr(started["metadata"]) == repr(metadata)
    assert (started["type"], started["event_id"], started["attempt"]) == ("evaluation:started", ID, 1)


BAD: list[Any] = [
    None,
    [],
    "evaluation:queued",
    {},
    {**QUEUED, "code": None},
    {**QUEUED, "eval_id": "a/b"},
    {**QUEUED, "cod": "typo"},
    {**QUEUED, "exit_code": 0},
    {**QUEUED, "submitter": "\ud800"},
    {**QUEUED, "metadata": {"a": float("nan")}},
    {**QUEUED, "occurred_at": "1969-12-31T23:59:59Z"},
    {**QUEUED, "occurred_at": "10000-01-01T00:00:00Z"},
    {**QUEUED, "code": "x" * (MAX_CONTENT_BYTES + 1)},
    {"type": "evaluation:completed", "eval_id": "e", "exit_code": 2**63},
    {"type": "evaluation:completed", "eval_id": "e", "exit_code": True},
    {"type": "evaluation:lost", "eval_id": "e"},
]


def test_a_bad_event_is_refused_and_changes_nothing_in_redis(client: redis.Redis) -> None:
    store_evaluation.send(QUEUED)
    before = everything_in(client)
    for bad in BAD:
        with pytest.raises(InvalidEvent):
            store_evaluation.send(bad)
        with pytest.raises(InvalidEvent):
            store_evaluation.send_with_options(args=(bad,), delay=1000)
    for wrong in ((), (QUEUED, QUEUED)):
        with pytest.raises(InvalidEvent, match="one event"):
            store_evaluation.send(*wrong)
    with pytest.raises(InvalidEvent, match="one event"):
        store_evaluation.send_with_options(kwargs={"wrong": QUEUED})
    assert everything_in(client) == before


def test_a_delay_that_redis_could_not_compute_with_leaves_nothing_half_done(client: redis.Redis) -> None:
    store_evaluation.send_with_options(args=(QUEUED,), delay=True)
    assert client.zcard("evalstore:dramatiq:evaluations:delayed") == client.hlen(BODIES) == 1


def test_of_a_bulk_with_bad_events_none_is_sent_and_each_is_named_by_its_position(client: redis.Redis) -> None:
    before = everything_in(client)
    with pytest.raises(InvalidEvent) as refused:
        store_evaluations([QUEUED, {**QUEUED, "eval_id": "", "cod": 1}, QUEUED, None])  # type: ignore[list-item]
    assert [fault.field for fault in refused.value.faults] == ["[1].eval_id", "[1].cod", "[3].event"]
    assert everything_in(client) == before == {}


def test_one_event_where_a_bulk_is_expected_is_told_so(client: redis.Redis) -> None:
    with pytest.raises(InvalidEvent, match="expected a list of events, not dict"):
        store_evaluations(QUEUED)  # type: ignore[arg-type]
    assert client.keys() == []


def test_a_bulk_is_sent_in_its_order_and_each_event_has_an_id_of_its_own(client: redis.Redis) -> None:
    messages = store_evaluations({**QUEUED, "eval_id": f"e{number}"} for number in range(1500))
    bodies = sent(client)
    assert [body["args"][0]["eval_id"] for body in bodies] == [f"e{number}" for number in range(1500)]
    assert len({body["args"][0]["event_id"] for body in bodies}) == 1500
    assert [body["message_id"] for body in bodies] == [message.message_id for message in messages]
    assert store_evaluations([]) == []
    assert len(sent(client)) == 1500


def test_what_a_bulk_sends_is_what_its_messages_say(client: redis.Redis) -> None:
    stamped = {**QUEUED, "event_id": ID, "occurred_at": AT}
    unusual: list[Json] = [
        {"occurred_at": "2026-01-31T09:30:00.25Z"},
        {"occurred_at": "2026-01-31T09:30:00+00:00"},
        {"occurred_at": "2026-01-31T09:30:00.000000Z"},
        {"event_id": ID.upper()},
        {"metadata": {"a": [1e16, None]}},
        {"code": "\0\ud800"},
        {"code": "\n" * 70_000},
        {"code": "é" * 70_000},
    ]
    messages = store_evaluations([QUEUED, stamped, *(stamped | changed for changed in unusual)])
    bodies = sent(client)
    assert bodies == [json.loads(message.encode()) for message in messages]
    assert bodies[1]["args"] == [stamped]
    assert {body["args"][0]["occurred_at"] for body in bodies[2:5]} == {AT, "2026-01-31T09:30:00Z"}


def test_a_message_sent_again_is_queued_once_wherever_it_is(client: redis.Redis) -> None:
    def pairs(*numbers: int) -> list[str | bytes]:
        return [part for number in numbers for part in (f"id-{number}", b"%d" % number * (2_000_000 if number == 5 else 1))]

    broker().send_spooled(pairs(3))
    broker().send_spooled(pairs(1, 2, 3, 2, 4, 5, 6, 5, *range(7, 9000), 1))
    broker().send_spooled(pairs(*range(9000, 0, -1)))
    assert client.lrange(QUEUE, 0, -1) == [b"id-%d" % number for number in (3, 1, 2, *range(4, 9001))]
    assert client.hlen(BODIES) == 9000
    assert body_of(client, "id-5") == b"5" * 2_000_000
    assert body_of(client, "id-6") == b"6"


def test_a_sender_that_may_touch_the_queue_alone_sends_many_and_empties_its_spool(
    valkey_server: Valkey, tmp_path: Path
) -> None:
    with redis.Redis.from_url(valkey_server.url()) as admin:
        admin.execute_command("ACL", "SETUSER", "gateway", "on", ">pw", f"~{QUEUE}", f"~{BODIES}", "+@all", "-@dangerous")
        sender = SendingBroker(url=re.sub("//[^@]*@", "//gateway:pw@", valkey_server.url()), middleware=[])
        sender.enqueue(store_evaluation.message(QUEUED))
        sender.enqueue_many([store_evaluation.message(QUEUED) for _ in range(100)])
        spool = Spool(tmp_path / "spool", max_bytes=1_000_000)
        spool.append(["kept", store_evaluation.message(QUEUED).encode()])
        assert spool.forward(sender.send_spooled).sent == 1
        assert (admin.llen(QUEUE), admin.hlen(BODIES)) == (102, 102)
        sender.close()


def test_content_of_control_characters_travels_in_less_than_twice_its_size(client: redis.Redis) -> None:
    for text in ("\0" * 200_000, "\ud800" * 100_000, '"\\' * 200_000, "é" * 200_000):
        store_evaluation.send({**QUEUED, "code": text})
        assert len(body_of(client, client.lindex(QUEUE, -1))) < 2 * len(to_bytes(text))


def test_sending_while_redis_is_away_is_an_outage_and_told_soon(valkey_server: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    for client in sending_to(valkey_server.url(), "postgresql://unused", monkeypatch):
        valkey_server.stop()
        for send in (lambda: store_evaluation.send(QUEUED), lambda: store_evaluations([QUEUED])):
            began = time.monotonic()
            with pytest.raises(RedisOutage):
                send()
            assert time.monotonic() - began < 10
        with pytest.raises(InvalidEvent):  # Raised without a request to Redis.
            store_evaluation.send({**QUEUED, "eval_id": ""})
        valkey_server.start()
        store_evaluation.send(QUEUED)
        assert len(sent(client)) == 1


def test_sending_to_a_full_redis_is_an_outage_and_leaves_nothing_half_done(
    valkey_server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    for client in sending_to(valkey_server.url(), "postgresql://unused", monkeypatch):
        client.config_set("maxmemory", 1)
        with pytest.raises(RedisOutage):
            store_evaluation.send(QUEUED)
        with pytest.raises(RedisOutage):
            store_evaluations([QUEUED, QUEUED])
        client.config_set("maxmemory", 0)
        assert sent(client) == []
        store_evaluation.send(QUEUED)
        assert len(sent(client)) == 1


@pytest.mark.parametrize("fsync", ["everysec", "no"])
def test_a_bulk_is_durable_where_that_is_asked_for_and_otherwise_an_error(
    valkey_server: Valkey, monkeypatch: pytest.MonkeyPatch, fsync: str
) -> None:
    for client in sending_to(valkey_server.url(), "postgresql://unused", monkeypatch):
        client.config_set("appendfsync", fsync)
        with pytest.raises(NotDurable) if fsync == "no" else nullcontext():
            store_evaluations([QUEUED, QUEUED], durable=True)
        assert [message["options"].keys() for message in sent(client)] == [{"redis_message_id"}] * 2


# ---- what is in PostgreSQL


def test_events_of_every_type_arrive_and_make_the_record(
    client: redis.Redis, worker: Path, engine: Engine, eventually: Eventually
) -> None:
    common: Json = {"executor_id": "x", "container_id": "", "metadata": {"n": 2**53 + 1, "f": 1e16}}
    result: Json = {"output": "o", "error": "e", "duration_ms": 1.5, "memory_bytes": 2**40, "exit_code": -(2**63)}
    lives: dict[str, list[Json]] = {
        "completed": [
            QUEUED,
            {"type": "evaluation:started", "timeout_s": 9, **common},
            {"type": "evaluation:completed", **result},
        ],
        "failed": [{"type": "evaluation:running"}, {"type": "evaluation:failed", **common, **result}],
        "timed_out": [{"type": "evaluation:timed_out", **common, **result}],
        "cancelled": [QUEUED, {"type": "evaluation:cancelled", "reason": "why not"}],
        "running": [{"type": "evaluation:started"}, {"type": "evaluation:running"}],
        "queued": [{**QUEUED, "language": "", "submitter": "s", "attempt": 1_000_000}],
    }
    for status, events in lives.items():
        stamped = [{**event, "eval_id": status, "event_id": str(uuid4()), "occurred_at": AT} for event in events]
        for event in [*stamped, *stamped]:
            store_evaluation.send(event)
        stored_all = partial(stored, engine, status, len(events))
        eventually(stored_all, what=f"{status} stored", within_s=30)
        record = get(engine, status)
        assert record is not None
        assert record.status == status
        expected = merge([parse(event) for event in stamped])
        assert record.model_copy(update={"created_at": None, "updated_at": None}) == expected


CONTENTS: dict[str, str | bytes] = {
    "nothing": "",
    "NUL": "\0",
    "lone-surrogates": "\ud800x\udfff\udbff",
    "split-pairs": "\ud83d\ude00\ude00\ud83d",
    "text": 'é😀\u2028\r\n\t"\\',
    "every-byte": bytes(range(256)),
    "no-bytes": b"",
    "surrogate-bytes": b"\xed\xa0\xbd\xed\xb8\x80",
    "long-NUL": "\0" * 100_000,
    "long-surrogates": "\ud800" * 100_000,
    "long-text": "0123456789é" * 80_000,
    "long-bytes": bytes(range(256)) * 4_000,
}


def as_fields(name: str, value: str | bytes) -> Json:
    return {name: value} if isinstance(value, str) else {f"{name}_b64": base64.b64encode(value).decode()}


def as_bytes(value: str | bytes) -> bytes:
    return to_bytes(value) if isinstance(value, str) else value


def evalstore_get(eval_id: str, option: str) -> bytes:
    command = [*python(), "-m", "evalstore.cli.app", "get", eval_id, option]
    return subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=120).stdout


def test_content_of_every_kind_comes_back_byte_for_byte(
    client: redis.Redis, worker: Path, engine: Engine, eventually: Eventually
) -> None:
    events: list[Json] = []
    for eval_id, value in CONTENTS.items():
        events.append({"type": "evaluation:queued", "eval_id": eval_id, **as_fields("code", value)})
        result = {**as_fields("output", value), **as_fields("error", value)}
        events.append({"type": "evaluation:failed", "eval_id": eval_id, **result})
    store_evaluations(events)
    for eval_id, value in CONTENTS.items():
        eventually(partial(stored, engine, eval_id, 2), what=f"{eval_id} stored", within_s=30)
        record = get(engine, eval_id)
        assert record is not None
        for got in (record.code, record.output, record.error):
            assert as_bytes(got) == as_bytes(value), eval_id
    for eval_id, option in (
        ("lone-surrogates", "--output"),
        ("every-byte", "--code"),
        ("long-NUL", "--error"),
        ("nothing", "--code"),
    ):
        assert evalstore_get(eval_id, option) == as_bytes(CONTENTS[eval_id])


def test_100_mib_inline_come_back_byte_for_byte(
    client: redis.Redis, worker: Path, engine: Engine, eventually: Eventually
) -> None:
    data = b"".join(hashlib.sha256(bytes([number])).digest() for number in range(256)) * (MAX_CONTENT_BYTES // 8192)
    assert len(data) == MAX_CONTENT_BYTES
    # A sender without our object store, whose check would refuse it.
    both = {name: base64.b64encode(value).decode() for name, value in (("output_b64", bytes(len(data))), ("error_b64", data))}
    put(client, message({"type": "evaluation:completed", "eval_id": "large", "exit_code": 0, **both}))
    eventually(lambda: version(engine, "large") == 1, what="100 MiB twice stored", within_s=120)
    assert hashlib.sha256(evalstore_get("large", "--output")).digest() == hashlib.sha256(bytes(MAX_CONTENT_BYTES)).digest()
    assert hashlib.sha256(evalstore_get("large", "--error")).digest() == hashlib.sha256(data).digest()


# ---- what comes by other ways


def message(event: object, **fields: Any) -> Json:
    """A message as stock Dramatiq writes it."""
    return {
        "queue_name": "evaluations",
        "actor_name": "store_evaluation",
        "args": [event],
        "kwargs": {},
        "options": {},
        "message_id": str(uuid4()),
        "message_timestamp": 1_769_851_800_250,
        **fields,
    }


def put(client: redis.Redis, body: Json | bytes, redis_id: str | None = None) -> None:
    redis_id = redis_id or str(uuid4())
    client.hset(BODIES, redis_id, body if isinstance(body, bytes) else json.dumps(body).encode())
    client.rpush(QUEUE, redis_id)


def test_an_event_without_identity_is_stored_once_however_often_its_message_comes(
    client: redis.Redis, worker: Path, engine: Engine, eventually: Eventually
) -> None:
    same, other = message(QUEUED), message({**QUEUED, "event_id": None, "occurred_at": None})
    for body in (same, same, other, same, other):
        put(client, body)
    put(client, message({"type": "evaluation:started", "eval_id": "last"}))
    eventually(lambda: version(engine, "last") == 1, what="the last message stored", within_s=30)
    eventually(lambda: client.hlen(BODIES) == 0, what="all messages acknowledged")
    record = get(engine, "e")
    assert record is not None
    assert record.version == 2
    assert str(record.queued_at) == "2026-01-31 09:30:00.250000+00:00"


def test_fields_that_nobody_knows_are_kept_in_the_log(
    client: redis.Redis, worker: Path, engine: Engine, eventually: Eventually
) -> None:
    unknown = {"future": {"b": [1e16, "\ud800\0"], "a": 10**30}, "exit_code": "none", "absent": None}
    put(client, message({**QUEUED, **unknown}))
    eventually(lambda: version(engine, "e") == 1, what="the event stored", within_s=30)
    with engine.connect() as conn:
        extra = conn.exec_driver_sql("SELECT extra FROM evaluation_events").scalar_one()
    assert json.loads(extra) == {"future": unknown["future"], "exit_code": "none"}


FORKED = """
import os
from tasks.broker import uuid4
uuid4()
for _ in range(2):
    if os.fork() == 0:
        print(uuid4(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_processes_forked_from_a_sender_choose_ids_of_their_own() -> None:
    """Messages of one id are one message: all but the first would be lost."""
    ids = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=True).stdout.split()
    assert len(set(ids)) == 2


def deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


STARTED = {"type": "evaluation:started", "eval_id": "bad"}
UNSTORABLE: dict[str, Json | bytes] = {
    "no JSON": b"\x80\x04K\x01.",
    "nothing": b"",
    "no object": b"[]",
    "invalid UTF-8": json.dumps(message({**STARTED, "executor_id": "@"})).encode().replace(b"@", b"\xff"),
    "nested beyond reading": deep(100_000),
    "nested in options": json.dumps(message(STARTED, options={"eta": "@"})).encode().replace(b'"@"', deep(900)),
    "nested in arguments": json.dumps(message("@")).encode().replace(b'"@"', deep(900)),
    "nested in an unknown field": json.dumps(message({**STARTED, "future": "@"})).encode().replace(b'"@"', deep(900)),
    "no arguments": message(None, args=[]),
    "two arguments": message(None, args=[STARTED, STARTED]),
    "arguments by name": message(None, args=[], kwargs={"event": STARTED}),
    "no event": message(5),
    "an invalid event": message({**STARTED, "eval_id": "a/b"}),
    "a system event": message({**STARTED, "type": "evaluation:lost"}),
    "NaN": json.dumps(message({**STARTED, "timeout_s": float("nan")})).encode(),
    "Infinity in an unknown field": json.dumps(message({**STARTED, "future": [float("inf")]})).encode(),
    "1e400 in an unknown field": json.dumps(message({**STARTED, "future": "@"})).encode().replace(b'"@"', b"1e400"),
    "an actor nobody knows": message(STARTED, actor_name="nobody"),
    "an actor of half a pair": message(STARTED, actor_name="\ud800"),
    "an actor with NUL": message(STARTED, actor_name="a\0b"),
    "retries beyond counting": message({**STARTED, "eval_id": ""}, options={"retries": 10**30}),
    "retries below counting": message({**STARTED, "eval_id": ""}, options={"retries": -(10**30)}),
    "no message id": message(STARTED, message_id=None),
    "a time before 1970": message(STARTED, message_timestamp=-1),
    "a time beyond all": message(STARTED, message_timestamp=10**30),
    "a body reused": message({**STARTED, "eval_id": "good", "event_id": ID, "executor_id": "another"}),
}


def test_messages_that_can_never_be_stored_die_with_their_cause_and_hold_up_no_other(
    client: redis.Redis, worker: Path, engine: Engine, eventually: Eventually
) -> None:
    good = {"type": "evaluation:started", "eval_id": "good"}
    put(client, message({**good, "event_id": ID}))
    for number, body in enumerate(UNSTORABLE.values()):
        put(client, body, redis_id=f"{'dead-letter:' if number < 2 else ''}{number}")  # Any client may choose such ids.
        put(client, message(good))
    eventually(lambda: version(engine, "good") == 1 + len(UNSTORABLE), what="the good events stored", within_s=60)
    eventually(lambda: client.hlen(BODIES) == 0 and client.llen(QUEUE) == 0, what="all messages settled", within_s=60)

    def kept() -> list[tuple[bytes, str, str]]:
        with engine.connect() as conn:
            rows = conn.exec_driver_sql("SELECT message, error_class, error_message FROM dead_letters")
            return [(bytes(body), error_class, error_message) for body, error_class, error_message in rows]

    eventually(lambda: len(kept()) == len(UNSTORABLE), what="the dead letters kept", within_s=30)
    assert all(error_class and error_message for _, error_class, error_message in kept())
    bodies = [body if isinstance(body, bytes) else json.dumps(body).encode() for body in UNSTORABLE.values()]
    assert sorted(body for body, _, _ in kept()) == sorted(bodies)
    with engine.connect() as conn:
        assert event_store.count_by_status(conn) == {"running": 1}
