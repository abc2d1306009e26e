"""A network that drops every packet, both ways, and tells nobody."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from evalstore.local.servers import Postgres, Valkey
from evalstore.storage.migrations import upgrade
from tests.chaos.conftest import Worlds
from tests.chaos.namespaces import Network, in_namespaces
from tests.chaos.relay import STOCK
from tests.chaos.world import KEYS, Workers, World, evaluations, wait_until
from tests.conftest import FAST

POSTGRES, REDIS = Network.SERVERS


@contextmanager
def behind_a_router(worlds: Worlds, folder: Path) -> Iterator[tuple[World, Workers, Network]]:
    """Servers here, and workers, not started yet, that reach each of them by an address of its own."""
    network = Network()
    server = Postgres(folder / "postgres", settings=FAST | {"listen_addresses": "*"})
    with Valkey(folder / "valkey", settings={"bind": "* -::*"}) as valkey, server as postgres:
        upgrade(postgres.url())
        with (postgres.data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 10.0.0.0/8 scram-sha-256\n")
        postgres.stop()
        postgres.start()
        world = worlds(postgres.url(), valkey.url())
        workers = world.workers(
            n=2,
            EVALSTORE_BATCH_EVENTS="200",
            EVALSTORE_DATABASE_URL=postgres.url().replace("127.0.0.1", POSTGRES),
            EVALSTORE_REDIS_URL=valkey.url().replace("127.0.0.1", REDIS),
        )
        workers.prefix = network.command()
        yield world, workers, network
        world.close()
    network.close()


@pytest.mark.skipif(STOCK, reason="it says nothing of what it waits for")
@in_namespaces
def test_dropped_packets_are_noticed_within_10_s_and_cost_nothing_but_time(worlds: Worlds, tmp_path: Path) -> None:
    with behind_a_router(worlds, tmp_path) as (world, workers, network):
        workers.start()
        with world.sending():
            wait_until(lambda: world.applied() > 500, what="work has begun")
            with network.cut(POSTGRES):
                wait_until(world.is_waiting, within_s=12, what="it is noticed within 10 s, and seen at the next beat")
                time.sleep(4)  # Time for several retries.
            goes_on(world)
            with network.cut(REDIS):
                wait_until(lambda: workers.log.read_text().count("Redis refuses") >= 2, within_s=10, what="it is noticed")
                time.sleep(3)
            goes_on(world)
        world.wait_settled()

        with network.cut(POSTGRES):
            world.send(evaluations(500))
            wait_until(lambda: world.client.llen(KEYS.queue) < 1500, what="some are fetched")
            assert workers.stop(within_s=30) < 12
            # A message may have moved to the wake-up list for a process that stopped then.
            assert world.client.llen(KEYS.queue) + world.client.llen(KEYS.woken) == 1500
        workers.start()
        world.audit()


def goes_on(world: World) -> None:
    then = world.applied()
    wait_until(lambda: world.applied() > then, within_s=5, what="storing goes on within 5 s of the return")
