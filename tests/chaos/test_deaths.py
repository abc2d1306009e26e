"""Workers that die, freeze or stop, at every moment at which it hurts."""

import random
import time
from functools import partial

import pytest

from evalstore.local.servers import Postgres, Valkey
from tests.chaos.conftest import Worlds
from tests.chaos.relay import Relay, script
from tests.chaos.world import KEYS, World, evaluation, evaluations, kill, through, wait_until

ELSEWHERE = "another-host|0badcafe|pid:[1]|1|1|0123456789ab"


def test_a_worker_killed_between_commit_and_acknowledgement_stores_nothing_twice(world: World) -> None:
    """Stock: what was fetched stays in the dead process's set until chance maintenance, 13 minutes on average."""
    world.send(evaluations(300) + evaluations(1, "late"))
    workers = world.workers(module="tests.chaos.crashing")
    with workers.supervised():
        world.wait_settled(tend=workers)
    assert list(world.folder.glob("late-*"))
    world.audit()


def test_a_worker_killed_while_its_acknowledgement_is_on_the_way_stores_nothing_twice(
    world: World, relay: Relay, worlds: Worlds
) -> None:
    """Stock: as above."""
    behind = worlds(world.database_url, through(world.redis_url, relay.port))
    workers = behind.workers()
    workers.start()
    relay.lose(script("settle"), "hold", times=10)
    world.send(evaluations(100))
    wait_until(lambda: world.applied() == 300, what="all is committed")
    wait_until(lambda: relay.lost(script("settle")) > 0, what="an acknowledgement is on the way")
    assert not world.settled()
    workers.kill()
    world.workers().start()
    world.audit()


def test_workers_killed_in_the_middle_of_their_batches_lose_nothing(world: World) -> None:
    """Stock: as above; each kill leaves behind what was fetched."""
    workers = world.workers(n=2)
    workers.start()
    for _ in range(4):
        before = world.applied()
        world.send(evaluations(1500))
        wait_until(partial(_more_than, world, before), what="something of it is stored")
        workers.kill()
        workers.start()
    world.audit()


def _more_than(world: World, before: int) -> bool:
    return world.applied() > before


def test_workers_killed_during_start_and_stop_lose_nothing(world: World) -> None:
    """Stock: as above."""
    world.send(evaluations(3000))
    workers = world.workers()
    workers.start()
    for _ in range(5):
        workers.kill()
        workers.start(wait=False)
        time.sleep(random.uniform(0.5, 1.5))  # noqa: S311  the moment of the kill
    workers.kill()
    for _ in range(4):
        workers.start()
        world.send(evaluations(1000))
        workers.ask_to_stop()
        time.sleep(random.uniform(0, 1.5))  # noqa: S311
        workers.kill()
    workers.start()
    world.audit()


def test_what_kills_its_worker_is_found_out_and_nobody_else_dies_with_it(world: World) -> None:
    """Stock: delivered for ever, once in 13 minutes; with it, each time, whatever was fetched together with it."""
    poison = [evaluation("kill-1")[0], evaluation("segfault-1")[0]]
    good = evaluations(200)
    world.send(good[:250] + poison[:1] + good[250:400] + poison[1:] + good[400:])
    workers = world.workers(module="tests.chaos.crashing", EVALSTORE_MAX_DEATHS="2", EVALSTORE_BATCH_EVENTS="40")
    with workers.supervised():
        world.wait_settled(within_s=180, tend=workers)
        world.audit(dead={event["event_id"]: "WorkerDied" for event in poison})


def test_stops_deployments_and_outages_never_count_as_deaths(worlds: Worlds, own_postgres: Postgres, redis_url: str) -> None:
    """Stock: counts nothing."""
    world = worlds(own_postgres.url(), redis_url)
    workers = world.workers(module="tests.chaos.crashing", EVALSTORE_MAX_DEATHS="1")
    for position in range(2):
        world.send(evaluation(f"slow-{position}")[:1])
        workers.start()
        wait_until(lambda: "1" if world.left().get(KEYS.queue, 0) == 0 else "", what="it is being stored")
        workers.stop()
    own_postgres.kill()
    world.send(evaluations(1)[:1])
    for _ in range(3):
        workers.start()
        wait_until(lambda: _states(world) == ["waiting"], what="the worker waits for PostgreSQL")
        workers.kill()
    own_postgres.start()
    workers.start()
    world.audit()
    workers.stop()


def _states(world: World) -> list[str]:
    return sorted({count.decode().partition(":")[0] for count in world.client.hvals(KEYS.processes)})


def test_a_process_that_was_frozen_and_thawed_loses_nothing(world: World) -> None:
    """Stock: the same, as long as it is not frozen for a minute."""
    frozen, other = world.workers(module="tests.chaos.crashing"), world.workers()
    frozen.start()
    world.send(evaluations(1, "slow") + evaluations(500))
    wait_until(lambda: world.left().get(KEYS.queue, 0) == 0, what="it holds all of them")
    frozen.freeze()
    other.start()
    world.wait_settled(within_s=17)
    frozen.thaw()
    world.send(evaluations(500))
    world.audit()
    assert frozen.stop() < 6


def test_what_a_process_on_a_lost_machine_held_is_back_within_15_s_and_first_in_line(world: World) -> None:
    """Stock: after a minute, and then by chance; at the tail."""
    lost = evaluations(20, "lost")
    world.send(lost)
    ids = world.client.lrange(KEYS.queue, 0, -1)
    world.client.delete(KEYS.queue)
    places = {redis_id: 65536 + place for place, redis_id in enumerate(ids)}
    world.client.zadd(KEYS.unacked_prefix + ELSEWHERE, places)
    world.client.hset(KEYS.processes, ELSEWHERE, "working:17")
    world.workers().start()
    began = time.monotonic()
    wait_until(lambda: world.applied() == len(lost), within_s=15, what="what it held is stored")
    assert time.monotonic() - began > 8  # No process can be declared dead earlier.
    world.audit()


@pytest.mark.parametrize("way", ["unthread", "wedge"])
def test_a_process_whose_consumer_thread_died_or_stands_still_ends_with_a_stack_dump(world: World, way: str) -> None:
    """Stock: works on nothing, and looks alive."""
    workers = world.workers(module="tests.chaos.crashing", threads=1)
    workers.start()
    world.send(evaluation(f"{way}-1")[:1])
    wait_until(lambda: not workers.running, what="the process ended")
    assert workers.exit_status == 70
    assert "most recent call first" in workers.log.read_text()
    assert "ended or makes no progress" in workers.log.read_text()


def test_clocks_that_are_a_day_apart_steal_no_work_and_hold_no_job_back(world: World) -> None:
    """Stock: a client whose clock is ahead by over a minute takes what others work on; delayed messages are early or late."""
    fleet = [world.workers(module="tests.chaos.crashing", EVALSTORE_CHAOS_CLOCK_S=ahead) for ahead in ("86400", "-86400")]
    for workers in fleet:
        workers.start()
    world.client.zadd("dramatiq:__heartbeats__", {"a-stock-client": 1, "another": 4e12})
    world.send(evaluations(2000))
    message = world.message("x", queue_name="jobs", actor_name="fail_twice")
    began = time.monotonic()
    world.broker.enqueue(message, delay=2000)
    wait_until(lambda: world.client.llen("runs") == 3, what="the job ran")
    assert 2 < time.monotonic() - began < 10
    world.audit()
    assert not [workers for workers in fleet if "is dead" in workers.log.read_text()]


def test_when_one_of_two_processes_dies_everything_goes_on_after_a_restart(world: World) -> None:
    """Stock: what the dead one held is not worked on."""
    workers = world.workers(n=2, module="tests.chaos.crashing")
    with workers.supervised():
        world.send(evaluations(2000))
        for _ in range(2):
            wait_until(lambda: workers.tend() or len(workers.pids) == 2, what="both run")
            kill(workers.pids[0])
            wait_until(lambda: not workers.running, what="the other one was stopped by Dramatiq")
            workers.start()
        world.audit()


def test_a_job_that_fails_is_tried_again_and_no_attempt_is_lost_with_a_connection(
    world: World, worlds: Worlds, relay: Relay
) -> None:
    """Stock: enqueues the next attempt and acknowledges this one in two steps; where the first fails, the message is gone."""
    behind = worlds(world.database_url, through(world.redis_url, relay.port))
    behind.workers(module="tests.chaos.crashing").start()
    relay.lose(script("retry"), "reply", times=3)
    world.broker.enqueue(world.message("x", queue_name="jobs", actor_name="fail_twice"))
    wait_until(lambda: world.client.llen("runs") == 3, what="it ran three times")
    world.audit()
    assert relay.lost(script("retry")) == 3
    assert world.client.llen("runs") == 3


def test_a_worker_may_start_before_its_redis_does(worlds: Worlds, database_url: str, valkey_server: Valkey) -> None:
    """Stock: its consumers try again every three seconds."""
    world = worlds(database_url, valkey_server.url())
    world.send(evaluations(10))
    valkey_server.stop()
    world.workers().start()
    valkey_server.start()
    world.audit()


def test_long_jobs_hold_up_no_events_and_no_stop(world: World) -> None:
    """Stock: as many as there are threads hold up everything else, and a stop for up to ten minutes."""
    workers = world.workers(module="tests.chaos.crashing", threads=3)
    workers.start()
    for position in range(6):
        world.broker.enqueue(world.message(str(position), queue_name="jobs", actor_name="take_long"))
    wait_until(lambda: world.client.llen("runs") == 2, what="as many as may run do so")
    began = time.monotonic()
    world.send(evaluations(100))
    wait_until(lambda: world.applied() == 300, within_s=5, what="the events are stored")
    world.client.delete("runs")
    workers.ask_to_stop()
    wait_until(lambda: not workers.running, within_s=12, what="it stopped")
    assert time.monotonic() - began < 15
    assert world.client.llen("dramatiq:jobs") == 6
    assert world.client.hlen("evalstore:dramatiq:jobs:processes") == 0
