"""Confirmations reach other services: once committed, in order, at least once, whatever Redis loses."""

import re
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
import redis
from redis.client import PubSub
from sqlalchemy import Connection, text

from evalstore.local.servers import Valkey
from evalstore.sinks.statistics import catch_up
from evalstore.storage import event_store, outbox, runs
from models.errors import RedisOutage
from models.events import parse
from models.settings import settings
from tasks.confirmations import Confirmations
from tasks.keys import Names
from tests.chaos.world import wait_until
from worker import confirmation_relay
from worker.background import Background
from worker.broker import Broker
from worker.verified_database import VerifiedDatabase

AT = "2026-01-01T00:00:00Z"
STREAM = Names("dramatiq").stream


def store(conn: Connection, eval_id: str, *numbers: int) -> None:
    event_store.store(
        conn,
        [
            parse(
                {
                    "type": "evaluation:started",
                    "eval_id": eval_id,
                    "event_id": UUID(int=number),
                    "occurred_at": AT,
                }
            )
            for number in numbers
        ],
    )


def read(client: redis.Redis, group: str = "test") -> list[dict[str, Any]]:
    return list(Confirmations(group, client=client, idle_s=1))


def versions(found: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(confirmation["eval_id"], confirmation["version"]) for confirmation in found]


def entries(broker: Broker) -> list[Any]:
    found: Any = broker.client.xrange(STREAM)
    return list(found)


def pending(conn: Connection) -> int:
    found = conn.execute(text("SELECT count(*) FROM confirmations WHERE relayed_at IS NULL")).scalar_one()
    conn.rollback()
    return int(found)


def test_each_evaluation_and_commit_is_confirmed_with_what_it_holds(conn: Connection, broker: Broker) -> None:
    store(conn, "a", 1, 2)
    store(conn, "a", 3)
    store(conn, "a", 3)  # a duplicate changes nothing and is not confirmed

    assert confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters) == 2

    first, second = read(broker.client)
    assert first["type"] == "storage:evaluation:created"
    assert sorted(first["event_ids"]) == [str(UUID(int=1)), str(UUID(int=2))]
    assert (second["type"], second["event_ids"]) == ("storage:evaluation:updated", [str(UUID(int=3))])
    assert (second["eval_id"], second["version"], second["status"]) == ("a", 3, "running")
    assert second["recorded_at"].endswith("Z")
    assert pending(conn) == 0


def test_the_end_of_a_run_is_relayed_published_and_read(conn: Connection, broker: Broker) -> None:
    with broker.client.pubsub() as listener:
        listener.subscribe("storage:run:finished")
        store(conn, "a", 1)
        runs.declare(conn, "r", {"closed": True})
        catch_up(conn)
        assert confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters) == 2
        _, published = (listener.get_message(timeout=5) for _ in range(2))
    assert published is not None
    assert b'"run_id":"r"' in published["data"]
    of_evaluation, of_run = read(broker.client)
    assert (of_evaluation["eval_id"], of_run["type"], of_run["run_id"]) == ("a", "storage:run:finished", "r")
    assert read(broker.client) == []


def test_a_backlog_is_relayed_in_turns_of_which_none_is_broken_off(
    conn: Connection, broker: Broker, database_url: str, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
) -> None:
    """A connection that one thing keeps for too long is broken: the server might be frozen."""
    monkeypatch.setenv("EVALSTORE_DATABASE_URL", database_url)
    settings.cache_clear()
    connections = VerifiedDatabase.of(settings())
    for number in range(120):
        store(conn, f"{number}", 1)

    assert confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters, go_on=lambda: False) == 20
    background = Background(connections, broker, broker.lua, broker.metrics, turn_s=0)
    background.start()
    background.wake()
    # Polling every 5 s would give it one turn.
    eventually(lambda: pending(conn) == 0, within_s=15, what="the next turns")

    background.stop()
    connections.engine.dispose()
    settings.cache_clear()
    assert len(entries(broker)) == 120


def test_a_user_who_may_not_publish_leaves_no_copies_in_the_stream(conn: Connection, valkey_server: Valkey) -> None:
    """Redis gives a new user no channel by itself, and undoes nothing of a script that fails halfway."""
    with redis.Redis.from_url(valkey_server.url()) as admin:
        for eval_id, channels in {"a": "resetchannels", "b": "&storage:evaluation:created"}.items():
            admin.execute_command("ACL", "SETUSER", "modest", "on", ">pw", "~*", channels, "+@all", "-@dangerous")
            broker = Broker(url=re.sub("//[^@]*@", "//modest:pw@", valkey_server.url()), middleware=[])
            store(conn, eval_id, 1)
            store(conn, eval_id, 2)
            for _ in range(3):
                with pytest.raises(RedisOutage, match="channel"):
                    confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters)
            assert entries(broker) == []
            broker.client.close()

        admin.execute_command("ACL", "SETUSER", "modest", "&*")
        broker = Broker(url=re.sub("//[^@]*@", "//modest:pw@", valkey_server.url()), middleware=[])
        assert confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters) == 4
        assert len(entries(broker)) == 4
        broker.client.close()


def test_they_are_published_on_the_channel_of_their_type(conn: Connection, broker: Broker) -> None:
    with broker.client.pubsub() as listening:
        listening.subscribe("storage:evaluation:created", "storage:evaluation:updated")
        assert listening.get_message(timeout=5)
        assert listening.get_message(timeout=5)
        store(conn, "published", 1)
        store(conn, "published", 2)
        confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters)

        heard = [listening.get_message(timeout=5) for _ in range(2)]

    assert [message and message["channel"] for message in heard] == [
        b"storage:evaluation:created",
        b"storage:evaluation:updated",
    ]


def store_many(conn: Connection) -> None:
    """So many at once that it is worth asking who listens."""
    event_store.store(
        conn,
        [
            parse({"type": "evaluation:started", "eval_id": f"many-{number}", "event_id": uuid4(), "occurred_at": AT})
            for number in range(100)
        ],
    )


def heard(listening: PubSub) -> list[bytes]:
    """What is published, until nothing more comes."""
    return [message["data"] for message in iter(lambda: listening.get_message(timeout=2), None)]


def subscribed(listening: PubSub, channel: str) -> None:
    subscribe = listening.psubscribe if "*" in channel else listening.subscribe
    subscribe(channel)
    assert listening.get_message(timeout=5)


@pytest.mark.parametrize("channel", ["storage:evaluation:created", "storage:*"])
def test_however_many_there_are_each_is_published_to_whoever_listens(conn: Connection, broker: Broker, channel: str) -> None:
    store_many(conn)
    with broker.client.pubsub() as listening:
        subscribed(listening, channel)
        confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters)

        assert heard(listening) == [fields[b"confirmation"] for _, fields in entries(broker)]


def test_many_are_published_on_the_channel_of_a_namespace(conn: Connection, redis_url: str) -> None:
    broker = Broker(url=redis_url, namespace="team", middleware=[])
    store_many(conn)
    with broker.client.pubsub() as listening:
        subscribed(listening, "team:storage:evaluation:created")
        confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters)
        assert len(heard(listening)) == 100
    broker.client.close()


def test_whoever_listens_to_a_replica_hears_them_too(
    conn: Connection, valkey_server: Valkey, tmp_path_factory: pytest.TempPathFactory
) -> None:
    broker = Broker(url=valkey_server.url(), middleware=[])
    broker.client.config_set("repl-diskless-sync-delay", 0)
    with Valkey(tmp_path_factory.mktemp("replica")) as second, redis.Redis.from_url(second.url()) as replica:
        replica.config_set("masterauth", valkey_server.password)
        replica.replicaof("127.0.0.1", str(valkey_server.port))
        wait_until(lambda: replica.info("replication").get("master_link_status") == "up", what="the replica follows")
        with replica.pubsub() as listening:
            subscribed(listening, "storage:evaluation:created")
            store_many(conn)
            confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters)
            assert len(heard(listening)) == 100


def test_what_nobody_can_hear_is_not_published(conn: Connection, valkey_server: Valkey) -> None:
    broker = Broker(url=valkey_server.url(), middleware=[])
    store_many(conn)

    assert confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters) == 100

    assert "cmdstat_publish" not in broker.client.info("commandstats")
    assert len(entries(broker)) == 100


def test_what_redis_refuses_stays_in_the_outbox(conn: Connection, valkey_server: Valkey) -> None:
    broker = Broker(url=valkey_server.url(), timeout_s=1, middleware=[])
    store(conn, "a", 1)
    valkey_server.kill()

    with pytest.raises(RedisOutage):
        confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters)
    assert pending(conn) == 1

    valkey_server.start()
    assert confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters) == 1
    assert versions(read(broker.client)) == [("a", 1)]


def test_what_a_server_lost_is_given_to_it_again_before_anything_newer(conn: Connection, broker: Broker) -> None:
    store(conn, "a", 1)
    confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters)
    (kept,) = entries(broker)
    for number in (2, 3):
        store(conn, "a", number)
        confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters)
    # As after a failover to a replica that lagged.
    broker.client.delete(STREAM)
    broker.client.xadd(STREAM, kept[1], id=kept[0])
    store(conn, "a", 4)

    assert confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters) == 3

    assert versions(read(broker.client)) == [("a", 1), ("a", 2), ("a", 3), ("a", 4)]


def test_an_empty_server_is_given_all_that_is_not_forgotten(conn: Connection, broker: Broker) -> None:
    store(conn, "a", 1)
    confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters)
    broker.client.flushdb()

    confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters)

    assert versions(read(broker.client)) == [("a", 1)]


def test_what_was_relayed_is_forgotten_after_a_while(conn: Connection, broker: Broker) -> None:
    store(conn, "a", 1)
    confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters)

    assert outbox.forget(conn, older_than_s=600) == 0
    assert outbox.forget(conn, older_than_s=0) == 1


def test_a_service_goes_on_where_it_was_and_sees_no_repeats(conn: Connection, broker: Broker) -> None:
    for number in (1, 2, 3):
        store(conn, "a", number)
    confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters)

    reading = iter(Confirmations("service", client=broker.client, idle_s=1))
    assert next(reading)["version"] == 1
    assert next(reading)["version"] == 2
    del reading  # The reader dies while it handles the second confirmation.

    broker.client.xadd(STREAM, entries(broker)[0][1])  # A late repeat of the first confirmation.
    assert versions(read(broker.client, "service")) == [("a", 2), ("a", 3)]
    assert read(broker.client, "service") == []
    assert versions(read(broker.client, "another"))[:3] == [("a", 1), ("a", 2), ("a", 3)]


def test_old_entries_leave_the_stream(conn: Connection, broker: Broker) -> None:
    for number in range(300):
        broker.client.xadd(STREAM, {"confirmation": "{}"}, id=f"1-{number + 1}")
    store(conn, "a", 1)

    confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters)

    assert broker.client.xlen(STREAM) < 200


def test_a_worker_whose_clock_is_days_ahead_leaves_the_stream_alone(
    conn: Connection, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would empty it, and everything in the outbox would be relayed again, without end."""
    for _ in range(300):
        broker.client.xadd(STREAM, {"confirmation": "{}"})
    store(conn, "a", 1)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3 * 86_400)

    confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters)

    assert broker.client.xlen(STREAM) == 301


@pytest.mark.parametrize("options", [{"protocol": 2}, {"protocol": 3}, {"decode_responses": True}], ids=str)
def test_they_are_read_with_whatever_client_a_service_has(
    conn: Connection, broker: Broker, redis_url: str, options: dict[str, Any]
) -> None:
    store(conn, "a", 1)
    confirmation_relay.relay(conn, broker.names, broker.lua, broker.metrics.counters)
    with redis.Redis.from_url(redis_url, **options) as client:
        reading = iter(Confirmations("service", client=client, idle_s=1))
        assert next(reading)["version"] == 1
        del reading
        assert versions(read(client, "service")) == [("a", 1)]
