"""Content that is uploaded before the event that names it."""

import base64
import hashlib
import json
import os
import random
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from evalstore.objects import object_store
from evalstore.storage import archive, database
from evalstore.storage.archive import Archive
from models.content import Reference
from models.settings import Settings

E, C = "/storage/evaluations", "/storage/content"
NDJSON = {"Content-Type": "application/x-ndjson"}
MIB = 1024 * 1024


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "objects"


@pytest.fixture
def api(start_api: Callable[..., Any], folder: Path) -> Any:
    return start_api(EVALSTORE_OBJECT_STORE_URL=folder.as_uri())


def stored(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_what_is_uploaded_is_in_the_object_store_once_under_its_hash(api: Any, folder: Path) -> None:
    contents = [b"", b"x", bytes(range(256)) * 300, b"a line of output\n" * MIB, os.urandom(9 * MIB)]
    for data in contents:
        digest = hashlib.sha256(data)
        pieces = (data[start : start + 70_001] for start in range(0, len(data), 70_001))
        headers = {"Content-Digest": f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"}
        first, again = api.both.post(C, content=pieces, headers=headers), api.write.post(C, content=data)
        assert (first.status_code, again.status_code) == (201, 201)
        assert first.json() == again.json()
        reference = Reference(**first.json())
        assert (reference.sha256, reference.size) == (digest.hexdigest(), len(data))
        store = object_store.open_store(folder.as_uri(), Settings())
        assert b"".join(object_store.read(store, reference)) == data
    assert len(stored(folder)) == len(contents)


def test_the_same_is_uploaded_to_a_bucket(start_api: Callable[..., Any], s3_server: Any, s3_url: str) -> None:
    api = start_api(EVALSTORE_OBJECT_STORE_URL=s3_url, EVALSTORE_S3_ENDPOINT_URL=s3_server.endpoint)
    data = os.urandom(MIB) * 20
    reference = Reference(**api.write.post(C, content=data).json())
    store = object_store.open_store(s3_url, Settings(s3_endpoint_url=s3_server.endpoint))
    assert b"".join(object_store.read(store, reference)) == data


def test_a_reference_is_worth_nothing_to_a_key_that_did_not_upload_the_content(api: Any) -> None:
    """However it is written: knowing a hash must not become a way to read what others sent."""
    reference = api.both.post(C, content=b"of another").json()

    def refused(answer: httpx.Response, field: str) -> None:
        told = answer.json() if answer.status_code == 422 else json.loads(answer.text)
        assert answer.status_code == 422 or (answer.status_code in {200, 202} and told["outcome"] == "invalid"), answer.text
        assert [fault["field"] for fault in told["faults"]] == [field]
        assert "upload" in told["faults"][0]["problem"]

    new, ended = {"eval_id": "e", "code_ref": reference}, {"exit_code": 0, "output_ref": reference}
    event = {"type": "evaluation:completed", "eval_id": "e", **ended}
    for extra in ({}, {"Prefer": "respond-async"}):
        refused(api.write.post(E, json=new, headers=extra), "code_ref")
        refused(api.write.put(f"{E}/e", json={"status": "completed", **ended}, headers=extra), "output_ref")
        refused(api.write.post(f"{E}/e/events", json=event, headers=extra), "output_ref")
        refused(api.write.post(f"{E}/e/events", content=json.dumps(event), headers=NDJSON | extra), "output_ref")
        refused(api.write.post("/storage/events:batch", content=json.dumps(event), headers=NDJSON | extra), "output_ref")
    assert api.both.get(f"{E}/e").status_code == 404
    other_size = {**reference, "size": 9}
    refused(api.both.post(E, json={"eval_id": "e", "code_ref": other_size}), "code_ref")

    assert api.write.post(C, content=b"of another").json() == reference
    assert api.write.post(E, json=new).status_code == 201
    assert api.write.put(f"{E}/e", json={"status": "completed", **ended}).status_code == 200
    lines = [json.dumps({**event, "eval_id": "f"}), json.dumps({**event, "eval_id": "g", "output_ref": other_size})]
    outcomes = api.lines(api.write.post("/storage/events:batch", content="\n".join(lines), headers=NDJSON))
    assert [one["outcome"] for one in outcomes] == ["applied", "invalid"]
    later = api.write.post(E, json={"eval_id": "later", "code_ref": reference}, headers={"Prefer": "respond-async"})
    assert later.status_code == 202


def test_a_reference_is_good_for_a_time_in_which_no_sweep_takes_the_object(
    start_api: Callable[..., Any], folder: Path, eventually: Callable[..., None]
) -> None:
    grace_s = 8.0
    api = start_api(EVALSTORE_OBJECT_STORE_URL=folder.as_uri(), EVALSTORE_SWEEP_GRACE_DAYS=str(grace_s / 86_400))
    reference = api.write.post(C, content=b"data").json()
    (path,) = folder.rglob(reference["sha256"])
    os.utime(path, (1, 1))  # As an old object.
    assert api.write.post(C, content=b"data").json() == reference
    assert path.stat().st_mtime > 1
    body = {"eval_id": "e", "code_ref": reference}
    assert api.write.post(E, json=body, headers={"Idempotency-Key": "1"}).status_code == 201
    again = {**body, "eval_id": "other"}
    eventually(lambda: api.write.post(E, json=again, headers={"Idempotency-Key": "2"}).status_code == 422)


def test_what_is_not_what_it_was_said_to_be_is_not_kept(api: Any, folder: Path) -> None:
    digest = base64.b64encode(hashlib.sha256(b"something else").digest()).decode()
    answers = [
        api.write.post(C, content=b"data", headers={"Content-Digest": f"sha-256=:{digest}:"}),
        api.write.post(C, content=b"data", headers={"Content-Digest": "sha-256=:no:"}),
        api.write.post(C, content=b"data", headers={"Content-Encoding": "gzip"}),
        api.write.post(C, files={"file": b"data"}),
    ]
    assert [one.status_code for one in answers] == [422, 422, 415, 415]
    assert {one.headers["content-type"] for one in answers} == {"application/problem+json"}
    assert stored(folder) == []
    assert api.write.post(C, content=b"data", headers={"Content-Digest": "md5=:AAAA:"}).status_code == 201


def test_what_is_too_large_is_refused_while_it_comes(start_api: Callable[..., Any], folder: Path) -> None:
    url, mb = folder.as_uri(), 1_000_000
    apis = [
        start_api(EVALSTORE_OBJECT_STORE_URL=url, EVALSTORE_MAX_REQUEST_BYTES=str(mb)),
        start_api(EVALSTORE_OBJECT_STORE_URL=url, EVALSTORE_MAX_CONTENT_BYTES=str(mb)),
    ]
    for api in apis:
        for content in (bytes(mb + 1), (bytes(10_000) for _ in range(101))):
            answer = api.write.post(C, content=content)
            assert (answer.status_code, answer.headers["content-type"]) == (413, "application/problem+json")
        assert api.write.post(C, content=(bytes(10_000) for _ in range(100))).status_code == 201
    assert len(stored(folder)) == 1


def test_without_an_object_store_it_says_what_to_set(start_api: Callable[..., Any]) -> None:
    answer = start_api().write.post(C, content=b"data")
    assert answer.status_code == 501
    assert "EVALSTORE_OBJECT_STORE_URL" in answer.json()["detail"]


def test_while_the_object_store_is_away_uploads_are_told_to_come_again(start_api: Callable[..., Any], tmp_path: Path) -> None:
    mount = tmp_path / "absent"
    api = start_api(EVALSTORE_OBJECT_STORE_URL=(mount / "objects").as_uri())
    for content in (b"data", (os.urandom(MIB) for _ in range(8))):  # The second body is still arriving when the store fails.
        answer = api.write.post(C, content=content)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    mount.mkdir()
    assert api.write.post(C, content=b"data").status_code == 201
    assert "Traceback" not in api.log.read_text()


def test_clients_that_go_away_while_they_upload_leave_nothing_behind(
    api: Any, folder: Path, eventually: Callable[..., None]
) -> None:
    assert api.write.post(C, content=b"first").status_code == 201
    process = psutil.Process(api.pid)
    files, threads = process.num_fds(), process.num_threads()
    head = f"POST {C} HTTP/1.1\r\nHost: x\r\nX-API-Key: write-key-0001\r\nContent-Length: 50000000\r\n\r\n".encode()

    def leave() -> None:
        with socket.create_connection(("127.0.0.1", api.port)) as conn:
            conn.sendall(head + os.urandom(5 * MIB))

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(leave) for _ in range(40)]:
            done.result()
    eventually(lambda: len(stored(folder)) == 1, what="an end of what was begun")
    answers = [api.write.post(C, content=os.urandom(MIB)).status_code for _ in range(10)]
    assert answers == [201] * 10
    eventually(lambda: process.num_fds() <= files + 1, what="an end of the connections")
    assert process.num_threads() <= threads + 8  # Upload threads stay.
    # Aborted uploads do not count as errors of the service.
    assert "Traceback" not in api.log.read_text()


def test_a_hundred_mib_are_read_in_any_range_before_and_after_they_were_archived(
    start_api: Callable[..., Any], tmp_path: Path, folder: Path, database_url: str, eventually: Callable[..., None]
) -> None:
    given = {"EVALSTORE_OBJECT_STORE_URL": folder.as_uri(), "EVALSTORE_ARCHIVE_URL": (tmp_path / "archive").as_uri()}
    api = start_api(**given)
    data = b"".join(os.urandom(700_000) + b"a line of output\n" * 20_513 for _ in range(100))  # A part of this compresses.
    assert len(data) > 100 * MIB
    data = data[: 100 * MIB]
    reference = api.both.post(C, content=data).json()
    ended = {"status": "completed", "exit_code": 0, "output_ref": reference}
    assert api.both.put(f"{E}/e", json=ended).json()["output_size"] == len(data)
    process = psutil.Process(api.pid)
    picked = random.Random(1)  # noqa: S311 - the same at every run

    def check_ranges() -> None:
        spans = [(first, first + picked.randrange(3 * MIB)) for first in (picked.randrange(len(data)) for _ in range(8))]
        for first, last in [(0, 0), (len(data) - 1, len(data)), (4 * MIB - 1, 4 * MIB), *spans]:
            part = api.read.get(f"{E}/e/output", headers={"Range": f"bytes={first}-{last}"})
            assert (part.status_code, part.content == data[first : last + 1]) == (206, True), (first, last)
        assert api.read.get(f"{E}/e/output", headers={"Range": "bytes=-5"}).content == data[-5:]

    check_ranges()
    engine = database.engine(database_url)
    with engine.connect() as conn:
        assert archive.run_once(conn, Archive.of(Settings.from_environment(given)), datetime.now(UTC)).moved == 1
    engine.dispose()
    check_ranges()
    for _ in range(20):  # Clients that disconnect during the stream.
        with api.read.stream("GET", f"{E}/e/output") as answer:
            next(answer.iter_raw())

    def is_over() -> bool:
        """No object is open, and of clients those that are kept here; what PostgreSQL's pool has grown by may stay."""
        files = [one.path for one in process.open_files() if one.path.startswith((str(folder), str(tmp_path / "archive")))]
        clients = [one for one in process.net_connections() if one.laddr.port == api.port and one.status != "LISTEN"]
        return not files and len(clients) <= 2

    eventually(is_over, what="an end of what they were reading")
    assert process.num_threads() < 60  # No thread reads ahead for a client that has left.
    assert api.read.get(f"{E}/e/output").content == data
    assert "Traceback" not in api.log.read_text()


@pytest.mark.parametrize("path", [C, E])
def test_many_large_uploads_at_once_need_little_memory(
    start_api: Callable[..., Any], folder: Path, path: str, peak_rss: Callable[[int], Any]
) -> None:
    """Those that wait for their turn are not read: all at once would need more than twice as much."""
    api = start_api(EVALSTORE_OBJECT_STORE_URL=folder.as_uri(), EVALSTORE_MAX_REQUEST_BYTES=str(32 * MIB))
    piece = os.urandom(65536) if path == C else b"x" * 65536
    size = 384 * len(piece)

    def upload(number: int) -> int:
        pieces = [piece] * 384 if path == C else [b'{"eval_id": "e%d", "code": "' % number, *[piece] * 384, b'"}']
        with httpx.Client(base_url=api.url, headers={"X-API-Key": "both-key-0001"}, timeout=120) as client:
            answer = client.post(path, content=iter(pieces))
            if answer.status_code == 201 and path == E:
                assert answer.json()["code_size"] == size
            assert (answer.status_code == 503) == ("retry-after" in answer.headers)  # Its turn did not come in time.
            return answer.status_code

    with peak_rss(api.pid) as peak, ThreadPoolExecutor(24) as pool:
        statuses = set(pool.map(upload, range(24)))
    assert 201 in statuses <= {201, 503}
    assert peak.grown_bytes < 24 * size / 2
