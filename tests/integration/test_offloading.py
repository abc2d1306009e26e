"""A sender puts large content into the object store before its event, and tells at once what cannot be sent."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis

from evalstore.objects import object_store
from evalstore.objects.directory import DirectoryStore
from models import InvalidEvent
from models.content import Reference, to_bytes
from models.errors import ObjectStoreOutage
from models.settings import Settings, settings
from tasks import store_evaluation, store_evaluations
from tasks.broker import broker
from tests.integration.s3_relay import Fault, S3Relay
from tests.seaweedfs import SeaweedFS

Json = dict[str, Any]
BODIES = "dramatiq:evaluations.msgs"
LIMIT = 64 * 1024
MIB = 1024 * 1024
FAILED: Json = {"type": "evaluation:failed", "eval_id": "e"}
STAMP = {"event_id": "0190a2f5-7a4c-7000-8000-000000000001", "occurred_at": "2026-01-31T09:30:00Z"}


@pytest.fixture
def sends_with(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make this process a sender with these settings."""

    def use(**given: str) -> None:
        for name, value in given.items():
            monkeypatch.setenv(f"EVALSTORE_{name.upper()}", value)
        forget()

    use(redis_url=redis_url)
    yield use
    broker().client.close()
    monkeypatch.undo()
    forget()


def forget() -> None:
    for known in (settings, broker):
        known.cache_clear()


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture(params=["file", "s3"])
def store(request: Any, tmp_path: Path, sends_with: Callable[..., None]) -> object_store.Store:
    """A store of each kind, which this process sends to."""
    url, endpoint = f"file://{tmp_path}/objects", {}
    if request.param == "s3":
        url = request.getfixturevalue("s3_url")
        endpoint = {"s3_endpoint_url": request.getfixturevalue("s3_server").endpoint}
    sends_with(object_store_url=url, **endpoint)
    return object_store.open_store(url, Settings(**endpoint))


def sent(client: redis.Redis) -> list[Json]:
    bodies: Any = client.hvals(BODIES)
    return [json.loads(body)["args"][0] for body in bodies]


def read(store: object_store.Store, ref: Json) -> bytes:
    return b"".join(object_store.read(store, Reference(**ref)))


@pytest.mark.parametrize(
    "content",
    ["x" * LIMIT, "é" * (LIMIT // 2), "\ud800" * (LIMIT // 3) + "x", "\0" * LIMIT, os.urandom(LIMIT)],
    ids=["ASCII", "UTF-8", "surrogates", "NUL", "bytes"],
)
def test_content_over_the_inline_limit_goes_to_the_object_store(
    store: object_store.Store, client: redis.Redis, content: str | bytes
) -> None:
    for more in ("", "x"):
        if isinstance(content, bytes):
            fields = {"error_b64": base64.b64encode(content + more.encode()).decode()}
        else:
            fields = {"error": content + more}
        store_evaluation.send(FAILED | fields)
    at_limit, above = sorted(sent(client), key=lambda event: "error_ref" in event)
    assert "error_ref" not in at_limit
    whole = (content if isinstance(content, bytes) else to_bytes(content)) + b"x"
    assert above["error_ref"] | {"encoding": "?"} == {
        "sha256": hashlib.sha256(whole).hexdigest(),
        "size": len(whole),
        "encoding": "?",
    }
    assert not above.keys() & {"error", "error_b64"}
    assert read(store, above["error_ref"]) == whole
    assert len(list(store.objects())) == 1


def test_the_inline_limit_is_the_same_for_many_together_however_low_it_is(
    sends_with: Callable[..., None], client: redis.Redis, tmp_path: Path
) -> None:
    sends_with(object_store_url=f"file://{tmp_path}/objects", inline_limit_bytes="1000")
    store_evaluations([FAILED | {"error": "x" * 1000}, FAILED | {"error": "x" * 1001, **STAMP}])
    at_limit, above = sorted(sent(client), key=lambda event: "error_ref" in event)
    assert (len(at_limit["error"]), above["error_ref"]["size"]) == (1000, 1001)


def test_identical_content_is_uploaded_once_and_made_young_again(
    s3_url: str, s3_server: SeaweedFS, sends_with: Callable[..., None], client: redis.Redis, tmp_path: Path
) -> None:
    event = FAILED | {"error": "x" * MIB, "output": "x" * MIB}
    with S3Relay(s3_server.port) as relay:
        sends_with(object_store_url=s3_url, s3_endpoint_url=relay.endpoint)
        store_evaluations([event | {"eval_id": f"e{number}"} for number in range(5)])
        store_evaluation.send(event)
        # Threads of the first send may have uploaded at once. The server still stored the object once.
        assert len([one for one in relay.seen if one.method == "PUT"]) <= 4
        seen = len(relay.seen)
        store_evaluation.send(event)
        assert {one.method for one in relay.seen[seen:]} == {"GET"}
    assert len({json.dumps(event[name]) for event in sent(client) for name in ("error_ref", "output_ref")}) == 1

    sends_with(object_store_url=f"file://{tmp_path}/objects", sweep_grace_days="2")
    store_evaluation.send(event)
    store = DirectoryStore(tmp_path / "objects")
    (listed,) = store.objects()
    for age, is_touched in ((timedelta(hours=23), False), (timedelta(hours=25), True)):
        then = datetime.now(UTC) - age
        path = tmp_path / "objects" / listed.key[:2] / listed.key[2:4] / listed.key
        os.utime(path, (then.timestamp(), then.timestamp()))
        inode = path.stat().st_ino
        store_evaluation.send(event)
        (found,) = store.objects()
        assert (datetime.now(UTC) - found.modified_at < timedelta(minutes=5)) is is_touched
        assert path.stat().st_ino == inode


def test_nothing_is_put_anywhere_unless_all_events_are_good(store: object_store.Store, client: redis.Redis) -> None:
    object_store.put(store, b"so that there is a store")
    with pytest.raises(InvalidEvent, match=r"\[1\]\.error: required"):
        store_evaluations([FAILED | {"error": "x" * MIB}, FAILED])
    assert len(list(store.objects())) == 1
    assert client.dbsize() == 0


def test_a_sender_may_give_a_reference_itself(store: object_store.Store, client: redis.Redis) -> None:
    reference, _ = object_store.put(store, b"put before")
    store_evaluation.send(FAILED | {"error_ref": reference})
    store_evaluation.send(FAILED | {"error_ref": reference._asdict()})
    assert [event["error_ref"] for event in sent(client)] == [reference._asdict()] * 2


def test_without_an_object_store_a_mebibyte_may_be_sent_and_no_more(
    sends_with: Callable[..., None], client: redis.Redis
) -> None:
    for fields in ({"error": "x" * MIB}, {"error_b64": base64.b64encode(os.urandom(MIB)).decode()}):
        store_evaluation.send(FAILED | fields)
        with pytest.raises(InvalidEvent, match="EVALSTORE_OBJECT_STORE_URL") as refused:
            store_evaluation.send(FAILED | {name: "AAAA" + text for name, text in fields.items()})
        assert [fault.field for fault in refused.value.faults] == ["error"]
    assert client.hlen(BODIES) == 2


@pytest.mark.parametrize("fault", ["unmounted", "reset", "hold"])
def test_with_the_object_store_away_small_content_goes_inline_and_large_content_is_told_in_time(
    fault: Any, sends_with: Callable[..., None], client: redis.Redis, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if fault == "unmounted":
        sends_with(object_store_url=f"file://{tmp_path}/mount/objects")
        _goes_inline_and_is_told(client)
        (tmp_path / "mount").mkdir()
    else:
        server: SeaweedFS = request.getfixturevalue("s3_server")
        with S3Relay(server.port) as relay:
            relay.fail(lambda _: True, Fault(fault))
            sends_with(object_store_url=request.getfixturevalue("s3_url"), s3_endpoint_url=relay.endpoint)
            _goes_inline_and_is_told(client)
        sends_with(s3_endpoint_url=server.endpoint)
    broker.cache_clear()  # A new broker does not wait before it tries the store.
    store_evaluation.send(FAILED | {"error": "x" * MIB})
    assert "error_ref" in sent(client)[-1]


def _goes_inline_and_is_told(client: redis.Redis) -> None:
    began = time.monotonic()
    with pytest.raises(ObjectStoreOutage):
        store_evaluations([FAILED | {"error": "x" * (MIB + 1)}])
    assert time.monotonic() - began < 30
    assert client.dbsize() == 0
    store_evaluation.send(FAILED | {"error": "x" * MIB})  # Fails at once, because the store was unavailable a moment ago.
    assert time.monotonic() - began < 32
    assert [len(event["error"]) for event in sent(client)] == [MIB]


WITHOUT_BOTO3 = """
import sys
sys.modules["boto3"] = None
from tasks import store_evaluation
store_evaluation.send({"type": "evaluation:queued", "eval_id": "e", "code": "small"})
loaded = [name for name in sys.modules if name.startswith(("evalstore.storage", "evalstore.objects."))]
assert loaded == ["evalstore.objects.permissions"], loaded
store_evaluation.send({"type": "evaluation:queued", "eval_id": "e", "code": "x" * 100_000})
print(*[name for name in sys.modules if name.partition(".")[0] in ("sqlalchemy", "psycopg", "botocore")])
"""


def test_a_sender_to_a_folder_needs_no_boto3_and_one_to_s3_is_told_how_to_get_it(redis_url: str, tmp_path: Path) -> None:
    env = {**os.environ, "EVALSTORE_REDIS_URL": redis_url}
    for url in (f"file://{tmp_path}/objects", "s3://bucket"):
        command = [sys.executable, "-c", WITHOUT_BOTO3]
        done = subprocess.run(
            command, env={**env, "EVALSTORE_OBJECT_STORE_URL": url}, capture_output=True, text=True, check=False
        )
        if url.startswith("file"):
            assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
        else:
            assert 'InvalidSettings: evalstore needs the extra "s3"' in done.stderr
