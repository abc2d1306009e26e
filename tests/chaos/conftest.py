"""A world for each test: workers of its own, its own database and its own Redis database or server."""

from collections.abc import Callable, Iterator

import pytest
import redis

from evalstore.local.servers import Postgres, Valkey
from tests.chaos.relay import DISPATCH, ROOT, Relay
from tests.chaos.world import World, port_of

Worlds = Callable[..., World]


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
    from evalstore.storage.migrations import upgrade  # noqa: PLC0415

    upgrade(postgres_server.url())
    return postgres_server
