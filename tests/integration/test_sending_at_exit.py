"""A process sends for the first time while it ends: its event is sent, kept in the spool, or refused with a typed error."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis

from evalstore.local.servers import free_port
from evalstore.objects import object_store
from models.content import Reference
from models.settings import Settings
from tasks.spool import Spool
from tests.integration.otlp import Collector, a_collector

collector = pytest.fixture(a_collector)

ROOT = Path(__file__).parents[2]
SMALL, LARGE, IN_PARTS = 1_000, 200_000, 17_000_000

SENDER = """
import asyncio, atexit, base64, multiprocessing.util, os, signal, sys, threading
from models.errors import Outage
from tasks import store_evaluation

def send():
    content = base64.b64encode(random).decode()
    event = {"type": "evaluation:failed", "eval_id": "e", "output_b64": content, "error_b64": content[:-4]}
    try:
        store_evaluation.send(event)
    except Outage as error:
        print("refused", type(error).__name__, error, flush=True)
    else:
        print("sent", flush=True)

random = os.urandom(int(sys.argv[1]))
"""
PLACES = {
    "an exit function": "atexit.register(send)",
    "a thread that outlives the main one": """
def late():
    threading.main_thread().join()
    send()
threading.Thread(target=late).start()
""",
    "a daemon thread": """
ends = threading.Event()
def late():
    ends.wait()
    send()
thread = threading.Thread(target=late, daemon=True)
thread.start()
atexit.register(thread.join)
atexit.register(ends.set)
""",
    "a forked child": """
if child := os.fork():
    os.waitpid(child, 0)
else:
    atexit.register(send)
""",
    "a child of multiprocessing": """
def late():
    multiprocessing.util.Finalize(None, send, exitpriority=10)
process = multiprocessing.get_context("fork").Process(target=late)
process.start()
process.join()
""",
    "a cancelled task of asyncio": """
async def late():
    try:
        await asyncio.Event().wait()
    finally:
        send()
async def main():
    tasks.append(asyncio.create_task(late()))
    await asyncio.sleep(0)
tasks = []
asyncio.run(main())
""",
    "a signal handler during exit": """
signal.signal(signal.SIGTERM, lambda *_: send())
atexit.register(os.kill, os.getpid(), signal.SIGTERM)
""",
}
FINALIZER = """
class Last:
    def __del__(self, send=send):
        send()
last = Last()
"""


def ends(code: str, size: int, **settings: object) -> str:
    """What a sender prints that does this and ends; it has nothing to complain of."""
    env = os.environ | {f"EVALSTORE_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-W", "ignore", "-c", SENDER + code, str(size)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def queued(redis_url: str) -> list[dict[str, Any]]:
    with redis.Redis.from_url(redis_url) as client:
        bodies: Any = client.hvals("dramatiq:evaluations.msgs")
        assert client.llen("dramatiq:evaluations") == len(bodies)
    return [json.loads(body)["args"][0] for body in bodies]


def is_stored(event: dict[str, Any], size: int, store: object_store.Store) -> bool:
    output, error = (Reference(**event[f"{name}_ref"]) for name in ("output", "error"))
    return (
        object_store.verify(store, output) is not None and object_store.verify(store, error) is not None and output.size == size
    )


@pytest.mark.parametrize("place", PLACES)
def test_the_first_event_is_sent_from(place: str, redis_url: str) -> None:
    assert ends(PLACES[place], SMALL, redis_url=redis_url) == "sent\n"
    assert len(queued(redis_url)) == 1


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", [LARGE, IN_PARTS])
def test_large_content_goes_to_a_folder_from(place: str, size: int, redis_url: str, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/objects"
    assert ends(PLACES[place], size, redis_url=redis_url, object_store_url=url) == "sent\n"
    [event] = queued(redis_url)
    assert is_stored(event, size, object_store.open_store(url, Settings()))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", [LARGE, IN_PARTS])
def test_large_content_goes_to_s3_from(place: str, size: int, redis_url: str, s3_url: str, s3_server: Any) -> None:
    given = {"object_store_url": s3_url, "s3_endpoint_url": s3_server.endpoint}
    assert ends(PLACES[place], size, redis_url=redis_url, **given) == "sent\n"
    [event] = queued(redis_url)
    assert is_stored(event, size, object_store.open_store(s3_url, Settings(s3_endpoint_url=s3_server.endpoint)))


@pytest.mark.parametrize("place", PLACES)
def test_with_redis_away_the_spool_keeps_what_is_sent_from(place: str, tmp_path: Path) -> None:
    away = f"redis://127.0.0.1:{free_port()}"
    assert ends(PLACES[place], SMALL, redis_url=away, spool_dir=tmp_path / "spool", send_timeout_s=0.2) == "sent\n"
    assert Spool(tmp_path / "spool", max_bytes=1).status().messages == 1


@pytest.mark.parametrize("place", PLACES)
def test_a_connection_that_was_lost_is_made_anew_in(place: str, redis_url: str) -> None:
    lost = """
send()
store_evaluation.broker.client.close()
"""
    assert ends(lost + PLACES[place], SMALL, redis_url=redis_url) == "sent\nsent\n"
    assert len(queued(redis_url)) == 2


@pytest.mark.parametrize("place", PLACES)
def test_traces_cost_no_event_that_is_sent_from(
    place: str, redis_url: str, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in collector.environment.items():
        monkeypatch.setenv(name, value)
    silent = "import logging; logging.disable()\n"  # The SDK would log what it could not send.
    assert ends(silent + PLACES[place], SMALL, redis_url=redis_url) == "sent\n"
    assert len(queued(redis_url)) == 1


@pytest.mark.parametrize("earlier", ["", "send()\n"])
def test_the_finalizer_of_a_global_sends_or_is_refused(earlier: str, redis_url: str) -> None:
    said = ends(earlier + FINALIZER, SMALL, redis_url=redis_url).splitlines()[-1]
    assert said == "sent" or said.startswith("refused SendRefused")
    assert len(queued(redis_url)) == bool(earlier) + (said == "sent")


@pytest.mark.parametrize("place", ["an exit function", "a thread that outlives the main one"])
def test_where_tasks_itself_is_imported_too_late_the_event_is_sent_or_refused(
    place: str, redis_url: str, tmp_path: Path
) -> None:
    late = SENDER.replace("from tasks import store_evaluation\n", "").replace(
        "    try:\n", "    from tasks import store_evaluation\n    try:\n", 1
    )
    env = os.environ | {"EVALSTORE_REDIS_URL": redis_url, "EVALSTORE_OBJECT_STORE_URL": f"file://{tmp_path}/objects"}
    command = [sys.executable, "-W", "ignore", "-c", late + PLACES[place], str(LARGE)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "sent\n" or done.stdout.startswith("refused SendRefused")
    assert len(queued(redis_url)) == (done.stdout == "sent\n")
