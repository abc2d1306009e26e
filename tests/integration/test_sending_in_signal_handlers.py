"""A signal handler sends while its process is sending: nothing waits for ever, and what was sent is there once."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from evalstore.local.servers import Valkey, free_port
from tasks.spool import Spool, SpoolRecord

ROOT = Path(__file__).parents[2]
LARGE = 200_000

SENDER = """
import faulthandler, json, os, random, signal, sys, time
from uuid import uuid4
from models.errors import Outage
from models.settings import settings
from tasks import store_evaluation
faulthandler.dump_traceback_later(50, exit=True)
size, every = int(sys.argv[1]), int(sys.argv[2])
sent, refused = [], []

def send(eval_id):
    event_id = str(uuid4())
    try:
        code = event_id + "x" * size
        store_evaluation.send({"type": "evaluation:queued", "eval_id": eval_id, "event_id": event_id, "code": code})
    except Outage as error:
        refused.append((eval_id, type(error).__name__, str(error)))
    else:
        sent.append(event_id)

signal.signal(signal.SIGALRM, lambda *_: send("handler"))
"""
END = """
print(json.dumps([sent, refused]), flush=True)
sys.stdin.read()
"""
AT_EACH_POINT = """
PLACES = "/tasks/", "/models/", "/objects/", "/redis/", "/botocore/", "/urllib3/", "/queue.py", "/threading.py"

class Points:
    def __init__(self, at):
        self.at, self.seen = at, 0
    def __call__(self, frame, event, _):
        name = frame.f_code.co_filename
        if not any(part in name for part in PLACES):
            return None
        if event == "line":
            self.seen += 1
            if self.seen == self.at:
                signal.raise_signal(signal.SIGALRM)
        return self

def send_interrupted(at):
    points = Points(at)
    sys.settrace(points)
    try:
        send("main")
    finally:
        sys.settrace(None)
    return points.seen >= at

send("main")
at = 1
while send_interrupted(at):
    at += every
"""
FORGETTING = """
from tasks.broker import broker
of_settings = send
def send(eval_id):
    if eval_id == "main":
        for known in (settings, broker):
            known.cache_clear()
    of_settings(eval_id)
"""
STORM = """
until = time.monotonic() + 3
while time.monotonic() < until:
    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00001, 0.004))
    send("main")
    signal.setitimer(signal.ITIMER_REAL, 0)
"""
FIRST = """
signal.setitimer(signal.ITIMER_REAL, every / 1000)
send("main")
signal.setitimer(signal.ITIMER_REAL, 0)
"""

# At some of these points, with the settings, broker and store loaded.
KNOWN = [("", 1), (FORGETTING, 23)]


@contextmanager
def sender(code: str, size: int = 10, every: int = 1, **settings: object) -> Iterator[tuple[list[str], list[list[str]]]]:
    """What a process has sent, and what it was refused; the process lives on in the block."""
    settings = {"send_timeout_s": 10} | settings  # traced lines on a busy machine take their time
    env = os.environ | {f"EVALSTORE_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-W", "ignore", "-c", SENDER + code + END, str(size), str(every)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout
        assert process.stdin
        yield tuple(json.loads(process.stdout.readline()))
        process.stdin.close()
        assert process.wait(30) == 0


def in_redis(url: str) -> list[str]:
    with redis.Redis.from_url(url) as client:
        bodies: Any = client.hgetall("dramatiq:evaluations.msgs")
        assert sorted(bodies) == sorted(client.lrange("dramatiq:evaluations", 0, -1))
    return [json.loads(body)["message_id"] for body in bodies.values()]


def in_spool(spool: Spool) -> list[str]:
    records = [record for _, line in spool.lines() if (record := SpoolRecord.parse(line))]
    return [json.loads(record.body)["message_id"] for record in records]


def are_there_once(sent: list[str], found: list[str]) -> bool:
    return Counter(sent) == Counter(found)


def are_told_what_to_do(refused: list[list[str]]) -> bool:
    return all(name == "SendRefused" and "send the event again" in text for _, name, text in refused)


@pytest.mark.parametrize(("known", "every"), KNOWN)
def test_a_signal_handler_may_send_at_each_point_of_a_send(known: str, every: int, redis_url: str) -> None:
    with sender(known + AT_EACH_POINT, every=every, redis_url=redis_url) as (sent, refused):
        assert len(sent) > 50
        assert not refused
        assert are_there_once(sent, in_redis(redis_url))


@pytest.mark.parametrize(("known", "every"), KNOWN)
def test_at_each_point_of_keeping_an_event_in_the_spool(known: str, every: int, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=10**9)
    away: dict[str, Any] = {"redis_url": f"redis://127.0.0.1:{free_port()}", "spool_dir": spool.folder, "send_timeout_s": 0.2}
    with sender(known + AT_EACH_POINT, every=every, **away) as (sent, refused):
        assert refused
        assert are_told_what_to_do(refused)
        assert {eval_id for eval_id, *_ in refused} == {"handler"}
        assert are_there_once(sent, in_spool(spool))
        spool.append(["another", '{"message_id": "another"}'])  # The other process is still running.
        assert in_spool(spool)[-1] == "another"


@pytest.mark.parametrize(("known", "every"), KNOWN)
def test_at_each_point_of_an_upload_to_a_folder(known: str, every: int, redis_url: str, tmp_path: Path) -> None:
    store = f"file://{tmp_path}/objects"
    with sender(known + AT_EACH_POINT, LARGE, every, redis_url=redis_url, object_store_url=store) as (sent, refused):
        assert len(sent) > 50
        assert not refused  # Small enough to travel inline.
        assert are_there_once(sent, in_redis(redis_url))


def test_a_signal_handler_may_send_at_many_points_of_an_upload_to_s3(redis_url: str, s3_url: str, s3_server: Any) -> None:
    store = {"object_store_url": s3_url, "s3_endpoint_url": s3_server.endpoint}
    with sender(AT_EACH_POINT, LARGE, 41, redis_url=redis_url, **store) as (sent, refused):
        assert len(sent) > 50
        assert not refused
        assert are_there_once(sent, in_redis(redis_url))


def test_content_that_cannot_go_inline_is_refused_during_another_upload(redis_url: str, tmp_path: Path) -> None:
    store = f"file://{tmp_path}/objects"
    with sender(AT_EACH_POINT, 2 * 1024 * 1024, 7, redis_url=redis_url, object_store_url=store) as (sent, refused):
        assert refused
        assert are_told_what_to_do(refused)
        assert are_there_once(sent, in_redis(redis_url))


@pytest.mark.parametrize("after_ms", [1, 5, 20, 40, 60, 80, 120])
def test_while_the_first_send_loads_its_modules(after_ms: int, redis_url: str) -> None:
    with sender(FIRST, every=after_ms, redis_url=redis_url) as (sent, refused):
        assert are_told_what_to_do(refused)
        assert are_there_once(sent, in_redis(redis_url))


def test_many_signals_while_redis_goes_and_comes_back(
    valkey_server: Valkey, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=10**9)
    given: dict[str, Any] = {"redis_url": valkey_server.url(), "spool_dir": spool.folder, "send_timeout_s": 0.2}
    valkey_server.stop()
    with sender(STORM, **given) as (sent, refused):
        assert are_told_what_to_do(refused)
        assert are_there_once(sent, in_spool(spool))
        valkey_server.start()
        eventually(lambda: not spool.holds(), within_s=30)
        assert are_there_once(sent, in_redis(valkey_server.url()))
