"""A world for each test: workers of its own, its own database and its own Redis database or server."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from ops.servers import Postgres, Valkey
from tests.chaos.relay import DISPATCH, ROOT, Relay
from tests.chaos.world import World, port_of

Worlds = Callable[..., World]


@pytest.fixture
def worlds(tmp_path: Path) -> Iterator[Worlds]:
    """`worlds(database_url, redis_url)` makes one; its workers end with the test, and their logs show if it failed."""
    made: list[World] = []

    def make(database_url: str, redis_url: str) -> World:
        made.append(World(database_url, redis_url, tmp_path))
        return made[-1]

    yield make
    for world in made:
        world.close()
        for workers in world.fleet:
            if workers.log.exists():
                print(f"--- {workers.log.name}\n{workers.log.read_text(errors='replace')[-6000:]}")


@pytest.fixture
def world(worlds: Worlds, database_url: str, redis_url: str) -> World:
    """On the servers that all tests share."""
    return worlds(database_url, redis_url)


@pytest.fixture
def relay(redis_url: str) -> Iterator[Relay]:
    """Between workers and Redis, which knows our scripts already."""
    with redis.Redis.from_url(redis_url) as client:
        for path in [*ROOT.glob("worker/lua/*.lua"), *ROOT.glob("tasks/lua/*.lua"), DISPATCH]:
            client.script_load(path.read_text())
    with Relay(port_of(redis_url)) as made:
        yield made


@pytest.fixture
def own_world(worlds: Worlds, database_url: str, valkey_server: Valkey) -> World:
    """With a Redis of its own, to kill."""
    return worlds(database_url, valkey_server.url())


@pytest.fixture
def own_postgres(postgres_server: Postgres) -> Postgres:
    """A PostgreSQL of its own, to kill, with our tables."""
    from storage.migrations import upgrade  # noqa: PLC0415

    upgrade(postgres_server.url())
    return postgres_server
