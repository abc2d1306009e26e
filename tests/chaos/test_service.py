"""The HTTP service as several processes, which die in turn or at random under load."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from evalstore.client import StorageClient
from evalstore.local.servers import Postgres, Valkey
from models.errors import RedisOutage
from tests.chaos.balancer import Balancer
from tests.chaos.world import World, evaluation
from tests.integration.conftest import BOTH, Api

CLIENTS = 200


@pytest.fixture
def services(tmp_path: Path, database_url: str) -> Iterator[Callable[[str], list[Api]]]:
    """`services(redis_url)`: two processes of the service, on one database."""
    started: list[Api] = []

    def start(redis_url: str) -> list[Api]:
        servers = {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url}
        for number in range(2):
            started.append(Api(tmp_path / f"api-{number}", servers))
            started[-1].start()
        return started

    yield start
    for api in started:
        api.stop()


@pytest.mark.parametrize("addresses", ["one address", "two addresses"])
def test_no_request_fails_while_the_processes_of_the_service_are_replaced_in_turn(
    addresses: str, services: Callable[[str], list[Api]], redis_url: str
) -> None:
    apis = services(redis_url)
    done = threading.Event()
    with Balancer([api.port for api in apis]) as balancer, ThreadPoolExecutor(12) as threads:
        urls = [f"http://127.0.0.1:{balancer.port}"] if addresses == "one address" else [api.url for api in apis]
        with StorageClient(urls, BOTH, timeout_s=10) as storage:
            working = [threads.submit(_work, storage, done) for _ in range(8)]
            try:
                for number in range(4):
                    time.sleep(1)
                    api = apis[number % 2]
                    if number < 2:
                        api.terminate()
                        api.wait()
                    else:
                        api.kill()
                    api.start()
            finally:
                done.set()
            finished = [eval_id for each in working for eval_id in each.result(timeout=60)]
            assert len(finished) > 8
            for eval_id in finished:
                assert storage.get_evaluation(eval_id).version == 3


def _work(storage: StorageClient, done: threading.Event) -> list[str]:
    """Call each method that may be repeated, until `done`. Return the evaluations that are finished."""
    finished = []
    while not done.is_set():
        eval_id = f"e-{uuid4().hex}"
        storage.create_evaluation(eval_id, code="c", run_id="r")
        storage.update_evaluation(eval_id, "running")
        (outcome,) = storage.send_events([{"type": "evaluation:completed", "eval_id": eval_id, "exit_code": 0, "output": "x"}])
        assert outcome.outcome in {"applied", "duplicate"}
        assert storage.wait(eval_id, timeout_s=60).exit_code == 0
        assert storage.get_output(eval_id) == b"x"
        next(iter(storage.list_evaluations(page_size=1)))
        finished.append(eval_id)
    return finished


def test_nobody_misses_a_change_while_workers_service_and_redis_die_at_random(
    own_world: World, valkey_server: Valkey, services: Callable[[str], list[Api]]
) -> None:
    seed = random.randrange(1_000_000)  # noqa: S311 - no secret
    chance = random.Random(seed)  # noqa: S311 - no secret
    world, apis = own_world, services(valkey_server.url())
    workers = world.workers(n=2)
    workers.start()
    lives = [evaluation(f"e-{number}", run_id=f"r-{number % 10}") for number in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as threads, StorageClient([api.url for api in apis], BOTH, retry_s=120) as storage:
        clients: list[Future[Any]] = [
            threads.submit(_wait if number % 2 else _follow, apis, life) for number, life in enumerate(lives)
        ]
        _until_connected(apis)
        sender = threading.Thread(target=_send, args=(world, lives, chance))
        sender.start()
        for _ in range(8):
            time.sleep(chance.uniform(0.2, 1.5))
            match chance.choice(("worker", "service", "redis")):
                case "worker":
                    workers.kill()
                    workers.start(wait=False)
                case "service":
                    api = chance.choice(apis)
                    api.kill()
                    api.start()
                case "redis":
                    valkey_server.kill()
                    valkey_server.start()
        sender.join()
        world.wait_settled(tend=workers)
        missed = [result for client in clients if (result := client.result(timeout=120))]
        assert not missed, f"seed {seed}: {missed}"
        assert storage.get_evaluation("e-0").status == "completed"
    world.audit()


def test_followers_miss_nothing_while_postgresql_is_away(own_postgres: Postgres, redis_url: str, tmp_path: Path) -> None:
    api = Api(tmp_path / "api", {"EVALSTORE_DATABASE_URL": own_postgres.url(), "EVALSTORE_REDIS_URL": redis_url})
    api.start()
    try:
        with ThreadPoolExecutor(2) as threads, StorageClient(api.url, BOTH, retry_s=60) as storage:
            storage.create_evaluation("e", code="c")
            stream = storage.stream(eval_id="e")
            waiting = threads.submit(storage.wait, "e", timeout_s=60)
            first = threads.submit(next, stream)
            _until_connected([api], 2)
            own_postgres.kill()
            time.sleep(1)
            own_postgres.start()
            storage.update_evaluation("e", "completed", exit_code=0)
            assert waiting.result(timeout=60).status == "completed"
            assert first.result(timeout=60).version == 2
            stream.close()  # type: ignore[attr-defined]
    finally:
        api.stop()


def _until_connected(apis: list[Api], clients: int = CLIENTS) -> None:
    for _ in range(200):
        texts = [api.nobody.get("/metrics").text.splitlines() for api in apis]
        followers = [line for text in texts for line in text if line.startswith("evalstore_http_followers{")]
        if sum(float(line.rpartition(" ")[2]) for line in followers) == clients:
            return
        time.sleep(0.1)
    raise AssertionError("not all clients are connected")


def _send(world: World, lives: list[list[dict[str, Any]]], chance: random.Random) -> None:
    """Send all events, those of an evaluation apart, within about ten seconds."""
    for phase in range(3):
        for start in range(0, len(lives), 10):
            events = [life[phase] for life in lives[start : start + 10]]
            while True:
                try:
                    world.send(events)
                    break
                except RedisOutage:
                    time.sleep(0.1)
            time.sleep(chance.uniform(0, 0.3))


def _client(apis: list[Api], number: int) -> StorageClient:
    urls = [api.url for api in apis]
    return StorageClient([urls[number % 2], urls[1 - number % 2]], BOTH, retry_s=120)


def _wait(apis: list[Api], life: list[dict[str, Any]]) -> str | None:
    """Return what was missed."""
    eval_id = life[0]["eval_id"]
    with _client(apis, hash(eval_id)) as storage:
        found = storage.wait(eval_id, timeout_s=180)
        return None if found.status == "completed" else f"{eval_id} is {found.status}"


def _follow(apis: list[Api], life: list[dict[str, Any]]) -> str | None:
    """Follow an evaluation until all its events were told of. Return what was missed."""
    eval_id, untold = life[0]["eval_id"], {event["event_id"] for event in life}
    versions: list[int] = []
    with _client(apis, hash(eval_id)) as storage:
        for change in storage.stream(eval_id=eval_id):
            if change.type == "snapshot":
                return f"{eval_id}: a snapshot after {versions}"
            versions.append(change.version or 0)
            untold -= set(change.model_extra["event_ids"] if change.model_extra else ())
            if change.status == "completed" and not untold:
                return None
            if change.status == "completed" and change.version == 3:
                return f"{eval_id}: {untold} untold, versions {versions}"
    return f"{eval_id}: the stream ended"
