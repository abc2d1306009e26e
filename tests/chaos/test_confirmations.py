"""Confirmations, read by a service while what sends them dies again and again."""

import random
import time

import pytest

from evalstore.local.servers import Valkey
from tests.chaos.relay import STOCK
from tests.chaos.watcher import Watcher
from tests.chaos.world import World


@pytest.mark.skipif(STOCK, reason="it confirms nothing")
def test_every_change_is_confirmed_in_order_while_workers_and_redis_are_killed_at_random(
    own_world: World, valkey_server: Valkey
) -> None:
    seed = random.randrange(10**6)  # noqa: S311
    print(f"seed {seed}")
    chance = random.Random(seed)  # noqa: S311
    world, fleet = own_world, [own_world.workers(n=1, EVALSTORE_BATCH_EVENTS="100") for _ in range(2)]
    for workers in fleet:
        workers.start()
    watcher = Watcher(world)
    watcher.start()
    until = time.monotonic() + 25
    with world.sending():
        while time.monotonic() < until:
            time.sleep(chance.uniform(0.2, 1.5))
            if chance.random() < 0.4:
                valkey_server.kill()
                valkey_server.start()
            else:
                victim = chance.choice(fleet)
                victim.kill()
                victim.start(wait=False)
    for workers in fleet:
        workers.tend()
    world.audit()
    watcher.audit()
    print(f"{len(watcher.seen)} evaluations, {watcher.outages} outages")
