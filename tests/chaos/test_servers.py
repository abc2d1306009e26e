"""Servers that die, fill up, freeze, or say no."""

import threading
import time

import pytest
import redis

from evalstore.local.servers import Postgres, Server, Valkey
from models.errors import RedisOutage
from tests.chaos.conftest import Worlds
from tests.chaos.world import KEYS, World, evaluation, evaluations, wait_until


def send_surely(world: World, number: int) -> None:
    """As a sender that tries again: what did not arrive, and what perhaps did."""
    for _ in range(number // 50):
        events = evaluations(50)
        while True:
            try:
                world.send(events)
            except RedisOutage:
                time.sleep(0.1)
            else:
                break


def test_redis_killed_and_started_again_loses_nothing_that_was_confirmed(own_world: World, valkey_server: Valkey) -> None:
    """Stock: an acknowledgement or a retry that meets the outage is dropped, with the message."""
    world = own_world
    workers = world.workers(n=2, EVALSTORE_BATCH_EVENTS="200")
    workers.start()
    sender = threading.Thread(target=send_surely, args=(world, 6000))
    sender.start()
    while sender.is_alive():
        time.sleep(1)
        valkey_server.kill()
        valkey_server.start()
    world.audit()
    assert workers.stop() < 6


def test_postgres_killed_and_started_again_costs_no_message_its_life(
    worlds: Worlds, redis_url: str, own_postgres: Postgres
) -> None:
    """Stock: each failure counts as a retry; an outage of over an hour or so makes dead letters of them all."""
    world = worlds(own_postgres.url(), redis_url)
    workers = world.workers(n=2, EVALSTORE_BATCH_EVENTS="200")
    workers.start()
    for _ in range(3):
        world.send(evaluations(1500))
        time.sleep(0.3)
        own_postgres.kill()
        world.send(evaluations(100))
        time.sleep(0.5)
        own_postgres.start()
    world.audit()


def test_both_servers_and_the_workers_killed_together_lose_nothing(
    worlds: Worlds, own_postgres: Postgres, valkey_server: Valkey
) -> None:
    """Stock: as above."""
    world = worlds(own_postgres.url(), valkey_server.url())
    workers = world.workers(n=2)
    for _ in range(2):
        workers.start()
        world.send(evaluations(1500))
        wait_until(lambda: world.left().get(KEYS.queue, 0) < 4500, what="work has begun")
        for victim in (own_postgres, valkey_server, workers):
            victim.kill()
        for server in (own_postgres, valkey_server):
            server.start()
    workers.start()
    world.audit()


def test_a_full_redis_refuses_senders_and_drains_to_the_last_message(own_world: World) -> None:
    """Stock: each of its commands begins with a write: a full server lets nobody fetch or acknowledge."""
    world = own_world
    world.send(evaluations(1500))
    world.raw(b"\xff no message")
    world.broker.enqueue(world.message("x", queue_name="jobs", actor_name="unknown"), delay=100)
    event = evaluation("delayed")[0]
    stock = world.message(event, queue_name="evaluations.DQ", options={"eta": 1})
    world.client.hset(KEYS.stock_delayed_bodies, "delayed", stock.encode())
    world.client.rpush(KEYS.stock_delayed, "delayed")
    world.sent[event["event_id"]] = event
    world.client.config_set("maxmemory", 1_000_000)
    with pytest.raises(RedisOutage, match="maxmemory"):
        world.send(evaluations(1))
    with pytest.raises(RedisOutage):
        world.broker.enqueue(world.message({}), delay=5)
    held = world.client.hlen(KEYS.bodies)
    killed, workers = world.workers(EVALSTORE_BATCH_EVENTS="500"), world.workers(n=2)
    killed.start()
    wait_until(lambda: world.client.hlen(KEYS.bodies) < held, what="it drains")
    killed.kill()
    workers.start()
    world.audit(others_dead=["InvalidEvent", "ActorNotFound"])
    assert workers.stop() < 6
    assert world.client.hlen(KEYS.processes) == 0
    world.client.config_set("maxmemory", 0)
    world.send(evaluations(1))


def test_a_redis_that_refuses_writes_is_an_outage(own_world: World) -> None:
    """Stock: NOREPLICAS and the like are bugs to it: it leaves what it worked on unacknowledged until the process ends."""
    world = own_world
    workers = world.workers(n=2, EVALSTORE_BATCH_EVENTS="100")
    workers.start()
    world.send(evaluations(1500))
    for _ in range(3):
        wait_until(lambda: world.applied() > 0, what="work has begun")
        world.client.config_set("min-replicas-to-write", 1)
        with pytest.raises(RedisOutage, match="replicas"):
            world.send(evaluations(1))
        time.sleep(0.3)
        world.client.config_set("min-replicas-to-write", 0)
    world.audit()


def test_a_redis_that_is_still_loading_is_waited_for(
    worlds: Worlds, database_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Stock: the same for the worker; a sender has to try again by itself."""
    settings = {"key-load-delay": "1500", "loading-process-events-interval-bytes": "1024"}
    with Valkey(tmp_path_factory.mktemp("slow"), settings=settings) as server:
        world = worlds(database_url, server.url())
        for position in range(2000):
            world.client.set(f"other-{position}", "x" * 1000)
        world.client.bgrewriteaof()
        wait_until(lambda: not world.client.info("persistence")["aof_rewrite_in_progress"], what="the file is compact")
        workers = world.workers()
        workers.start()
        world.send(evaluations(1000))
        server.kill()
        starting = threading.Thread(target=server.start)
        starting.start()
        refused = 0
        while starting.is_alive():
            try:
                world.client.ping()
            except redis.BusyLoadingError:
                refused += 1
            except redis.ConnectionError:
                pass
            time.sleep(0.05)
        assert refused > 3
        send_surely(world, 50)
        world.audit()
        workers.kill()


@pytest.mark.parametrize("outage", ["kill", "freeze"])
@pytest.mark.parametrize("which", ["postgres_server", "valkey_server"])
def test_an_outage_holds_up_no_deployment(
    worlds: Worlds, own_postgres: Postgres, valkey_server: Valkey, which: str, outage: str
) -> None:
    """Stock: waits for its acknowledgements as long as Redis is away, up to ten minutes, and so for PostgreSQL."""
    server: Server = own_postgres if which == "postgres_server" else valkey_server
    world = worlds(own_postgres.url(), valkey_server.url())
    workers = world.workers(n=2, EVALSTORE_BATCH_EVENTS="100")
    workers.start()
    world.send(evaluations(2000))
    wait_until(lambda: world.applied() > 0, what="work has begun")
    (server.kill if outage == "kill" else server.freeze)()
    time.sleep(1)  # Time for the workers to start processing.
    took_s = workers.stop(within_s=30)
    (server.start if outage == "kill" else server.thaw)()
    assert took_s < 11
    workers.start()
    world.audit()
