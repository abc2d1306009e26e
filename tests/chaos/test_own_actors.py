"""An actor of somebody's own, on a queue of their own, beside ours."""

import json
from threading import Event
from typing import Any

import dramatiq
import pytest
from dramatiq import JSONEncoder, Worker
from dramatiq.middleware import Retries

from models.errors import DatabaseOutage, SchemaMismatch
from tests.chaos.world import wait_until
from worker.broker import Broker


def test_it_is_retried_and_what_was_not_begun_goes_back_when_the_worker_stops(redis_url: str) -> None:
    broker = Broker(url=redis_url, middleware=[Retries(min_backoff=10, max_backoff=20)])
    runs: list[str] = []
    begun, may_end = Event(), Event()

    @dramatiq.actor(broker=broker, queue_name="own")
    def work(name: str) -> None:
        runs.append(name)
        if name == "long":
            begun.set()
            may_end.wait(timeout=20)
        elif runs.count(name) < 2:
            raise ValueError(name)

    worker = Worker(broker, worker_threads=1, worker_timeout=100)
    worker.start()
    work.send("fails once")
    wait_until(lambda: runs == ["fails once"] * 2, what="it is retried")
    for name in ("long", "waits", "waits"):
        work.send(name)
    assert begun.wait(timeout=20)
    wait_until(lambda: broker.counts("own")["inflight"] > 1, what="more is fetched than is begun")
    broker.in_flight.close()
    may_end.set()
    worker.stop()

    assert broker.counts("own")["dead"] == 0
    assert broker.counts("own")["ready"] >= 1
    assert set(broker.in_flight.ids("own")) == set()
    broker.client.close()


@pytest.mark.parametrize("error", [DatabaseOutage, SchemaMismatch])
def test_an_outage_uses_up_no_retries(redis_url: str, error: type[Exception]) -> None:
    """The periodic jobs of an hour without PostgreSQL would be dead letters."""
    broker = Broker(url=redis_url, middleware=[Retries(max_retries=2, min_backoff=10, max_backoff=20)])
    runs: list[int] = []

    @dramatiq.actor(broker=broker, queue_name="own")
    def work() -> None:
        runs.append(len(runs))
        if len(runs) < 6:
            raise error("for now")
        if len(runs) < 8:  # Fail by its own fault as often as allowed.
            raise ValueError(len(runs))

    worker = Worker(broker, worker_threads=1, worker_timeout=100)
    worker.start()
    work.send()

    def is_done_with() -> bool:
        delayed: list[Any] = broker.client.zrange(broker.keys("own").delayed, 0, -1)
        if delayed:
            # Make the delayed messages due now.
            broker.client.zadd(broker.keys("own").delayed, dict.fromkeys(delayed, 0), xx=True)
        return broker.do_qsize("own") == 0

    wait_until(is_done_with, what="it is done with")
    worker.stop()

    assert (len(runs), broker.counts("own")["dead"]) == (8, 0)
    broker.client.close()


def test_a_process_counts_as_a_consumer_of_the_queues_it_was_started_for(redis_url: str) -> None:
    """`dramatiq worker.tasks --queues evaluations`: whoever looks sees that nobody works on the others."""
    broker = Broker(url=redis_url, middleware=[])
    for queue in ("own", "other"):
        broker.declare_queue(queue)
    worker = Worker(broker, queues={"own"}, worker_threads=1, worker_timeout=100)
    worker.start()
    wait_until(lambda: broker.client.hlen(broker.keys("own").workers) == 1, what="it is seen")
    assert broker.client.hlen(broker.keys("other").workers) == 0
    assert broker.client.hlen(broker.keys("other").processes) == 0
    worker.stop()
    assert broker.client.hlen(broker.keys("own").workers) == 0
    broker.client.close()


def test_its_arguments_are_written_by_the_encoder_of_dramatiq(redis_url: str) -> None:
    class Sorted(JSONEncoder):
        def encode(self, data: dict[str, Any]) -> bytes:
            return json.dumps(data, default=sorted).encode()

    broker, arguments = Broker(url=redis_url, middleware=[]), list[object]()

    @dramatiq.actor(broker=broker, queue_name="own")
    def work(given: object) -> None:
        arguments.append(given)

    with pytest.raises(TypeError, match="set"):  # The caller's value is unchanged.
        work.send({"b", "a"})
    usual = dramatiq.get_encoder()
    dramatiq.set_encoder(Sorted())
    try:
        work.send({"b", "a"})
    finally:
        dramatiq.set_encoder(usual)
    worker = Worker(broker, worker_threads=1, worker_timeout=100)
    worker.start()
    wait_until(lambda: arguments == [["a", "b"]], what="it is run")
    worker.stop()
    broker.client.close()
