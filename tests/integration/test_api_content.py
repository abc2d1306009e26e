"""Content over HTTP: streamed, in ranges, and never taken for a page; and what clients that misbehave leave behind."""

import base64
import os
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalstore.api.content_routes import span_of
from evalstore.api.problems import Problem
from evalstore.storage import database, event_store
from models.events import parse

E = "/storage/evaluations"
SIZE = 24 * 1024 * 1024


@pytest.fixture
def stored(api: Any) -> Iterator[Callable[..., None]]:
    """`stored("e", output=bytes)`: an evaluation that ended with that."""
    engine = database.engine(api.database_url)

    def store(eval_id: str, **contents: bytes) -> None:
        fields = {f"{kind}_b64": base64.b64encode(data).decode() for kind, data in contents.items()}
        event = {"type": "evaluation:completed", "eval_id": eval_id, "exit_code": 0, "event_id": UUID(int=1)}
        with engine.connect() as conn:
            event_store.store(conn, [parse({**event, "occurred_at": "2026-01-01T00:00:00Z", **fields})])

    yield store
    engine.dispose()


@pytest.mark.parametrize("data", [os.urandom(SIZE), b"compressible\n" * (SIZE // 13)], ids=["random", "compressed"])
def test_large_content_comes_back_whole_and_in_ranges(api: Any, stored: Callable[..., None], data: bytes) -> None:
    stored("e", output=data)
    assert api.read.get(f"{E}/e/output").content == data
    picked = random.Random(1)  # noqa: S311 - the same at every run
    for _ in range(12):
        first = picked.randrange(len(data))
        last = min(len(data) - 1, first + picked.randrange(3_000_000))
        part = api.read.get(f"{E}/e/output", headers={"Range": f"bytes={first}-{last}"})
        assert part.status_code == 206
        assert part.headers["content-range"] == f"bytes {first}-{last}/{len(data)}"
        assert part.content == data[first : last + 1]


def test_small_content_has_its_headers(api: Any, stored: Callable[..., None]) -> None:
    stored("e", output=b"<script>\n", error=b"\0\xff")
    text, raw = api.read.get(f"{E}/e/output"), api.read.get(f"{E}/e/error")
    assert (text.content, text.headers["content-type"]) == (b"<script>\n", "text/plain; charset=utf-8")
    assert (raw.content, raw.headers["content-type"]) == (b"\0\xff", "application/octet-stream")
    assert text.headers["x-content-type-options"] == "nosniff"
    assert text.headers["content-disposition"] == 'attachment; filename="e-output.txt"'
    assert text.headers["accept-ranges"] == "bytes"
    same = api.read.get(f"{E}/e/output", headers={"If-None-Match": text.headers["etag"]})
    other = api.read.get(f"{E}/e/output", headers={"Range": "bytes=0-1", "If-Range": '"another"'})
    assert (same.status_code, other.status_code, other.content) == (304, 200, b"<script>\n")
    beyond = api.read.get(f"{E}/e/output", headers={"Range": "bytes=9-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, "bytes */9")
    assert api.read.get(f"{E}/e/code").status_code == api.read.get(f"{E}/absent/output").status_code == 404


def test_content_of_an_event_that_no_longer_counts_can_be_read(api: Any) -> None:
    for attempt in (1, 2):
        body = {"status": "completed", "exit_code": 0, "attempt": attempt, "output": f"of attempt {attempt}"}
        api.both.put(f"{E}/e", json=body)
    assert api.read.get(f"{E}/e/output").text == "of attempt 2"
    log = api.read.get(f"{E}/e/events").json()["events"]
    assert api.read.get(f"{E}/e/output", params={"event_id": log[0]["event_id"]}).text == "of attempt 1"


def test_a_client_that_goes_away_in_mid_stream_leaves_nothing_behind(
    api: Any, stored: Callable[..., None], eventually: Callable[..., None]
) -> None:
    stored("e", output=os.urandom(SIZE))
    for _ in range(20):
        with api.read.stream("GET", f"{E}/e/output") as answer:
            next(answer.iter_raw())
    stored("packed", output=bytes(SIZE))  # Compressed content is read in larger pieces.
    request = f"GET {E}/packed/output HTTP/1.1\r\nHost: x\r\nX-API-Key: read-key-0001\r\n\r\n".encode()
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", api.port)) as gone:
            gone.sendall(request)
            gone.recv(100)

    def in_transaction() -> int:
        with psycopg.connect(api.database_url, autocommit=True) as conn:
            query = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%%' AND datname = current_database()"
            return int(conn.execute(query.replace("%%", "%")).fetchall()[0][0])

    eventually(lambda: in_transaction() == 0, what="an end of every transaction")
    assert api.read.get(f"{E}/e/output", headers={"Range": "bytes=0-3"}).status_code == 206
    assert "socket.send" not in api.said


def test_content_that_turns_out_damaged_halfway_ends_the_answer_and_the_log_says_why(
    api: Any, stored: Callable[..., None]
) -> None:
    stored("e", output=os.urandom(SIZE))
    with api.read.stream("GET", f"{E}/e/output") as answer:
        pieces = answer.iter_raw()
        next(pieces)
        with psycopg.connect(api.database_url) as conn:
            conn.execute("UPDATE contents SET data = substring(data, 1, 20000000)")
        with pytest.raises(httpx.RemoteProtocolError):
            list(pieces)
    assert "the response was aborted: ObjectDamaged" in api.said
    assert "unexpected error" not in api.said


def test_a_request_that_is_too_large_is_refused_while_it_is_read(start_api: Callable[..., Any]) -> None:
    api = start_api(EVALSTORE_MAX_REQUEST_BYTES="100000")
    announced = api.both.post(E, content=b"x" * 200_000)
    assert (announced.status_code, announced.json()["type"]) == (413, "urn:evalstore:problem:too-large")
    unannounced = api.both.post(E, content=(b"x" * 1000 for _ in range(5000)))
    assert (unannounced.status_code, unannounced.headers["content-type"]) == (413, "application/problem+json")
    # A client that never ends its body still gets an answer.
    with socket.create_connection(("127.0.0.1", api.port), timeout=20) as conn:
        head = f"POST {E} HTTP/1.1\r\nHost: x\r\nAuthorization: {api.both.headers['authorization']}\r\n"
        conn.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + b"186a1\r\n" + b"x" * 100_001)
        assert conn.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_key_without_write_scope_is_refused_before_the_body_is_read(api: Any) -> None:
    answer = api.read.post(E, content=(b"x" * 65536 for _ in range(100)))
    assert (answer.status_code, answer.json()["title"]) == (403, "Forbidden")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 50), st.one_of(st.none(), st.integers(0, 60)), st.one_of(st.none(), st.integers(0, 60)))
def test_a_range_is_the_slice_it_names(size: int, first: int | None, last: int | None) -> None:
    data = bytes(range(size))
    header = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    if first is None:
        expected = data[max(0, size - last) :] if last is not None else data
    else:
        expected = data[first:] if last is None else data[first : last + 1]
    if first is not None and last is not None and last < first:
        expected = data  # An invalid range is ignored.
    ignored = header == "bytes=-" or (first is not None and last is not None and last < first)
    if expected or ignored:
        span = span_of(header, size)
        assert (data if span is None else data[span.start : span.stop]) == expected
    else:
        with pytest.raises(Problem, match="the content has"):
            span_of(header, size)
