"""Dramatiq's own client on the same namespace, beside ours."""

import json
import subprocess
import sys
import time

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from tests.chaos.relay import ROOT
from tests.chaos.world import KEYS, World, evaluation, evaluations, wait_until

# A gateway that knows only the names of a queue and an actor. It runs Dramatiq's maintenance with every command.
SENDER = """
import json, sys, dramatiq
from dramatiq.brokers.redis import RedisBroker
broker = RedisBroker(url=sys.argv[1], maintenance_chance=1_000_000, heartbeat_timeout=1, dead_message_ttl=1)
for line in sys.stdin:
    message = dramatiq.Message("evaluations", "store_evaluation", (json.loads(line),), {}, {})
    broker.enqueue(message, delay=int(sys.argv[2]) or None)
"""


def send_as_stock(world: World, events: list[dict[str, object]], delay_ms: int = 0) -> None:
    lines = "\n".join(map(json.dumps, events)).encode()
    command = [sys.executable, "-c", SENDER, world.redis_url, str(delay_ms)]
    subprocess.run(command, input=lines, check=True, cwd=ROOT, timeout=60)
    world.sent |= {str(event["event_id"]): event for event in events}


def test_a_stock_client_that_cleans_up_all_the_time_takes_nothing_and_loses_nothing(world: World) -> None:
    """Stock: it puts back what any process works on that sent nothing for a second, and drops dead letters when it likes."""
    workers = world.workers(n=2, EVALSTORE_BATCH_EVENTS="100")
    workers.start()
    world.send(evaluations(1000))
    world.raw(b"no message")
    send_as_stock(world, evaluations(300))
    world.send(evaluations(300))
    workers.kill()
    workers.start()
    send_as_stock(world, evaluations(30))
    world.audit(others_dead=["InvalidEvent"])


def test_what_a_stock_client_delays_is_taken_over_and_not_early(world: World) -> None:
    """Stock: held in the memory of one worker until it is due; lost to all others for as long as that process lives."""
    world.workers(n=2).start()
    events, began = evaluations(100), time.monotonic()
    send_as_stock(world, events, delay_ms=2500)
    wait_until(lambda: world.client.llen(KEYS.stock_delayed) == 0, what="they were taken over")
    assert world.applied() == 0 or time.monotonic() - began > 2.5
    world.audit()
    assert time.monotonic() - began > 2.5


def test_a_stock_worker_on_the_same_namespace_leaves_the_rest_to_us(world: World) -> None:
    """A stock worker fetches what it is started for; of what it has not acknowledged, its own kind takes care."""
    stock = RedisBroker(url=world.redis_url, maintenance_chance=1_000_000, heartbeat_timeout=1)
    stock.declare_queue("other")
    worker = dramatiq.Worker(stock, worker_threads=1, worker_timeout=100)
    worker.start()
    workers = world.workers(n=2)
    workers.start()
    world.send(evaluations(1000))
    world.broker.enqueue(world.message(evaluation("delayed")[0]), delay=60_000)
    time.sleep(1)  # Time for Dramatiq's maintenance.
    worker.stop()
    stock.close()
    assert world.client.zcard(KEYS.delayed) == 1
    world.client.delete(KEYS.delayed)
    wait_until(lambda: world.client.hlen(KEYS.bodies) == 1, what="all the others are done with")
    world.client.delete(KEYS.bodies)
    world.audit()
