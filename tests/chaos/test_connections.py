"""Connections that break before the server read a request, and after it answered."""

import threading
import time

import psycopg
import pytest
import redis

from evalstore.local.servers import Valkey
from models.errors import RedisOutage
from tests.chaos.conftest import Worlds
from tests.chaos.relay import Loss, Relay, script
from tests.chaos.world import KEYS, World, evaluation, evaluations, port_of, through, wait_until

SCRIPTS = ["fetch", "settle", "dead_letter", "heartbeat", "requeue"]


@pytest.mark.parametrize("loss", ["request", "reply"])
def test_a_worker_whose_connections_break_around_its_scripts_loses_nothing(
    world: World, worlds: Worlds, relay: Relay, loss: Loss
) -> None:
    """Stock: after a lost reply, the first batch stays in the living process's set until that process dies."""
    behind = worlds(world.database_url, through(world.redis_url, relay.port))
    workers = behind.workers(EVALSTORE_BATCH_EVENTS="100")
    workers.start()
    for name in SCRIPTS:
        relay.lose(script(name), loss, times=5)
    world.send(evaluations(300))
    world.raw(b"no message")
    wait_until(lambda: relay.lost(script("settle")) == 5 and relay.lost(script("fetch")) == 5, what="replies were lost")
    world.send(evaluations(300))
    world.audit(others_dead=["InvalidEvent"])
    assert workers.stop() < 8
    world.audit(others_dead=["InvalidEvent"])


def test_connections_that_break_all_the_time_lose_nothing(world: World, worlds: Worlds, relay: Relay) -> None:
    """Stock: as above; delayed messages and retries of the process are stuck until it ends."""
    behind = worlds(world.database_url, through(world.redis_url, relay.port))
    workers = behind.workers(n=2, EVALSTORE_BATCH_EVENTS="200")
    workers.start()
    done = threading.Event()

    def cut() -> None:
        while not done.wait(0.15):
            relay.cut()

    cutting = threading.Thread(target=cut)
    cutting.start()
    began = time.monotonic()
    while time.monotonic() < began + 5:
        world.send(evaluations(100))
        time.sleep(0.1)
    done.set()
    cutting.join()
    world.audit()
    workers.stop()


@pytest.mark.parametrize("loss", ["request", "reply"])
def test_a_send_whose_connection_breaks_is_in_the_queue_once(world: World, worlds: Worlds, relay: Relay, loss: Loss) -> None:
    """Stock: the message is in the queue twice after a lost reply; where it sends by itself at all."""
    behind = worlds(world.database_url, through(world.redis_url, relay.port))
    behind.broker.close()
    for times in (1, 4):
        relay.lose(script("enqueue"), loss, times=times)
        behind.send(evaluations(20))
        assert relay.lost(script("enqueue")) == times
    relay.lose(script("delay"), loss, times=3)
    behind.broker.enqueue(world.message(evaluation("later")[0]), delay=60_000)
    assert relay.lost(script("delay")) == 3
    assert world.client.llen(KEYS.queue) == 120
    assert world.client.zcard(KEYS.delayed) == 1
    assert world.client.hlen(KEYS.bodies) == 121


def test_a_send_that_reaches_no_server_says_so_in_time(world: World, worlds: Worlds, relay: Relay) -> None:
    """Stock: the same."""
    behind = worlds(world.database_url, through(world.redis_url, relay.port))
    relay.away(True)
    began = time.monotonic()
    with pytest.raises(RedisOutage):
        behind.send(evaluations(1))
    assert time.monotonic() - began < 6
    relay.away(False)
    behind.send(evaluations(1))
    assert world.client.llen(KEYS.queue) == 3


def test_a_commit_whose_answer_is_lost_is_recognised(world: World, worlds: Worlds) -> None:
    """Stock: tries again too, and the store recognises it; it loses what fails while Redis is away."""
    with Relay(port_of(world.database_url)) as relay:
        behind = worlds(through(world.database_url, relay.port), world.redis_url)
        behind.workers().start()
        world.send(evaluations(20))
        world.wait_settled()
        relay.lose(b"COMMIT", "reply", times=3)
        world.send(evaluations(500))
        wait_until(lambda: relay.lost(b"COMMIT") == 3, what="the answers were lost")
        world.audit()
        for workers in behind.fleet:
            workers.kill()


def test_a_demoted_server_is_left_for_the_new_primary_behind_the_same_name(
    worlds: Worlds, database_url: str, valkey_server: Valkey, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Stock: READONLY is no connection error to it; acknowledgements are dropped, and connections are kept to the old one."""
    with Valkey(tmp_path_factory.mktemp("replica")) as second, Relay(valkey_server.port) as relay:
        url = through(valkey_server.url(), relay.port)
        world = worlds(database_url, url)
        world.client.close()
        with redis.Redis.from_url(valkey_server.url()) as one, redis.Redis.from_url(second.url()) as two:
            two.config_set("requirepass", valkey_server.password)
            two.config_set("masterauth", valkey_server.password)
            one.config_set("masterauth", valkey_server.password)
            two.auth(valkey_server.password)
            two.replicaof("127.0.0.1", str(valkey_server.port))
            wait_until(lambda: two.info("replication")["master_link_status"] == "up", what="the replica follows")
            world.workers(n=2, EVALSTORE_BATCH_EVENTS="100").start()
            world.send(evaluations(1000))
            one.wait(1, 5000)
            wait_until(lambda: world.applied() > 0, what="work has begun")
            one.execute_command("FAILOVER")
            relay.upstream = second.port  # Open connections keep their server.
            wait_until(lambda: one.info("replication")["role"] == "slave", what="the roles changed")
            began = time.monotonic()
            _insist(world, evaluations(200))
            assert time.monotonic() - began < 10
            world.client = redis.Redis.from_url(through(valkey_server.url(), second.port))
            world.audit()
            for workers in world.fleet:
                workers.kill()


def _insist(world: World, events: list[dict[str, object]]) -> None:
    """Send until it is sent, as a sender that means it."""
    for _ in range(50):
        try:
            world.send(events)
        except RedisOutage:
            time.sleep(0.2)
        else:
            return
    raise AssertionError("not sent")


def test_the_transaction_of_a_batch_and_its_acknowledgement_may_both_be_cut(world: World, worlds: Worlds, relay: Relay) -> None:
    """Stock: as each of them."""
    with Relay(port_of(world.database_url)) as to_postgres:
        behind = worlds(through(world.database_url, to_postgres.port), through(world.redis_url, relay.port))
        behind.workers(EVALSTORE_BATCH_EVENTS="100").start()
        to_postgres.lose(b"COMMIT", "request", times=2)
        relay.lose(script("settle"), "reply", times=4)
        world.send(evaluations(400))
        world.audit()
        for workers in behind.fleet:
            workers.kill()
    with psycopg.connect(world.database_url) as conn:
        assert conn.execute("SELECT count(*) FROM evaluations WHERE version <> 3").fetchone() == (0,)
