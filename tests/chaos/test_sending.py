"""What a sender is promised."""

import threading
import time
from collections.abc import Iterator

import pytest
import redis

from evalstore.local.servers import Valkey
from models.errors import NotDurable, RedisOutage
from tasks.actor import store_evaluation
from tasks.broker import SendingBroker
from tasks.connections import pack, run_transaction
from tests.chaos.conftest import Worlds
from tests.chaos.relay import Loss, Relay, script
from tests.chaos.world import KEYS, World, evaluation, evaluations, through


def durable(broker: SendingBroker, eval_id: str) -> None:
    message = store_evaluation.message(evaluation(eval_id)[0])
    message.options["durable"] = True
    broker.enqueue(message)


def test_a_durable_send_returns_when_the_file_is_on_disk(own_world: World) -> None:
    """Stock: has none."""
    for position in range(5):
        began = time.monotonic()
        durable(own_world.broker, f"durable-{position}")
        assert time.monotonic() - began < 5
    own_world.broker.enqueue_many([store_evaluation.message(event) for event in evaluations(300)], durable=True)
    assert own_world.client.llen(KEYS.queue) == 905


@pytest.mark.parametrize("setting", [("appendonly", "no"), ("appendfsync", "no")])
def test_a_durable_send_that_nobody_confirms_raises(own_world: World, setting: tuple[str, str]) -> None:
    """Stock: has none."""
    own_world.client.config_set(*setting)
    message = store_evaluation.message_with_options(args=(evaluation("perhaps")[0],), durable=True)
    for _ in range(2):  # A repeat is as durable as the first send.
        with pytest.raises(NotDurable):
            own_world.broker.enqueue(message)
    assert own_world.client.llen(KEYS.queue) == 2


def test_a_durable_send_whose_answer_was_lost_is_not_taken_for_confirmed(own_world: World, worlds: Worlds) -> None:
    """A connection that wrote nothing itself is told at once that all it wrote is on disk."""
    own_world.client.config_set("appendfsync", "no")  # As with a slow disk.
    with Relay(own_world.client.connection_pool.connection_kwargs["port"]) as relay:
        broker = SendingBroker(url=through(own_world.redis_url, relay.port), middleware=[], timeout_s=2)
        broker.enqueue(store_evaluation.message(evaluation("first")[0]))
        relay.lose(script("enqueue"), "reply", times=1)
        with pytest.raises(NotDurable):
            durable(broker, "perhaps")
        assert relay.lost(script("enqueue")) == 1
        broker.close()
    assert own_world.client.llen(KEYS.queue) == 2


def test_a_durable_send_is_content_with_a_replica(
    own_world: World, valkey_server: Valkey, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Stock: has none."""
    own_world.client.config_set("appendonly", "no")
    own_world.client.config_set("masterauth", valkey_server.password)
    with Valkey(tmp_path_factory.mktemp("replica")) as second, redis.Redis.from_url(second.url()) as replica:
        replica.config_set("masterauth", valkey_server.password)
        replica.replicaof("127.0.0.1", str(valkey_server.port))
        own_world.client.wait(1, 10_000)
        durable(own_world.broker, "replicated")
    with pytest.raises(NotDurable):
        durable(own_world.broker, "perhaps")


def test_thousands_are_sent_in_one_transaction_or_not_at_all(own_world: World) -> None:
    """Stock: a round trip each, and no telling which arrived."""
    world = own_world
    world.send(evaluations(1))  # Few events are sent by the script.
    assert "cmdstat_exec" not in world.client.info("commandstats")
    world.broker.enqueue_many([store_evaluation.message(event) for event in evaluations(2000)])
    assert world.client.info("commandstats")["cmdstat_exec"]["calls"] == 1
    assert world.client.llen(KEYS.queue) == 6003
    world.client.config_set(
        "maxmemory", world.client.info("memory")["used_memory"] + 1_000_000
    )  # Full after some of the messages.
    with pytest.raises(RedisOutage, match="maxmemory"):
        world.broker.enqueue_many([store_evaluation.message(event) for event in evaluations(2000)])
    assert world.client.llen(KEYS.queue) == world.client.hlen(KEYS.bodies) == 6003


@pytest.mark.parametrize("at", ["MULTI", "RPUSH", "EXEC"])
@pytest.mark.parametrize("loss", ["request", "reply"])
def test_many_are_in_the_queue_once_wherever_their_connection_broke(world: World, relay: Relay, at: str, loss: Loss) -> None:
    """Stock: some are in the queue twice."""
    messages = [store_evaluation.message(event) for event in evaluations(100)]
    broker = SendingBroker(url=through(world.redis_url, relay.port), middleware=[])
    relay.lose(at.encode(), loss)
    broker.enqueue_many(messages)
    broker.close()
    assert relay.lost(at.encode()) == 1
    ids = [message.options["redis_message_id"].encode() for message in messages]
    assert world.client.lrange(KEYS.queue, 0, -1) == ids
    assert world.client.hlen(KEYS.bodies) == 300


def test_what_redis_reads_long_after_it_was_sent_again_is_not_queued_twice(world: World) -> None:
    """As when Redis was frozen, and has both connections before it now."""
    pairs: list[str | bytes] = ["id-1", b"1", "id-2", b"2"]

    def late() -> Iterator[bytes]:
        yield pack("HSET", KEYS.bodies, *pairs)
        world.broker.send_spooled(pairs)
        yield pack("RPUSH", KEYS.queue, *pairs[::2])

    pool = world.broker.client.connection_pool
    assert not run_transaction(pool, KEYS.resent, late())
    assert world.client.lrange(KEYS.queue, 0, -1) == [b"id-1", b"id-2"]


def test_who_may_not_open_a_transaction_sends_many_all_the_same(own_world: World) -> None:
    """Stock: a round trip each."""
    own_world.client.acl_setuser("plain", enabled=True, nopass=True, commands=["+@all", "-@transaction"], keys=["*"])
    broker = SendingBroker(url=own_world.redis_url.replace("//default:", "//plain:"), middleware=[])
    broker.enqueue_many([store_evaluation.message(event) for event in evaluations(100)])
    broker.close()
    assert own_world.client.llen(KEYS.queue) == 300
    assert "cmdstat_exec" not in own_world.client.info("commandstats")


def test_many_threads_send_through_one_broker_whose_connections_break(world: World, worlds: Worlds, relay: Relay) -> None:
    """Stock: some are in the queue twice, and `send` raises for others."""
    behind = worlds(world.database_url, through(world.redis_url, relay.port))
    errors: list[BaseException] = []

    def send() -> None:
        try:
            for event in evaluations(100):
                behind.broker.enqueue(store_evaluation.message(event))
        except RedisOutage as error:
            errors.append(error)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        relay.cut()
        time.sleep(0.2)
    assert errors == []
    assert world.client.llen(KEYS.queue) == world.client.hlen(KEYS.bodies) == 1200
