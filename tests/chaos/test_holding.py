"""What a process holds, and the moments at which two threads could disagree about it. In this process, on a real Redis."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import dramatiq
import pytest

from tasks.actor import EventActor
from tasks.keys import QUEUE
from tests.chaos.relay import Relay, script
from tests.chaos.world import KEYS, through, wait_until
from worker import heartbeat, messages
from worker.batches import Batch, BatchOutcome
from worker.broker import Broker
from worker.consumer import Consumer
from worker.delivery_handle import DeliveryHandle
from worker.heartbeat import is_gone, process_name
from worker.in_flight import InFlight

NAME = "store_evaluation"


def _nothing(_given: object) -> None: ...


def _store_all(_batch: Batch) -> BatchOutcome:
    return BatchOutcome()


def make(url: str, **given: Any) -> Broker:
    made = Broker(url=url, middleware=[], **given)
    made.declare_batch_actor(EventActor(NAME, QUEUE), _store_all)
    made.declare_queue("jobs")
    return made


@pytest.fixture
def broker(redis_url: str) -> Iterator[Broker]:
    made = make(redis_url)
    yield made
    made.close()


@pytest.fixture
def observer(redis_url: str) -> Iterator[Callable[[], None]]:
    """Another process's heartbeat: each call is one."""
    made = make(redis_url, max_deaths=2)
    beats = made.make_heartbeat(dramatiq.Worker(made))
    yield beats.run_once
    made.close()


def put(broker: Broker, number: int, queue: str = QUEUE) -> list[bytes]:
    """Messages as any Dramatiq sender encodes them; returns their ids."""
    ids = []
    for position in range(number):
        message: dramatiq.Message[Any] = dramatiq.Message(queue, NAME, ({"n": position},), {}, {})
        ids.append(uuid4().hex.encode())
        keys = broker.keys(queue)
        broker.client.hset(keys.bodies, ids[-1], message.encode())
        broker.client.rpush(keys.queue, ids[-1])
    return ids


def take(consumer: Consumer, *, tries: int = 20) -> DeliveryHandle:
    for _ in range(tries):
        if found := next(consumer):
            return found
    raise AssertionError("nothing came")


def leave_suspects(broker: Broker, observer: Callable[[], None], number: int) -> list[bytes]:
    """Messages that a process that is gone held while it worked."""
    ids = put(broker, number)
    dead = make_process_that_is_gone()
    broker.client.zadd(broker.unacked(QUEUE, dead), {redis_id: 65536 + place for place, redis_id in enumerate(ids)})
    broker.client.hset(KEYS.processes, dead, "working:7")
    broker.client.delete(KEYS.queue)
    observer()
    assert broker.client.llen(KEYS.suspects) == min(2, number)
    return ids


def make_process_that_is_gone() -> str:
    parts = process_name().split("|")
    return "|".join([*parts[:4], "1", uuid4().hex[:12]])  # The pid of this process with another start time.


def test_a_process_recovers_after_losing_redis_while_fetching_from_quarantine(
    broker: Broker, observer: Callable[[], None], redis_url: str, relay: Relay
) -> None:
    ids = leave_suspects(broker, observer, 2)
    behind = make(through(redis_url, relay.port))
    consumer = behind.consume(QUEUE, timeout=200)
    relay.lose(script("fetch_quarantined"), "reply", times=2)  # The second loss is for redis-py's own retry.
    seen = [take(consumer).redis_ids]
    assert relay.lost(script("fetch_quarantined")) == 2
    consumer.ack(DeliveryHandle(dramatiq.Message(QUEUE, NAME, (), {}, {}), seen[0]))
    seen.append(take(consumer).redis_ids)
    assert seen == [[redis_id] for redis_id in ids]
    behind.close()


def test_many_threads_that_settle_at_once_leave_all_room_free(broker: Broker) -> None:
    consumer = broker.consume(QUEUE)

    def release() -> None:
        for _ in range(1000):
            consumer._release()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(30):
            consumer.outstanding_message_count = 4000
            threads = [threading.Thread(target=release) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert consumer.outstanding_message_count == 0
    finally:
        sys.setswitchinterval(before)


def test_no_message_is_fetched_beside_one_from_quarantine() -> None:
    in_flight = InFlight()
    assert in_flight.enter_exclusive()
    in_flight.remove(())  # A thread that settled a message earlier finishes late.
    assert not in_flight.may_fetch()
    assert in_flight.add("evaluations", [b"suspect"])
    in_flight.remove(())
    assert not in_flight.may_fetch()
    in_flight.remove([b"suspect"])
    assert in_flight.may_fetch()


def test_a_process_whose_fetch_is_under_way_is_not_alone() -> None:
    in_flight = InFlight()
    with in_flight.fetching() as may:
        assert may
        assert not in_flight.enter_exclusive()
    assert in_flight.enter_exclusive()
    with in_flight.fetching() as may:
        assert not may


def test_a_message_of_another_queue_is_not_blamed_for_its_neighbours_death(
    broker: Broker, observer: Callable[[], None]
) -> None:
    job = put(broker, 1, "jobs")[0]
    event = put(broker, 1)[0]
    for _ in range(3):
        for queue in ("jobs", QUEUE):
            keys, dead = broker.keys(queue), make_process_that_is_gone()
            broker.client.zadd(broker.unacked(queue, dead), {job if queue == "jobs" else event: 65536})
            broker.client.hset(keys.processes, dead, "working:7")
            broker.client.delete(keys.queue, keys.suspects)
        observer()
    assert broker.client.zcard(broker.keys("jobs").dead) == 0
    assert broker.client.zcard(KEYS.dead) == 0


def test_only_deaths_with_a_single_message_from_quarantine_count(broker: Broker, observer: Callable[[], None]) -> None:
    [event] = leave_suspects(broker, observer, 1)
    for deaths in (1, 2):
        assert broker.client.zcard(KEYS.dead) == 0
        dying = make(broker_url(broker))
        consumer = dying.consume(QUEUE, timeout=200)
        assert take(consumer).redis_ids == [event]
        gone = make_process_that_is_gone()
        broker.client.rename(dying.unacked(QUEUE), broker.unacked(QUEUE, gone))
        broker.client.hdel(KEYS.processes, dying.process)
        broker.client.hset(KEYS.processes, gone, f"working:{deaths}")
        observer()
        dying.close()
    assert broker.client.zrange(KEYS.dead, 0, -1) == [event]


def test_nothing_is_left_of_a_process_that_died(broker: Broker, observer: Callable[[], None]) -> None:
    dead = make_process_that_is_gone()
    for key, told in ((KEYS.processes, "working:7"), (KEYS.workers, "1 {}")):
        broker.client.hset(key, dead, told)
    observer()
    assert dead.encode() not in broker.client.hkeys(KEYS.processes) + broker.client.hkeys(KEYS.workers)


def broker_url(broker: Broker) -> str:
    given = broker.client.connection_pool.connection_kwargs
    return f"redis://:{given['password']}@{given['host']}:{given['port']}/{given['db']}"


def test_whoever_fetches_is_known_to_the_others_from_that_moment(broker: Broker) -> None:
    """Killed before its first heartbeat, a process would leave behind what nobody looks for."""
    put(broker, 1)
    take(broker.consume(QUEUE, timeout=200))
    assert broker.client.hexists(KEYS.processes, broker.process)


def test_messages_that_no_thread_holds_are_requeued(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = put(broker, 3)
    held = take(broker.consume(QUEUE, timeout=200))
    assert held.redis_ids == ids
    broker.in_flight.remove(ids[1:2])  # The process loses track of this message.
    beats = broker.make_heartbeat(dramatiq.Worker(broker))
    monkeypatch.setattr(heartbeat, "RECONCILE_S", 0)
    beats.run_once()
    assert broker.client.lrange(KEYS.queue, 0, -1) == ids[1:2]
    assert broker.client.zrange(broker.unacked(QUEUE), 0, -1) == [ids[0], ids[2]]


@pytest.mark.parametrize("error", [ZeroDivisionError, MemoryError])
def test_a_message_that_no_one_expected_to_be_unreadable_strands_nothing(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    ids = put(broker, 3, "jobs")
    odd = broker.client.hget(broker.keys("jobs").bodies, ids[1].decode())

    def read(body: bytes) -> dramatiq.Message[Any]:
        if body == odd:
            raise error
        return messages.read_envelope(body)

    monkeypatch.setattr("worker.consumer.read_envelope", read)
    consumer = broker.consume("jobs", prefetch=16, timeout=200)
    if error is MemoryError:  # Not the fault of the message.
        with pytest.raises(MemoryError):
            take(consumer)
        assert not broker.in_flight.ids("jobs")  # So reconciling requeues them.
    else:
        assert [take(consumer).redis_ids, take(consumer).redis_ids] == [[ids[0]], [ids[2]]]
        assert broker.client.zrange(broker.keys("jobs").dead, 0, -1) == [ids[1]]


def test_a_message_that_cannot_be_written_again_becomes_a_dead_letter(broker: Broker) -> None:
    broker.declare_actor(
        dramatiq.Actor(lambda: None, broker=broker, actor_name="job", queue_name="jobs", priority=0, options={})
    )
    keys = broker.keys("jobs")
    broker.client.hset(keys.bodies, "big", dramatiq.Message("jobs", "job", (), {}, {}).encode())
    broker.client.rpush(keys.queue, "big")
    consumer = broker.consume("jobs", timeout=200)
    held = take(consumer)
    held.options["circular"] = held.options
    held.stuff_exception(ValueError("try again"))
    broker.enqueue(held, delay=5)  # type: ignore[arg-type]
    consumer.ack(held)
    assert broker.client.zrange(keys.dead, 0, -1) == [b"big"]
    assert not broker.in_flight.ids("jobs")


def test_a_raw_sender_that_puts_an_id_in_twice_gets_its_message_worked_on(broker: Broker) -> None:
    [event] = put(broker, 1)
    broker.client.rpush(KEYS.queue, event)
    consumer = broker.consume(QUEUE, timeout=200)
    held = take(consumer)
    assert held.redis_ids == [event]
    broker.client.rpush(KEYS.queue, event)  # A second copy while the first is being processed.
    assert next(consumer) is None
    consumer.ack(held)
    assert broker.client.keys("*") == [KEYS.processes.encode()]


def test_where_a_process_cannot_be_told_apart_it_is_not_taken_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "host_id", lambda: ("?", "?"))
    monkeypatch.setattr(heartbeat, "start_ticks", _nothing)
    assert not is_gone(process_name())


def test_an_eta_that_is_no_time_strands_nothing_that_a_stock_client_delayed(broker: Broker) -> None:
    body = '{"queue_name":"evaluations.DQ","actor_name":"%s","args":[],"kwargs":{},"options":{"eta":%s},'
    body += '"message_id":"m","message_timestamp":1}'
    for position, eta in enumerate(
        ["NaN", "-nan", "1e999", "-1e999", '"soon"', "{}", "null", "[1]", "true", '"0x10"', '"nan"']
    ):
        broker.client.hset(KEYS.stock_delayed_bodies, f"id-{position}", body % (NAME, eta))
        broker.client.rpush(KEYS.stock_delayed, f"id-{position}")
    consumer = broker.consume(QUEUE, timeout=200)
    found = {redis_id for held in [next(consumer) for _ in range(5)] if held for redis_id in held.redis_ids}
    buried = set(broker.client.zrange(KEYS.dead, 0, -1))
    assert len(found) + len(buried) == 11
    assert not broker.client.exists(KEYS.stock_delayed, KEYS.delayed)


def test_a_batch_whose_handler_raises_is_bisected_until_the_bad_message_is_alone(redis_url: str) -> None:
    broker, worked_on = make(redis_url), []
    culprit = put(broker, 100)[37]

    def run(batch: Batch) -> None:
        ids = [delivery.redis_id for delivery in batch]
        if culprit in ids:
            raise ZeroDivisionError
        worked_on.extend(ids)

    broker.actors[NAME].fn = run
    worker = dramatiq.Worker(broker, worker_threads=2, worker_timeout=50)
    worker.start()
    try:
        wait_until(lambda: not broker.client.exists(KEYS.bodies), what="all is settled")
    finally:
        worker.stop()
    assert len(worked_on) == len(set(worked_on)) == 99
    assert broker.client.zrange(KEYS.dead, 0, -1) == [culprit]
    broker.close()


def test_long_jobs_leave_a_thread_to_the_events(redis_url: str) -> None:
    broker = make(redis_url)
    prefetch = 2 * 4  # Dramatiq's prefetch with four threads.
    assert broker.consume("jobs", prefetch=prefetch).prefetch == 3
    assert broker.consume("jobs", prefetch=2).prefetch == 1
    assert broker.consume(QUEUE, prefetch=prefetch).prefetch == prefetch
    broker.close()


def test_a_message_wakes_one_of_those_who_wait(broker: Broker, redis_url: str) -> None:
    waiting, number = 3, 20
    found: list[DeliveryHandle] = []
    others = [make(redis_url) for _ in range(waiting)]
    consumers = [other.consume(QUEUE) for other in others]

    def consume(consumer: Consumer) -> None:
        consumer.timeout_s = 2.0
        while len(found) < number:
            if held := next(consumer):
                consumer.ack(held)
                found.append(held)

    def info(section: str, name: str) -> Any:
        told: Any = broker.client.info(section)
        return told.get(name)

    def fetches() -> int:
        return int((info("commandstats", "cmdstat_evalsha") or {"calls": 0})["calls"])

    threads = [threading.Thread(target=consume, args=[consumer]) for consumer in consumers]
    for thread in threads:
        thread.start()
    begun, before = time.monotonic(), 0
    while len(found) < number:
        wait_until(lambda: info("clients", "blocked_clients") == waiting, what="all wait")
        before, had = before or fetches(), len(found)
        put(broker, 1)
        wait_until(lambda had=had: len(found) > had, what="it was handed out")  # type: ignore[misc]
    for thread in threads:
        thread.join()
    turns = waiting * ((time.monotonic() - begun) / 2.0 + 2)  # Polls of consumers that waited without messages.
    assert fetches() - before <= 2 * number + turns  # One fetch and one settlement for each.
    for other in others:
        other.close()


def test_a_message_whose_process_died_when_it_was_woken_comes_first(broker: Broker) -> None:
    [woke, behind] = put(broker, 2)
    broker.client.lmove(KEYS.queue, KEYS.woken, "LEFT", "RIGHT")
    assert broker.counts(QUEUE)["ready"] == 2
    assert take(broker.consume(QUEUE, timeout=200)).redis_ids == [woke, behind]
    assert not broker.client.exists(KEYS.woken)


def test_while_a_batch_is_stored_the_few_that_come_gather_for_the_next(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.consumer.COALESCE_S", 10.0)
    put(broker, 1)
    consumer = broker.consume(QUEUE, timeout=200)
    first = take(consumer)
    ids = put(broker, 1)

    def go_on() -> None:
        ids.extend(put(broker, 1))
        consumer.ack(first)

    later = threading.Timer(0.1, go_on)
    later.start()
    assert take(consumer, tries=1).redis_ids == ids
    later.join()


def test_a_redis_user_who_may_not_block_gets_messages_all_the_same(
    broker: Broker, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    broker.client.execute_command("ACL", "SETUSER", "polling", "on", ">secret", "~*", "&*", "+@all", "-blmove")
    polling = make("redis://polling:secret@" + redis_url.rpartition("@")[2])
    consumer = polling.consume(QUEUE, timeout=200)
    assert [next(consumer), next(consumer), next(consumer)] == [None] * 3
    [event] = put(broker, 1)
    assert take(consumer).redis_ids == [event]
    assert not caplog.records
    polling.close()
