"""Every address may be one of IPv6: what we listen on, what we connect to, and what we print."""

import json
import os
import select
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import ClassVar

import httpx
import pytest

from evalstore.client.http import StorageClient
from evalstore.local.servers import Postgres, Valkey
from evalstore.objects import object_store
from evalstore.objects.object_store import open_store, put
from evalstore.storage.migrations import upgrade
from models.addresses import authority, check_host, url_of
from models.settings import Settings
from tests.integration.commands import python
from tests.integration.conftest import BOTH, READ, Api
from tests.integration.watched import SCHEDULER, WORKER, Watched
from tests.seaweedfs import SeaweedFS

Eventually = Callable[..., None]


@pytest.fixture
def servers(tmp_path: Path, initialised: Path) -> Iterator[dict[str, str]]:
    """The addresses of a PostgreSQL and a Valkey that listen on ::1 alone."""
    subprocess.run(["cp", "-a", initialised, tmp_path / "postgres"], check=True)
    postgres = Postgres(tmp_path / "postgres", settings={"listen_addresses": "127.0.0.1,::1", "fsync": "off"})
    with postgres, Valkey(tmp_path / "valkey", settings={"bind": "127.0.0.1 ::1"}) as valkey:
        found = {
            "EVALSTORE_DATABASE_URL": postgres.url().replace("127.0.0.1", "[::1]"),
            "EVALSTORE_REDIS_URL": valkey.url().replace("127.0.0.1", "[::1]"),
        }
        upgrade(found["EVALSTORE_DATABASE_URL"])
        yield found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Watched]]:
    with ExitStack() as running:

        def start_one(command: tuple[str, ...], role: str, **environment: str) -> Watched:
            given = {"EVALSTORE_RUNTIME_DIR": str(tmp_path / "run"), **environment}
            one = Watched(command, given, tmp_path / f"{role}.log", f"EVALSTORE_{role}_PORT")
            running.callback(one.stop)
            return one.start()

        yield start_one


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("host", ["::1", "::", "[::1]", "localhost"])
def test_worker_and_scheduler_answer_there_and_store_by_servers_of_ipv6(
    host: str, start: Callable[..., Watched], servers: dict[str, str], eventually: Eventually
) -> None:
    environment = {**servers, "EVALSTORE_METRICS_HOST": host}
    worker = start(WORKER, "METRICS", **environment)
    asked = ["[::1]"] if host != "localhost" else ["127.0.0.1"]
    asked += ["127.0.0.1"] if host == "::" else []
    for name in asked:
        for path in ("metrics", "health/live", "health/ready"):
            eventually(lambda url=f"http://{name}:{worker.port}/{path}": answers(url), within_s=60, what=path)
    if host == "::1":
        scheduler = start(SCHEDULER, "SCHEDULER_METRICS", **environment)
        eventually(lambda: answers(f"http://[::1]:{scheduler.port}/metrics"), within_s=90, what="the scheduler's metrics")
        event = {"type": "evaluation:queued", "eval_id": "e", "code": "c"}
        send = f"from tasks import store_evaluation; store_evaluation.send({event!r})"
        subprocess.run([sys.executable, "-c", send], env={**os.environ, **servers}, check=True)
        command = [*python(), "-m", "evalstore.cli.app", "get", "e", "-o", "json"]

        def shown() -> subprocess.CompletedProcess[bytes]:
            return subprocess.run(command, env={**os.environ, **servers}, capture_output=True, check=False)

        eventually(lambda: shown().returncode == 0, within_s=30, what="the record")
        assert json.loads(shown().stdout)["eval_id"] == "e"
        ready = [*python(), "-m", "evalstore.cli.app", "health", "--ready"]
        assert subprocess.run(ready, env={**os.environ, **servers}, capture_output=True, check=False).returncode == 0


def test_what_keeps_metrics_from_being_served_is_logged_as_it_is(
    start: Callable[..., Watched], database_url: str, redis_url: str, eventually: Eventually
) -> None:
    addresses = {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url}
    worker = start(WORKER, "METRICS", EVALSTORE_METRICS_HOST="2001:db8::1", EVALSTORE_LOG_FORMAT="json", **addresses)

    def lines() -> list[dict[str, str]]:
        return [json.loads(line) for line in worker.log.read_text().splitlines() if "metrics_not_served" in line]

    eventually(lines, within_s=60, what="the warning")
    (line,) = lines()
    assert line["address"] == f"[2001:db8::1]:{worker.port}"
    assert line["error"] == "Cannot assign requested address"


@pytest.mark.parametrize("host", ["::1", "::", "[::1]"])
def test_the_service_answers_there(host: str, tmp_path: Path, database_url: str, redis_url: str) -> None:
    environment = {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url, "EVALSTORE_API_HOST": host}
    api = Api(tmp_path / "api", environment)
    api.url = f"http://[::1]:{api.port}"
    try:
        api.start()
        with StorageClient(api.url, BOTH) as client:
            assert client.create_evaluation("e", code="c").status == "queued"
        assert answers(f"http://127.0.0.1:{api.port}/health/live") is (host == "::")
    finally:
        api.stop()


def test_up_serves_and_prints_the_addresses_that_were_asked_for(tmp_path: Path, eventually: Eventually) -> None:
    environment = {**os.environ, "EVALSTORE_API_HOST": "::1", "EVALSTORE_METRICS_HOST": "::1"}
    for name in ("EVALSTORE_METRICS_PORT", "EVALSTORE_SCHEDULER_METRICS_PORT", "EVALSTORE_RUNTIME_DIR"):
        environment.pop(name, None)
    log = tmp_path / "log"
    command = [sys.executable, "-m", "evalstore.cli.app", "up", "--processes", "1", "--dir", str(tmp_path / "data")]
    with log.open("wb") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as up:
        try:
            eventually(lambda: "Ctrl-C stops" in log.read_text() or up.poll() is not None, within_s=90, what="the start")
            urls = [word for word in log.read_text().split() if word.startswith("http://[::1]:")]
            metrics, service = (
                next(url for url in urls if url.endswith("/metrics")),
                next(url for url in urls if url.count("/") == 2),
            )
            assert answers(metrics), log.read_text()
            assert answers(f"{service}/health/ready"), log.read_text()
        finally:
            up.terminate()
            up.wait(timeout=60)
    assert READ not in log.read_text()


class _ToPort(socketserver.BaseRequestHandler):
    """Passes a connection on to 127.0.0.1, byte for byte."""

    port: ClassVar[int]

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as other:
            ends = {self.request: other, other: self.request}
            while all(self._pass_on(one, ends[one]) for one in select.select(list(ends), [], [], 30)[0]):
                pass

    @staticmethod
    def _pass_on(one: socket.socket, other: socket.socket) -> bool:
        data = one.recv(65_536)
        other.sendall(data)
        return bool(data)


class _Relay(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6
    daemon_threads = True


def test_an_object_store_may_have_such_an_address(s3_server: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    with _Relay(("::1", 0), type("Handler", (_ToPort,), {"port": s3_server.port})) as relay:
        threading.Thread(target=relay.serve_forever, args=(0.02,), daemon=True).start()
        endpoint = f"http://[::1]:{relay.server_address[1]}"
        read = Settings.from_environment({"EVALSTORE_S3_ENDPOINT_URL": endpoint})
        with closing(open_store(f"s3://{s3_server.bucket}/ipv6", read)) as store:
            reference = put(store, b"content").reference
            assert b"".join(object_store.read(store, reference)) == b"content"
        relay.shutdown()


def test_addresses_are_read_and_printed_with_brackets_where_urls_have_them() -> None:
    assert [authority(host, 80) for host in ("h", "127.0.0.1", "::1")] == ["h:80", "127.0.0.1:80", "[::1]:80"]
    assert [url_of(host, 80) for host in ("::", "0.0.0.0", "h")] == ["http://[::1]:80", "http://127.0.0.1:80", "http://h:80"]  # noqa: S104
    assert [check_host(host) for host in ("::1", "[::1]", "fe80::1%eth0", "db-1.internal", "0.0.0.0")] == [  # noqa: S104
        *("::1", "::1", "fe80::1%eth0", "db-1.internal", "0.0.0.0")  # noqa: S104
    ]
    for wrong in ("h:80", "[::1]:80", "127.0.0.1:80", "[h]", "http://h", "a b", "[127.0.0.1]"):
        with pytest.raises(ValueError, match="without a port"):
            check_host(wrong)
