"""The bridge sends what an old platform publishes, each message once, and says what it may have missed."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import redis

from evalstore.local import processes
from evalstore.local.servers import Valkey, free_port
from tests.chaos.world import Workers
from tests.polling import looks

ROOT = Path(__file__).parents[2]
QUEUE, BODIES = "dramatiq:evaluations", "dramatiq:evaluations.msgs"
FILE = """
url_env = "OLD_REDIS_URL"
channels = ["evaluation:*", "jobs:*"]

[types]
"jobs:done" = "evaluation:completed"

[fields]
eval_id = "id"
exit_code = "code_of_exit"
"""


class Copy:
    """`evalstore bridge` as a process of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        folder.mkdir(parents=True)
        (folder / "bridge.toml").write_text(FILE)
        self.folder, self.log, self.port = folder, folder / "bridge.log", free_port()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("EVALSTORE_")},
            "PYTHONPATH": str(ROOT),
            "EVALSTORE_BRIDGE_FILE": str(folder / "bridge.toml"),
            "EVALSTORE_BRIDGE_METRICS_PORT": str(self.port),
            "EVALSTORE_METRICS_HOST": "127.0.0.1",
            "EVALSTORE_RUNTIME_DIR": str(folder / "run"),
            **environment,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            command = [sys.executable, "-c", "from evalstore.cli.entry import main; main()", "bridge"]
            self._process = processes.start(command, mark=self.folder, output=log, env=self.environment, cwd=self.folder)
        self.wait(lambda: self.said("bridge_listening") or self.said("listens to"))

    def said(self, text: str) -> bool:
        return text in self.log.read_text()

    def wait(self, holds: Callable[[], Any], within_s: float = 30) -> None:
        for _ in looks(within_s):
            if holds():
                return
        pytest.fail(f"it does not come about:\n{self.log.read_text()[-3000:]}")

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=10)

    def metric(self, series: str) -> float:
        lines = self.get("/metrics").text.splitlines()
        return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(series)))

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(timeout=30)

    def kill(self) -> None:
        if self._process is not None:
            processes.kill_now(self._process)
            self._process.wait()


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Valkey]:
    """The Redis of the old platform."""
    with Valkey(tmp_path / "old") as server:
        yield server


@pytest.fixture
def bridge(tmp_path: Path, old: Valkey, redis_url: str) -> Iterator[Callable[..., Copy]]:
    made: list[Copy] = []

    def start(**environment: str) -> Copy:
        servers = {"OLD_REDIS_URL": old.url(), "EVALSTORE_REDIS_URL": redis_url}
        made.append(Copy(tmp_path / f"bridge-{len(made)}", servers | environment))
        made[-1].start()
        return made[-1]

    yield start
    for copy in made:
        copy.kill()


def queued(redis_url: str) -> list[Any]:
    """The arguments of all messages in the queue, in order."""
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        ids: list[str] = client.lrange(QUEUE, 0, -1)
        bodies: dict[str, str] = client.hgetall(BODIES)
    return [json.loads(bodies[redis_id])["args"][0] for redis_id in ids]


def publish(old: Valkey, channel: str, document: Any) -> None:
    payload = document if isinstance(document, bytes) else json.dumps(document)
    with redis.Redis.from_url(old.url()) as client:
        client.publish(channel, payload)


def test_what_is_published_is_queued_in_order_with_mapped_fields(
    bridge: Callable[..., Copy], old: Valkey, redis_url: str
) -> None:
    copy = bridge()

    publish(old, "evaluation:queued", {"id": "e", "code": "print(1)", "team": "blue"})
    publish(old, "jobs:done", {"id": "e", "code_of_exit": 0, "output": "1\n"})
    publish(old, "elsewhere", {"id": "e"})
    copy.wait(lambda: len(queued(redis_url)) == 2)

    first, second = queued(redis_url)
    assert (first["type"], first["eval_id"], first["metadata"]) == ("evaluation:queued", "e", {"team": "blue"})
    assert (second["type"], second["exit_code"], second["output"]) == ("evaluation:completed", 0, "1\n")
    copy.wait(lambda: copy.metric('evalstore_bridge_messages_total{outcome="sent"}') == 2)
    assert copy.get("/health/live").status_code == 200
    assert copy.get("/health/ready").status_code == 200
    assert copy.stop() == 0


def test_two_copies_store_each_message_once(
    bridge: Callable[..., Copy], old: Valkey, redis_url: str, database_url: str, tmp_path: Path
) -> None:
    """Also messages without a time: the copies hear them at different times."""
    copies = [bridge(), bridge()]
    for number in range(100):
        publish(old, "evaluation:started", {"id": f"e{number % 10}", "n": number})
    copies[0].wait(lambda: all(copy.metric('evalstore_bridge_messages_total{outcome="sent"}') == 100 for copy in copies))
    environment = {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url}
    workers = Workers(tmp_path, environment, "worker.tasks", 1, 2)
    workers.start()
    try:
        copies[0].wait(lambda: not queued(redis_url))
    finally:
        workers.stop()
    with psycopg.connect(database_url) as conn:
        assert conn.execute("SELECT count(*), count(DISTINCT event_id) FROM evaluation_events").fetchone() == (100, 100)
        assert conn.execute("SELECT count(*) FROM dead_letters").fetchone() == (0,)


def test_a_bad_message_is_counted_and_becomes_a_dead_letter_with_its_field(
    bridge: Callable[..., Copy], old: Valkey, redis_url: str, database_url: str, tmp_path: Path
) -> None:
    copy = bridge()
    bad: list[Any] = [
        b"{",
        b"\xff\x00",
        [1],
        {"id": "e", "code_of_exit": "0"},
        {"code_of_exit": 0},
        {"id": "e", "code_of_exit": 1},
    ]
    for document in bad:
        publish(old, "jobs:done", document)
    copy.wait(lambda: copy.metric('evalstore_bridge_messages_total{outcome="bad"}') == 5)
    assert copy.said("exit_code")
    workers = Workers(
        tmp_path, {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url}, "worker.tasks", 1, 2
    )
    workers.start()
    try:
        with psycopg.connect(database_url, autocommit=True) as conn:
            copy.wait(lambda: conn.execute("SELECT count(*) FROM dead_letters").fetchone() == (5,))
            assert conn.execute("SELECT DISTINCT error_class FROM dead_letters").fetchall() == [("InvalidEvent",)]
            assert conn.execute("SELECT count(*) FROM evaluation_events").fetchone() == (1,)
            messages = b"".join(row[0] for row in conn.execute("SELECT message FROM dead_letters"))
    finally:
        workers.stop()
    assert b'"payload":"{"' in messages
    assert b'"payload_hex":"ff00"' in messages


def test_a_lost_connection_is_made_again_and_the_gap_is_told(bridge: Callable[..., Copy], old: Valkey, redis_url: str) -> None:
    copy = bridge()
    old.kill()
    copy.wait(lambda: copy.metric("evalstore_bridge_connected") == 0)
    assert copy.get("/health/ready").status_code == 503
    old.start()
    copy.wait(lambda: copy.metric("evalstore_bridge_connected") == 1)
    publish(old, "evaluation:started", {"id": "after"})
    copy.wait(lambda: [event["eval_id"] for event in queued(redis_url)] == ["after"])
    assert copy.metric("evalstore_bridge_gaps_total") == 1
    assert copy.metric("evalstore_bridge_disconnected_seconds_total") > 0
    assert copy.said("published meanwhile are lost")


def test_a_frozen_source_is_noticed(bridge: Callable[..., Copy], old: Valkey) -> None:
    copy = bridge()
    old.freeze()
    try:
        copy.wait(lambda: copy.metric("evalstore_bridge_connected") == 0, within_s=40)
    finally:
        old.thaw()
    copy.wait(lambda: copy.metric("evalstore_bridge_gaps_total") == 1)


@pytest.mark.parametrize("with_spool", [True, False])
def test_while_the_queue_is_away_nothing_that_was_heard_is_lost(
    bridge: Callable[..., Copy], old: Valkey, tmp_path: Path, with_spool: bool
) -> None:
    with Valkey(tmp_path / "queue") as queue:
        spool = {"EVALSTORE_SPOOL_DIR": str(tmp_path / "spool")} if with_spool else {}
        copy = bridge(EVALSTORE_REDIS_URL=queue.url(), **spool)
        publish(old, "evaluation:started", {"id": "before"})
        copy.wait(lambda: len(queued(queue.url())) == 1)
        queue.kill()
        for number in range(20):
            publish(old, "evaluation:started", {"id": f"e{number}"})
        if not with_spool:
            copy.wait(lambda: copy.said("holding"))
        queue.start()
        expected = ["before", *(f"e{number}" for number in range(20))]
        copy.wait(lambda: [event["eval_id"] for event in queued(queue.url())] == expected, within_s=60)
        assert copy.stop(signal.SIGTERM) == 0


def test_when_it_stops_what_was_heard_is_sent(bridge: Callable[..., Copy], old: Valkey, redis_url: str) -> None:
    copy = bridge()
    with redis.Redis.from_url(old.url()) as client:
        heard = 0
        stopped = threading.Event()

        def publish_on() -> None:
            nonlocal heard
            number = 0
            while not stopped.is_set():
                heard += client.publish("evaluation:started", json.dumps({"id": f"e{number}"}))
                number += 1

        thread = threading.Thread(target=publish_on)
        thread.start()
        copy.wait(lambda: heard > 5000, within_s=30)
        status = copy.stop()
        stopped.set()
        thread.join()
    assert status == 0
    # The last ones may have reached the socket of a process that no longer reads.
    assert heard - 2000 <= len(queued(redis_url)) <= heard
    assert len(queued(redis_url)) > 100


def test_wrong_settings_end_the_start_with_status_2(tmp_path: Path, redis_url: str) -> None:
    path = tmp_path / "bridge.toml"
    path.write_text("chanels = ['x']\n[fields]\nevalid = 'id'\n")
    environment = {**os.environ, "EVALSTORE_REDIS_URL": redis_url, "EVALSTORE_BRIDGE_FILE": str(path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", "from evalstore.cli.entry import main; main()", "bridge"],
        env=environment, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "chanels: there is no such key; did you mean channels?" in done.stderr
    assert "there is no field evalid" in done.stderr
