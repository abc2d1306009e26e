"""Failovers of Redis under load: Sentinel and Cluster, with senders of every kind."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from dramatiq import Message
from dramatiq.brokers.redis import RedisBroker
from redis.sentinel import Sentinel as SentinelClient

from models.errors import NotDurable, RedisOutage
from tasks.actor import store_evaluation
from tasks.broker import SendingBroker
from tasks.confirmations import Confirmations
from tasks.keys import fence
from tasks.spool import Spool
from tests.chaos.conftest import Worlds
from tests.chaos.world import World, evaluations
from tests.redis_groups import PASSWORD, Cluster, SentinelGroup, until

NAMESPACE = "{dramatiq}"
Group = SentinelGroup | Cluster
Send = Callable[[list[dict[str, Any]]], None]


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[SentinelGroup]:
    with SentinelGroup(tmp_path / "redis") as group:
        yield group


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "redis") as group:
        yield group


@pytest.fixture(params=["sentinels", "cluster"])
def group(request: pytest.FixtureRequest) -> Group:
    made: Group = request.getfixturevalue(request.param)
    return made


def one_by_one(broker: SendingBroker) -> Send:
    def send(events: list[dict[str, Any]]) -> None:
        for event in events:
            broker.enqueue(store_evaluation.message(event))

    return send


class Load:
    """Senders of each kind, at about 1,000 events a second together, and a watcher of what is stored."""

    def __init__(self, world: World, group: Group, folder: Path, *, with_stock: bool = True) -> None:
        self.world, self._done = world, threading.Event()
        self.durable: set[str] = set()
        self.longest_stall_s = 0.0
        self.errors: list[str] = []
        self._closing: list[Any] = []
        spooling = SendingBroker(
            url=group.url, namespace=world.namespace, middleware=[], spool=Spool(folder / "spool", max_bytes=2**30)
        )
        self._spooling = spooling
        ours = [self._broker() for _ in range(3)]
        senders: dict[str, Send] = {
            "single": one_by_one(ours[0]),
            "bulk": lambda events: ours[1].enqueue_many([store_evaluation.message(event) for event in events]),
            "durable": lambda events: ours[2].enqueue_many([store_evaluation.message(event) for event in events], durable=True),
            "spool": one_by_one(spooling),
        }
        if with_stock:
            senders["stock"] = self._stock(group)
        self._threads = [threading.Thread(target=self._send, args=pair) for pair in senders.items()]
        self._threads.append(threading.Thread(target=self._watch))

    def _broker(self) -> SendingBroker:
        broker = SendingBroker(url=self.world.redis_url, namespace=self.world.namespace, middleware=[])
        self._closing.append(broker)
        return broker

    def _stock(self, group: Group) -> Send:
        """Stock Dramatiq, with redis-py's own client for Sentinel or Cluster."""
        if isinstance(group, SentinelGroup):
            nodes = [("127.0.0.1", sentinel.port) for sentinel in group.sentinels]
            client: Any = SentinelClient(nodes, socket_timeout=1).master_for("main", password=PASSWORD, socket_timeout=1)
        else:
            client = redis.RedisCluster(host="127.0.0.1", port=group.nodes[0].port, password=PASSWORD, socket_timeout=1)
        stock = RedisBroker(client=client, namespace=self.world.namespace)

        def send(events: list[dict[str, Any]]) -> None:
            for event in events:
                stock.enqueue(Message("evaluations", "store_evaluation", (event,), {}, {}))

        return send

    def _send(self, kind: str, send: Send) -> None:
        while not self._done.is_set():
            events = evaluations(100 if kind == "bulk" else 7, kind)
            while True:  # An event whose send raised is sent again, also after the end.
                try:
                    send(events)
                except (RedisOutage, redis.RedisError, NotDurable) as error:
                    self.errors.append(f"{kind}: {type(error).__name__} {error}")
                    time.sleep(0.05)
                else:
                    break
            self.world.sent |= {event["event_id"]: event for event in events}
            if kind == "durable":
                self.durable |= {event["event_id"] for event in events}
            self._done.wait(len(events) / 200)

    def _watch(self) -> None:
        applied, since = self.world.applied(), time.monotonic()
        while not self._done.wait(0.05):
            if (now := self.world.applied()) != applied:
                self.longest_stall_s = max(self.longest_stall_s, time.monotonic() - since)
                applied, since = now, time.monotonic()
        self.longest_stall_s = max(self.longest_stall_s, time.monotonic() - since)

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            until(lambda: self.world.applied() > 1000, what="events are stored")
            yield
            before = self.world.applied()
            until(lambda: self.world.applied() > before + 1000, what="storing goes on")
        finally:
            self._done.set()
            for thread in self._threads:
                thread.join()
            self._spooling.spool.forward(self._spooling.send_spooled)  # type: ignore[union-attr]
            for broker in (*self._closing, self._spooling):
                broker.close()


def audit(world: World, load: Load, *, may_lose: int = 0) -> None:
    """All durable events are applied, all others but those not replicated, none twice, and each record is confirmed.

    `may_lose`: the largest number of events that the old primary may have confirmed and not replicated. A bulk has 300.
    """
    world.wait_settled()
    with psycopg.connect(world.database_url) as conn:
        applied = {str(event_id) for (event_id,) in conn.execute("SELECT event_id FROM evaluation_events")}
    lost = set(world.sent) - applied
    print(f"{len(world.sent)} sent, {len(lost)} lost, stall {load.longest_stall_s:.2f} s, {len(load.errors)} errors")
    print("\n".join(dict.fromkeys(load.errors)))
    print(Counter(world.sent[event_id]["eval_id"].partition("-")[0] for event_id in lost))
    assert not lost & load.durable
    assert len(lost) <= may_lose
    world.sent = {event_id: event for event_id, event in world.sent.items() if event_id not in lost}
    world.audit()
    assert load.longest_stall_s <= 5
    expect_confirmed(world)


def expect_confirmed(world: World) -> None:
    versions: dict[str, int] = {}
    for confirmation in Confirmations("audit", client=world.client, namespace=world.namespace, idle_s=2):
        versions[confirmation["eval_id"]] = max(versions.get(confirmation["eval_id"], 0), confirmation["version"])
    with psycopg.connect(world.database_url) as conn:
        assert versions == dict(conn.execute("SELECT eval_id, version FROM evaluations").fetchall())


def primary(group: Group) -> Any:
    return group.primary() if isinstance(group, SentinelGroup) else group.owner()


def ordered(group: SentinelGroup) -> bool:
    group.fail_over("COORDINATED")
    return True


@pytest.fixture
def failing_world(worlds: Worlds, database_url: str, group: Group) -> World:
    world = worlds(database_url, group.url, NAMESPACE)
    world.workers(n=2).start()
    return world


def test_nothing_durable_is_lost_when_the_primary_is_killed(failing_world: World, group: Group, tmp_path: Path) -> None:
    load = Load(failing_world, group, tmp_path)
    with load.running():
        victim = primary(group)
        victim.kill()
        until(lambda: primary(group) is not victim, what="the replica is promoted")
        time.sleep(1)
        victim.start()
        until(lambda: victim.role() == "slave", what="the old primary follows the new one")
    audit(failing_world, load, may_lose=600)


def test_nothing_is_lost_when_a_failover_is_ordered(failing_world: World, group: Group, tmp_path: Path) -> None:
    load = Load(failing_world, group, tmp_path)
    with load.running():
        for _ in range(2):
            before = primary(group)
            if isinstance(group, SentinelGroup):
                until(partial(ordered, group), what="Sentinel accepts the order")
            else:
                until(group.is_well, what="the cluster is well")
                group.replica().run("CLUSTER", "FAILOVER")
            until(lambda: primary(group) is not before, what="the replica is promoted")  # noqa: B023
            until(lambda: before.role() == "slave", what="the old primary follows the new one")  # noqa: B023
    audit(failing_world, load)


def test_nothing_durable_is_lost_while_there_are_two_primaries(
    worlds: Worlds, database_url: str, sentinels: SentinelGroup, tmp_path: Path
) -> None:
    """Sentinel promotes the replica, and lets the old primary accept writes for ten seconds."""
    world = worlds(database_url, sentinels.url, NAMESPACE)
    world.workers(n=2).start()
    # redis-py's client for Sentinel keeps its connections to the old primary.
    load = Load(world, sentinels, tmp_path, with_stock=False)
    with load.running():
        before = sentinels.primary()
        sentinels.fail_over()
        until(lambda: sentinels.primary() is not before, what="the replica is promoted")
        assert before.role() == "master"
        until(lambda: before.role() == "slave", what="the old primary follows the new one")
    audit(world, load, may_lose=2000)


def test_nothing_durable_is_lost_when_the_primary_is_cut_off_and_returns(
    failing_world: World, group: Group, tmp_path: Path
) -> None:
    """A frozen server looks like one behind a broken network: it keeps its connections and does not answer."""
    load = Load(failing_world, group, tmp_path)
    with load.running():
        victim = primary(group)
        victim.freeze()
        others = [node for node in group.nodes if node is not victim]
        until(lambda: sum(node.role() == "master" for node in others) == len(others) // 2 + 1, what="the replica is promoted")
        time.sleep(2)
        victim.thaw()
        until(lambda: victim.role() == "slave", what="the old primary follows the new one")
    audit(failing_world, load, may_lose=600)


@pytest.mark.parametrize("way", ["key by key", "at once"])
def test_nothing_is_lost_when_the_slot_moves(
    way: str, worlds: Worlds, database_url: str, cluster: Cluster, tmp_path: Path
) -> None:
    world = worlds(database_url, cluster.url, NAMESPACE)
    world.workers(n=2).start()
    # Dramatiq's script does not declare its keys. So both servers accept it while the keys move one by one.
    load = Load(world, cluster, tmp_path, with_stock=way == "at once")
    with load.running():
        for _ in range(2):
            owner = cluster.owner()
            other = next(node for node in cluster.nodes if node.role() == "master" and node is not owner)
            if way == "key by key":
                cluster.move_slot(other, hold=lambda: time.sleep(0.5))
            else:
                owner.run("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", cluster.slot, cluster.slot, "NODE", cluster.id(other))
            until(lambda: cluster.owner() is other, what="the slot has moved")  # noqa: B023
    audit(world, load)


def test_a_durable_send_waits_for_the_replica_that_the_primary_has_or_had(cluster: Cluster) -> None:
    """The local file is worth nothing once a replica is promoted."""
    broker = SendingBroker(url=cluster.url, namespace=NAMESPACE, middleware=[], timeout_s=2)

    def send() -> bool:
        broker.enqueue_many([store_evaluation.message(evaluations(1)[0])], durable=True)
        return True

    owner, replica = cluster.owner(), cluster.replica()
    send()
    replica.freeze()
    with pytest.raises(NotDurable, match="no replica"):
        send()
    replica.thaw()
    until(lambda: b"connected" in replica.run("ROLE") and owner.run("WAIT", 1, 1000), what="the replica answers again")
    replica.kill()
    until(lambda: owner.run("INFO", "replication")["connected_slaves"] == 0, what="the primary lost its replica")
    with pytest.raises(NotDurable, match="no replica"):
        send()
    replica.start()
    until(cluster.is_well, what="the replica is back")
    send()
    owner.kill()
    until(lambda: cluster.owner() is replica, what="the replica is promoted")
    send()  # No server but this one has the slot, and none can be promoted: its file counts.
    assert replica.run("GET", fence(f"{NAMESPACE}:evaluations")) is not None
    broker.close()
