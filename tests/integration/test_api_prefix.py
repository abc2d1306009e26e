"""The service below a path of a proxy, which keeps that path or removes it."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import httpx
import pytest

from evalstore.api.rendering import with_prefix
from evalstore.client.http import StorageClient
from models import InvalidSettings
from models.settings import Settings
from tests.integration.conftest import BOTH
from tests.integration.test_api_hostile import answered, head

PREFIX = "/tools/evalstore"
LARGE = "x" * 100_000
AT_UVICORN = (
    "-c",
    f"""
import os, sys, uvicorn
sys.argv = ["uvicorn", "evalstore.api.app:app", "--http", "evalstore.api.protocol:Protocol", "--root-path", {PREFIX!r}]
sys.argv += ["--port", os.environ["EVALSTORE_API_PORT"]]
uvicorn.main()
""",
)
BY_SETTING = ("-m", "evalstore.api")


class _Handler(BaseHTTPRequestHandler):
    """Passes on what is below PREFIX; all else is another application's."""

    port: ClassVar[int]
    keeps: ClassVar[bool]

    def _pass_on(self) -> None:
        if not self.path.startswith(f"{PREFIX}/"):
            self.send_error(404, "no application")
            return
        path = self.path if self.keeps else self.path.removeprefix(PREFIX)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream = http.client.HTTPConnection("127.0.0.1", self.port)
        upstream.request(self.command, path, body, dict(self.headers))
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name not in {"transfer-encoding", "content-length"}:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _pass_on  # noqa: N815 - the names that the library calls

    def log_message(self, *given: object) -> None:
        """Nothing."""


@contextmanager
def proxy(port: int, *, keeps: bool) -> Iterator[str]:
    """The origin of a proxy that offers the service at that port below PREFIX."""
    handler = type("Handler", (_Handler,), {"port": port, "keeps": keeps})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("keeps", [False, True], ids=["removed", "kept"])
@pytest.mark.parametrize("command", [AT_UVICORN, BY_SETTING], ids=["uvicorn", "setting"])
def test_all_addresses_lead_back_through_the_proxy(
    start_api: Callable[..., Any], command: tuple[str, ...], keeps: bool
) -> None:
    api = start_api(command=command, **({"EVALSTORE_API_ROOT_PATH": f"{PREFIX}/"} if command is BY_SETTING else {}))
    target = f"http://x{PREFIX if keeps else ''}/storage/evaluations"
    assert answered(api.port, head("GET", target)).startswith(b"HTTP/1.1 200 ")
    headers = {"Authorization": f"Bearer {BOTH}"}
    with proxy(api.port, keeps=keeps) as origin, httpx.Client(base_url=origin, headers=headers, timeout=30) as client:
        body = {"eval_id": "e", "code": LARGE, "metadata": {"code_url": "/storage/evaluations/mine", "n": 2**62, "x": 1e300}}
        made = client.post(f"{PREFIX}/storage/evaluations", json=body)
        assert (made.status_code, made.headers["location"]) == (201, f"{PREFIX}/storage/evaluations/e")
        later = client.post(
            f"{PREFIX}/storage/evaluations", json={"eval_id": "l", "code": "c"}, headers={"Prefer": "respond-async"}
        )
        assert (later.status_code, later.headers["location"]) == (202, f"{PREFIX}/storage/evaluations/l")
        for answer in (made, client.get(made.headers["location"]), client.get(made.headers["location"])):
            record = answer.json()
            assert record["metadata"] == body["metadata"]
            assert record["code_url"] == f"{PREFIX}/storage/evaluations/e/code"
        assert client.get(record["code_url"]).text == LARGE
        (event,) = client.get(f"{PREFIX}/storage/evaluations/e/events").json()["events"]
        assert client.get(event["code_url"]).text == LARGE

        assert client.get(f"{PREFIX}/openapi.json").json()["servers"] == [{"url": PREFIX}]
        page = client.get(f"{PREFIX}/docs").text
        assert f'href="{PREFIX}/openapi.json"' in page
        assert f"<code>{PREFIX}/storage/evaluations</code>" in page
        for path in ("/health/live", "/health/ready", "/metrics"):
            assert client.get(PREFIX + path).status_code == 200, path
            assert api.nobody.get(path).status_code == 200, f"{path}, as a probe asks without the proxy"
        assert client.post(f"{PREFIX}/docs").headers["allow"] == "GET, HEAD"
        assert client.get(f"{PREFIX}/nothing").status_code == 404
        assert 'route="/storage/evaluations/{eval_id}"' in client.get(f"{PREFIX}/metrics").text

        for url in (origin + PREFIX, f"{origin}{PREFIX}/\n"):
            with StorageClient(url, BOTH) as storage:
                assert storage.get_evaluation("e").version == 1
                assert storage.get_content("e", "code") == LARGE.encode()
                assert [one.eval_id for one in storage.list_evaluations()] == ["e"]


def test_without_a_prefix_addresses_have_none(api: Any) -> None:
    made = api.both.post("/storage/evaluations", json={"eval_id": "e", "code": LARGE})
    assert made.headers["location"] == "/storage/evaluations/e"
    assert made.json()["code_url"] == "/storage/evaluations/e/code"
    assert api.nobody.get("/openapi.json").json()["servers"] == [{"url": "/"}]
    assert 'href="/openapi.json"' in api.nobody.get("/docs").text


@pytest.mark.parametrize("path", ["evalstore", "/a//b", "/a/../b", "/a?b", "/a b", "/storage", "/health/x", "http://h/a", "/é"])
def test_a_prefix_that_can_be_none_is_refused(path: str) -> None:
    with pytest.raises(InvalidSettings, match="EVALSTORE_API_ROOT_PATH: expected a path"):
        Settings.from_environment({"EVALSTORE_API_ROOT_PATH": path})


def test_a_prefix_may_end_in_a_slash() -> None:
    assert Settings.from_environment({"EVALSTORE_API_ROOT_PATH": "/a/b-1.c/"}).api_root_path == "/a/b-1.c"
    assert Settings.from_environment({"EVALSTORE_API_ROOT_PATH": "/"}).api_root_path is None


@pytest.mark.parametrize("url", ["http://", "http:///a", "http://h?a=b", "http://h/#a", "ftp://h", "http://h/a b"])
def test_a_client_refuses_an_address_that_can_be_none(url: str) -> None:
    with pytest.raises(ValueError, match="expected an address"):
        StorageClient(url, "key")


def test_the_address_of_large_content_has_the_prefix_beside_content_with_lone_surrogates() -> None:
    body = b'{"code":"\\ud800","output_url":"/storage/evaluations/e/output"}'
    assert with_prefix("/p", body) == b'{"code":"\\ud800","output_url":"/p/storage/evaluations/e/output"}'
