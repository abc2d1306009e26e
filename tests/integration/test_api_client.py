"""The Python client against a running service, and against a line that breaks."""

import gzip
import hashlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from evalstore.client import Conflict, NotFound, ServiceError, ServiceOutage, StorageClient, VersionChanged
from evalstore.local.servers import Postgres
from evalstore.storage.migrations import upgrade
from models import Outage

ROOT = Path(__file__).parents[2]


class Breaking(httpx.BaseTransport):
    """A real line that loses the answer of every second request, or breaks off every stream after some bytes."""

    def __init__(self, *, answers: bool = False, streams: bool = False) -> None:
        self._line = httpx.HTTPTransport()
        self._answers, self._streams = answers, streams
        self.requests = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.requests += 1
        answer = self._line.handle_request(request)
        if self._answers and self.requests % 2:
            answer.read()
            raise httpx.ReadError("the answer was lost", request=request)
        if self._streams:
            return httpx.Response(answer.status_code, headers=answer.headers, stream=_Broken(answer))
        return answer

    def close(self) -> None:
        self._line.close()


class _Broken(httpx.SyncByteStream):
    def __init__(self, answer: httpx.Response) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for piece in self._answer.iter_raw(65536):
            size += len(piece)
            yield piece
            if size > 1_000_000:
                raise httpx.ReadError("broke off")

    def close(self) -> None:
        self._answer.close()


class Packing(httpx.BaseTransport):
    """A real line through a proxy that packs for whoever says that it may."""

    def __init__(self) -> None:
        self._line = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self._line.handle_request(request)
        body = answer.read()
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return httpx.Response(answer.status_code, headers=answer.headers, stream=httpx.ByteStream(body))
        headers = {**answer.headers, "content-encoding": "gzip", "etag": f"W/{answer.headers['etag']}"}
        del headers["content-length"]
        return httpx.Response(answer.status_code, headers=headers, stream=httpx.ByteStream(gzip.compress(body)))

    def close(self) -> None:
        self._line.close()


@pytest.fixture
def client(api: Any) -> Iterator[StorageClient]:
    with StorageClient(api.url, "both-key-0001") as made:
        yield made


def test_what_the_client_stores_it_reads_back(client: StorageClient) -> None:
    made = client.create_evaluation("e", "print(1)", run_id="r", metadata={"team": "blue"})
    ended = client.update_evaluation(
        "e", "completed", if_version=1, exit_code=0, score=0.5, output=b"\xff\0", error="é" * 70_000
    )
    read = client.get_evaluation("e")
    assert (made.status, made.version, ended.version, read) == ("queued", 1, 2, ended)
    assert (read.code, read.output, read.error, read.error_size) == ("print(1)", b"\xff\0", None, 140_000)
    assert (made.run_id, read.run_id, read.score) == ("r", "r", 0.5)
    assert client.get_output("e") == b"\xff\0"
    assert client.get_content("e", "error").decode() == "é" * 70_000
    assert b"".join(client.stream_content("e", "error", start=100_000)).decode() == "é" * 20_000


def test_what_the_service_refuses_says_why(client: StorageClient) -> None:
    client.create_evaluation("e", "c")
    with pytest.raises(Conflict, match="created before"):
        client.create_evaluation("e", "c")
    with pytest.raises(VersionChanged):
        client.update_evaluation("e", "running", if_version=7)
    with pytest.raises(NotFound):
        client.get_evaluation("absent")
    with pytest.raises(NotFound):
        client.get_output("e")
    with pytest.raises(ServiceError, match="exit_code") as refused:
        client.update_evaluation("e", "completed")
    assert [fault.field for fault in refused.value.faults] == ["exit_code"]


def test_what_is_told_twice_because_an_answer_was_lost_is_stored_once(api: Any) -> None:
    line = Breaking(answers=True)
    with StorageClient(api.url, "both-key-0001", transport=line) as client:
        client.create_evaluation("e", "c")
        client.update_evaluation("e", "running", if_version=1)
        events = [{"type": "evaluation:started", "eval_id": "e"} for _ in range(10)]
        outcomes = [one.outcome for one in client.send_events(events)]
        assert client.get_evaluation("e").version == 12
    assert (outcomes, line.requests) == (["duplicate"] * 10, 8)


def test_a_stream_that_breaks_off_is_taken_up_where_it_did(api: Any) -> None:
    data = bytes(range(256)) * 20_000
    with StorageClient(api.url, "both-key-0001", transport=Breaking(streams=True)) as client:
        client.update_evaluation("e", "completed", exit_code=0, output=data)
        assert client.get_output("e") == data


def test_a_stream_whose_content_was_replaced_by_less_is_no_shorter_content(api: Any) -> None:
    with StorageClient(api.url, "both-key-0001", transport=Breaking(streams=True)) as client:
        client.update_evaluation("e", "completed", exit_code=0, output="a" * 5_000_000)
        stream = client.stream_content("e")
        next(stream)
        client.update_evaluation("e", "completed", exit_code=0, output="b", occurred_at="2000-01-01T00:00:00Z")
        with pytest.raises(VersionChanged, match="read it again"):
            list(stream)


def test_a_proxy_that_packs_changes_no_content(api: Any) -> None:
    with StorageClient(api.url, "both-key-0001", transport=Packing()) as client:
        client.update_evaluation("e", "completed", exit_code=0, output="a" * 100_000)
        assert client.get_output("e") == b"a" * 100_000


def test_what_is_uploaded_piece_by_piece_can_be_named_in_events(start_api: Callable[..., Any], tmp_path: Path) -> None:
    api = start_api(EVALSTORE_OBJECT_STORE_URL=(tmp_path / "objects").as_uri())
    path, data = tmp_path / "output", bytes(range(256)) * 40_000
    path.write_bytes(b"before" + data)
    line = Breaking(answers=True)
    with StorageClient(api.url, "both-key-0001", transport=line) as client, path.open("rb") as file:
        file.seek(6)
        uploaded, small = client.put_content(file), client.put_content(b"print(1)")
        assert (uploaded["sha256"], uploaded["size"]) == (hashlib.sha256(data).hexdigest(), len(data))
        client.create_evaluation("e", code_ref=small)
        ended = client.update_evaluation("e", "completed", exit_code=0, output_ref=uploaded)
        assert (line.requests, ended.output_size) == (8, len(data))
    with StorageClient(api.url, "read-key-0001") as client, pytest.raises(ServiceError, match="403"):
        client.put_content(b"data")


def test_lists_and_batches_go_on_over_several_requests(client: StorageClient) -> None:
    events = ({"type": "evaluation:queued", "eval_id": f"e{number:05}", "code": "c"} for number in range(6_000))
    assert {one.outcome for one in client.send_events(events)} == {"applied"}
    assert [one.eval_id for one in client.list_evaluations(order="oldest")] == [f"e{number:05}" for number in range(6_000)]
    assert len(list(client.list_evaluations(status=["queued", "running"], page_size=1000))) == 6_000
    assert list(client.list_evaluations(status="failed")) == []
    bad = list(client.send_events([{"type": "evaluation:completed", "eval_id": "x"}]))
    assert (bad[0].outcome, [fault.field for fault in bad[0].faults]) == ("invalid", ["exit_code"])


def test_the_client_waits_while_the_database_is_away(start_api: Callable[..., Any], postgres_server: Postgres) -> None:
    upgrade(postgres_server.url())
    api = start_api(EVALSTORE_DATABASE_URL=postgres_server.url())
    with StorageClient(api.url, "both-key-0001", retry_s=40) as client:
        postgres_server.kill()
        back = threading.Timer(1.0, postgres_server.start)
        back.start()
        assert client.create_evaluation("e", "c").version == 1
        back.join()
    api.stop()
    with StorageClient(api.url, "both-key-0001", retry_s=0.2) as client, pytest.raises(ServiceOutage) as gone:
        client.get_evaluation("e")
    assert isinstance(gone.value, Outage)


def test_the_client_needs_nothing_of_the_service() -> None:
    program = "import sys, evalstore.client; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {
        "fastapi",
        "starlette",
        "uvicorn",
        "sqlalchemy",
        "psycopg",
        "redis",
        "dramatiq",
        "evalstore.storage",
        "tasks",
    }


@pytest.mark.parametrize(
    ("url", "key", "what"),
    [
        ("storage:8086", "k", "http://"),
        ("", "k", "http://"),
        ("ftp://x", "k", "http://"),
        ("http://x", "\xe9", "key"),
        ("http://x", "", "key"),
    ],
)
def test_an_address_or_a_key_that_can_never_work_is_refused_at_once(url: str, key: str, what: str) -> None:
    with pytest.raises(ValueError, match=f"expected .*{what}"):
        StorageClient(url, key)
