"""Clients that speak HTTP badly, slowly, or to harm."""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.conftest import Api

E = "/storage/evaluations"
KEY = b"X-API-Key: both-key-0001\r\n"
# The same service with shorter time limits.
IMPATIENT = (
    "import evalstore.api.request_limits as limits, evalstore.api.protocol, evalstore.api.__main__ as main\n"
    "evalstore.api.protocol.HEAD_S, limits.STEP_S, limits.PACE_BYTES_S = 0.5, 2.0, 1_000_000\n"
    "main.main()"
)


def head(method: str, path: str, *fields: bytes, length: int | None = None) -> bytes:
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: x", KEY.strip(), b"Connection: close", *fields]
    return b"\r\n".join([*lines, *([b"Content-Length: %d" % length] if length is not None else []), b"", b""])


def post(body: bytes) -> bytes:
    return head("POST", E, b"Content-Type: application/json", length=len(body)) + body


def answered(port: int, request: bytes) -> bytes:
    """All that comes back, until the service closes the connection."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as conn, contextlib.suppress(ConnectionError):
        conn.sendall(request)
        while data := conn.recv(65536):
            received += data
    return received


REFUSED = {
    "no HTTP": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    "no host": (400, f"GET {E} HTTP/1.1\r\n\r\n".encode()),
    "a huge header": (400, b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 200_000 + b"\r\n\r\n"),
    "two lengths": (400, head("POST", E, b"Content-Length: 5", b"Content-Length: 6") + b"hello!"),
    "a negative length": (400, head("POST", E, b"Content-Length: -5")),
    "a broken chunk": (400, head("POST", E, b"Transfer-Encoding: chunked") + b"5\r\nhello\r\nzz\r\n"),
    "a broken chunk without a key": (
        400,
        f"POST {E} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n".encode(),
    ),
    "invalid UTF-8": (422, post(b'{"eval_id": "\xff", "code": "c"}')),
    "UTF-16": (422, post('{"eval_id": "e", "code": "c"}'.encode("utf-16"))),
    "gzip": (415, head("POST", E, b"Content-Type: application/json", b"Content-Encoding: gzip", length=3) + b"\x1f\x8b\x08"),
    "endless nesting": (422, post(b"[" * 200_000)),
    "nested metadata": (422, post(b'{"eval_id": "e", "metadata": ' + b'{"a":' * 50_000 + b"}" * 50_000 + b"}")),
    "a huge number": (422, post(b'{"eval_id": "e", "code": "c", "attempt": ' + b"9" * 5000 + b"}")),
    "no number": (422, post(b'{"eval_id": "e", "code": "c", "metadata": {"a": NaN}}')),
    "nothing": (422, post(b"")),
    "null": (422, post(b"null")),
    "lines for no evaluation": (
        422,
        head("POST", f"{E}/a%20b/events", b"Content-Type: application/x-ndjson", length=2) + b"{}",
    ),
    "the parent": (404, head("GET", f"{E}/..")),
    "the parent's file": (404, head("GET", f"{E}/../../etc/passwd")),
    "an encoded slash": (404, head("GET", f"{E}/..%2f..%2fetc%2fpasswd/output")),
    "a trailing slash": (404, head("GET", f"{E}/e/")),
    "a doubled slash": (404, head("GET", f"/{E}/e")),
    "a long path": (404, head("GET", f"{E}/{'x' * 50_000}")),
    "any method": (405, head("BREW", E)),
    "OPTIONS": (405, head("OPTIONS", f"{E}/e")),
    "a flood of filters": (422, head("GET", f"{E}?" + "&".join(f"metadata.k{number}=v" for number in range(3000)))),
    "a header of bytes": (422, head("POST", E, b"Idempotency-Key: \xff", length=2) + b"{}"),
    "two keys": (401, head("GET", E, b"Authorization: Bearer bad")),
}  # fmt: skip


def test_whatever_is_sent_is_answered_with_a_problem_and_no_error_is_logged(api: Any) -> None:
    for name, (status, request) in REFUSED.items():
        top, _, body = answered(api.port, request).partition(b"\r\n\r\n")
        lines = top.lower().split(b"\r\n")
        assert lines[0].startswith(b"http/1.1 %d " % status), f"{name}: {top[:500]!r}"
        assert b"content-type: application/problem+json" in lines, f"{name}: {top!r}"
        body = body.split(b"\r\n")[0 if b"transfer-encoding: chunked" not in lines else 1]
        problem = json.loads(body)
        assert problem["status"] == status, name
        assert f"x-request-id: {problem['request_id']}".encode() in lines, name
    log = api.said
    assert "Traceback" not in log
    assert "ERROR" not in log


def test_pipelined_requests_are_answered_in_their_order(api: Any) -> None:
    for name in "ab":
        api.both.post(E, json={"eval_id": name, "code": "c"})
    kept = head("GET", f"{E}/a").replace(b"Connection: close\r\n", b"")
    received = answered(api.port, kept * 3 + head("GET", f"{E}/b"))
    assert received.count(b"HTTP/1.1 200 OK") == 4
    assert [part[:1] for part in received.split(b'"eval_id":"')[1:]] == [b"a", b"a", b"a", b"b"]


@pytest.mark.parametrize("authority", ["http://x", "HTTPS://x:8086"])
def test_a_target_in_absolute_form_is_that_of_its_path(api: Any, authority: str) -> None:
    """As a forward proxy sends it. RFC 9112, 3.2.2: a server MUST accept the absolute-form in requests."""
    assert answered(api.port, head("GET", f"{authority}{E}/nobody")).count(b"urn:evalstore:problem:not-found") == 1
    assert answered(api.port, head("GET", f"{authority}{E}?limit=1")).startswith(b"HTTP/1.1 200 ")
    assert answered(api.port, head("GET", authority))[9:12] == answered(api.port, head("GET", "/"))[9:12]


def test_head_is_answered_as_get_is_without_its_body(api: Any) -> None:
    api.both.post(E, json={"eval_id": "e", "code": "c" * 3_000_000})
    for path in (f"{E}/e", f"{E}/e/code", E, f"{E}?format=ndjson", "/metrics", f"{E}/absent", "/nowhere", f"{E}/e/output"):
        got, asked = api.read.get(path), api.read.head(path)
        assert (asked.status_code, asked.content) == (got.status_code, b""), path
        if path != "/metrics":
            same = {"date", "x-request-id", "content-length"} if got.status_code == 404 else {"date", "x-request-id"}
            assert {name: value for name, value in asked.headers.items() if name not in same} == {
                name: value for name, value in got.headers.items() if name not in same
            }, path
    part = api.read.head(f"{E}/e/code", headers={"Range": "bytes=0-1"})
    assert (part.status_code, part.headers["content-length"]) == (200, "3000000")  # Ranges apply only to GET.
    assert api.nobody.head(f"{E}/e").status_code == 401
    counted = api.nobody.get("/metrics").text
    assert 'method="HEAD"' not in counted
    log = api.said
    assert "Traceback" not in log
    assert "ERROR" not in log


@pytest.fixture(scope="module")
def impatient(shared_api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    servers = {"EVALSTORE_DATABASE_URL": shared_api.database_url, "EVALSTORE_REDIS_URL": shared_api.redis_url}
    service = Api(tmp_path_factory.mktemp("impatient"), servers, ("-c", IMPATIENT))
    service.start()
    yield service
    service.stop()


def test_who_never_ends_the_head_of_a_request_is_cut_off(impatient: Any, eventually: Callable[..., None]) -> None:
    conns = [socket.create_connection(("127.0.0.1", impatient.port), timeout=20) for _ in range(30)]
    for number, conn in enumerate(conns):
        if number % 3:
            conn.sendall(b"GET / HTTP/1.1\r\n")
        if number % 3 == 2:  # the second request of a connection
            conn.sendall(b"Host: x\r\n\r\n")
            assert conn.recv(65536).startswith(b"HTTP/1.1 404")
            conn.sendall(b"GET / HTTP/1.1\r\nA: ")
    begun = time.monotonic()
    open_ones = list(conns)
    while open_ones and time.monotonic() < begun + 20:
        for conn in list(open_ones):
            with contextlib.suppress(TimeoutError, BlockingIOError):
                conn.setblocking(False)
                try:
                    if conn.recv(65536) == b"":
                        open_ones.remove(conn)
                    elif conns.index(conn) % 3:
                        conn.send(b"a")  # A byte now and then does not extend the limit.
                except ConnectionError:
                    open_ones.remove(conn)
    assert open_ones == []
    for conn in conns:
        conn.close()


def test_a_service_whose_clients_may_hold_it_up_says_so(shared_api: Api, impatient: Api, tmp_path: Path) -> None:
    plainly = "import os, uvicorn; uvicorn.run('evalstore.api.app:app', port=int(os.environ['EVALSTORE_API_PORT']))"
    servers = {"EVALSTORE_DATABASE_URL": shared_api.database_url, "EVALSTORE_REDIS_URL": shared_api.redis_url}
    plain = Api(tmp_path, servers, ("-c", plainly))
    plain.start()
    plain.stop()
    assert [one.said.count("--http evalstore.api.protocol:Protocol") for one in (plain, impatient)] == [1, 0]


def test_a_body_that_trickles_is_given_up(impatient: Any) -> None:
    """Every step of it is in time; the whole would hold a place for ever."""
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=0.1) as conn:
        conn.sendall(head("POST", E, length=1_000_000))
        begun = time.monotonic()
        received = b""
        while not received and time.monotonic() < begun + 20:
            conn.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                received = conn.recv(65536)
    assert received.startswith(b"HTTP/1.1 408 ")


def test_a_stream_may_take_longer_than_any_of_its_steps(impatient: Any) -> None:
    data = "0123456789" * 1_000_000
    assert impatient.both.post(E, json={"eval_id": "slowly-read", "code": data}).status_code == 201
    received = b""
    # Small kernel buffers, so that the service notices a slow reader.
    line = httpx.HTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)])
    with impatient.client("read-key-0001", transport=line).stream("GET", f"{E}/slowly-read/code") as answer:
        for piece in answer.iter_raw(200_000):
            received += piece
            time.sleep(0.08)
    assert received == data.encode()
