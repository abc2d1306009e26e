"""What holds for every request, seen without a server."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evalstore.api import docs_page, problems
from evalstore.api.application import documented_app
from evalstore.api.request_limits import RequestLimitsMiddleware

Exchange = tuple[list[Message], list[int]]


def exchange(app: ASGIApp, body: list[bytes] | None = None, headers: list[tuple[bytes, bytes]] | None = None) -> Exchange:
    """What `app` sends to one request behind a Guard, and what is observed. What it reads is taken from `body`."""
    sent: list[Message] = []
    statuses: list[int] = []
    pieces = [b""] if body is None else body

    async def receive() -> Message:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "http", "method": "POST", "path": "/", "headers": headers or [(b"transfer-encoding", b"chunked")]}
    guard = RequestLimitsMiddleware(
        app, max_request_bytes=100, observe=lambda _scope, status, _seconds: statuses.append(status)
    )
    asyncio.run(guard(scope, receive, send))
    return sent, statuses


async def reads_all(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def status(sent: list[Message]) -> int:
    return int(sent[0]["status"])


def test_a_body_up_to_the_limit_passes_and_one_byte_more_does_not() -> None:
    assert status(exchange(reads_all, [b"x" * 60, b"x" * 40])[0]) == 200
    assert status(exchange(reads_all, [b"x" * 60, b"x" * 41])[0]) == 413
    assert status(exchange(reads_all, [b""], [(b"content-length", b"101")])[0]) == 413


@pytest.mark.parametrize("given", [b"", b"a b", b"x" * 129, b"\xff", b"\n"])
def test_a_request_id_that_could_forge_a_log_line_is_replaced(given: bytes) -> None:
    sent, _ = exchange(reads_all, headers=[(b"x-request-id", given)])
    assert dict(sent[0]["headers"])[b"x-request-id"] != given
    sent, _ = exchange(reads_all, headers=[(b"x-request-id", b"abc-123")])
    assert dict(sent[0]["headers"])[b"x-request-id"] == b"abc-123"


def test_an_error_nobody_expected_is_a_problem_without_its_text() -> None:
    app = FastAPI()
    problems.install(app, [])

    @app.post("/")
    async def fail() -> None:
        raise RuntimeError("secret detail")

    sent, statuses = exchange(app)
    told = json.loads(sent[1]["body"])
    assert (status(sent), told["type"], statuses) == (500, "urn:evalstore:problem:internal", [500])
    assert "secret" not in json.dumps(told)


def test_an_answer_that_breaks_off_is_not_ended_as_if_it_were_whole() -> None:
    async def breaks(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("gone")

    with pytest.raises(Exception, match=r"^$"):
        exchange(breaks)


def test_what_a_client_still_sends_is_read_before_the_answer_ends() -> None:
    async def answers_at_once(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 403, "headers": []})
        await send({"type": "http.response.body", "body": b"no"})

    body = [b"a", b"b", b"c"]
    sent, _ = exchange(answers_at_once, body)
    assert body == []
    assert [(one.get("body"), one.get("more_body", False)) for one in sent[1:]] == [(b"no", True), (b"", False)]


def test_the_page_of_the_document_needs_no_other_host_and_no_script(made: Any) -> None:
    page = docs_page.render({**made, "servers": [{"url": "/"}]})
    assert all(operation["operationId"] in page for methods in made["paths"].values() for operation in methods.values())
    assert "<script" not in page
    without_examples = page.replace("https://hooks.example.com/", "")
    assert "http://" not in without_examples
    assert "https://" not in without_examples
    assert "default-src 'none'" in docs_page.HEADERS["Content-Security-Policy"]


def test_the_document_names_examples_and_errors_of_every_request(made: Any) -> None:
    for path, methods in made["paths"].items():
        for operation in methods.values():
            assert operation["summary"], path
            if path.startswith("/storage/"):
                assert {"401", "403", "422", "503"} <= set(operation["responses"]), path
                assert operation["security"], path
            else:
                assert "security" not in operation, path
    assert all("$ref" not in json.dumps(one.get("examples", [])) for one in made["components"]["schemas"].values())


@pytest.fixture(scope="module")
def made() -> Any:
    return documented_app().openapi()


def test_every_reference_of_the_document_leads_somewhere(made: Any) -> None:
    names: set[str] = set()

    def walk(value: Any, found: Callable[[str], None]) -> None:
        if isinstance(value, dict):
            if "$ref" in value:
                found(value["$ref"])
            for one in value.values():
                walk(one, found)
        elif isinstance(value, list):
            for one in value:
                walk(one, found)

    walk(made, lambda ref: names.add(ref.removeprefix("#/components/schemas/")))
    assert names <= set(made["components"]["schemas"])
