"""PostgreSQL with a streaming standby, which takes over; and with no connection to spare."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from evalstore.local.servers import Postgres, ServerError
from evalstore.storage import database, event_store
from models.events import parse
from tests.chaos.conftest import Worlds
from tests.chaos.world import World, evaluations, wait_until
from tests.conftest import FAST
from tests.sinks import Runner, received


class Standby(Postgres):
    """A copy of a primary, which follows it until it is promoted."""

    def __init__(self, folder: Path, primary: Postgres) -> None:
        super().__init__(folder, settings=FAST)
        self.primary = primary
        folder.mkdir()
        (folder / "password").write_text(primary.password)

    def _create(self, identity: str, binaries: Path) -> None:
        """pg_basebackup, which also writes down whom to follow."""
        from_there = ["--dbname", self.primary.url("postgres"), "--write-recovery-conf", "--checkpoint=fast", "--no-sync"]
        copy = self._run(identity, self.data, binaries / "pg_basebackup", *from_there)
        if copy.wait() != 0:
            raise ServerError(self._with_log(f"pg_basebackup ended with status {copy.returncode}"))

    def promote(self) -> None:
        with psycopg.connect(self.url(), autocommit=True) as conn:
            conn.execute("SELECT pg_promote()")


@pytest.fixture
def standby(own_postgres: Postgres, tmp_path: Path) -> Iterator[Standby]:
    with Standby(tmp_path / "standby", own_postgres) as server:
        yield server


def either(one: Postgres, other: Postgres) -> str:
    """The address of both, whichever may be written to (libpq, "Specifying Multiple Hosts")."""
    hosts = f"127.0.0.1:{one.port},127.0.0.1:{other.port}"
    return one.url().replace(f"127.0.0.1:{one.port}", hosts) + "?target_session_attrs=read-write"


def follows(standby: Standby, world: World) -> bool:
    """Whether it has all that its primary has."""
    with psycopg.connect(standby.url()) as conn:
        return conn.execute("SELECT count(*) FROM evaluation_events").fetchone() == (world.applied(),)


def test_a_worker_on_a_standby_waits_until_it_is_promoted(
    worlds: Worlds, redis_url: str, own_postgres: Postgres, standby: Standby
) -> None:
    world = worlds(standby.url(), redis_url)
    workers = world.workers(n=1)
    workers.start()
    world.send(evaluations(500))
    wait_until(world.is_waiting, what="it is an outage")
    time.sleep(3)  # Time for several retries.
    assert world.is_waiting()
    own_postgres.kill()
    standby.promote()
    wait_until(lambda: world.applied() > 0, within_s=5, what="storing goes on within 5 s")
    world.audit()
    assert workers.stop() < 6


def test_workers_follow_when_the_primary_dies_and_its_standby_is_promoted(
    worlds: Worlds, redis_url: str, own_postgres: Postgres, standby: Standby
) -> None:
    world = worlds(own_postgres.url(), redis_url)
    workers = world.workers(n=2, EVALSTORE_BATCH_EVENTS="200", EVALSTORE_DATABASE_URL=either(own_postgres, standby))
    workers.start()
    world.send(evaluations(500))
    wait_until(lambda: world.applied() == 1500 and follows(standby, world), what="the standby has everything")
    own_postgres.kill()
    world.database_url = standby.url()
    world.send(evaluations(500))
    wait_until(world.is_waiting, what="it is an outage")
    standby.promote()
    wait_until(lambda: world.applied() > 1500, within_s=5, what="storing goes on within 5 s")
    world.audit()


def test_a_sink_gets_everything_though_a_promotion_lost_commits_that_it_had(
    own_postgres: Postgres, standby: Standby, redis_url: str, tmp_path: Path
) -> None:
    table = f'[one]\ntype = "steered"\npath = "{tmp_path / "one"}"\n'
    environment = {"EVALSTORE_DATABASE_URL": either(own_postgres, standby), "EVALSTORE_REDIS_URL": redis_url}
    (tmp_path / "runner").mkdir()
    runner = Runner(tmp_path / "runner", environment, table)
    runner.start()

    def has(expected: set[str]) -> bool:
        return expected <= {line["event_id"] for line in received(tmp_path / "one")}

    def has_all(server: Postgres, events: int) -> bool:
        with psycopg.connect(server.url()) as conn:
            return conn.execute("SELECT count(*) FROM evaluation_events").fetchone() == (events,)

    try:
        kept = stored_at(own_postgres, "kept", 20)
        wait_until(lambda: has(kept) and has_all(standby, 20), what="sink and standby have everything")
        standby.stop()
        lost = stored_at(own_postgres, "lost", 50)
        wait_until(lambda: has(lost), what="the sink has what will be lost")
        own_postgres.kill()
        standby.start()
        standby.promote()
        # The ids of these in the outbox are those that the lost ones had.
        new = stored_at(standby, "new", 30)
        wait_until(lambda: has(new), within_s=30, what="the sink has what the new primary has")
    finally:
        runner.kill()
        print(runner.log.read_text()[-3000:])


def stored_at(server: Postgres, prefix: str, number: int) -> set[str]:
    """Store an event in each of so many commits; returns the events' ids."""
    engine, ids = database.engine(server.url()), [uuid4() for _ in range(number)]
    for at, event_id in enumerate(ids):
        event = {
            "type": "evaluation:started",
            "eval_id": f"{prefix}-{at}",
            "event_id": event_id,
            "occurred_at": "2026-01-01T00:00:00Z",
        }
        with engine.connect() as conn:
            event_store.store(conn, [parse(event)])
    engine.dispose()
    return {str(event_id) for event_id in ids}


def test_workers_leave_a_primary_that_became_read_only_without_breaking_their_connections(
    worlds: Worlds, redis_url: str, own_postgres: Postgres, standby: Standby
) -> None:
    """As some managed services switch over: who stays connected to the old one is refused for ever."""
    world = worlds(own_postgres.url(), redis_url)
    workers = world.workers(n=1, EVALSTORE_BATCH_EVENTS="200", EVALSTORE_DATABASE_URL=either(own_postgres, standby))
    workers.start()
    world.send(evaluations(500))
    wait_until(lambda: world.applied() == 1500 and follows(standby, world), what="the standby has everything")
    with psycopg.connect(own_postgres.url(), autocommit=True) as conn:
        conn.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        conn.execute("SELECT pg_reload_conf()")
    standby.promote()
    world.database_url = standby.url()
    world.send(evaluations(500))
    wait_until(lambda: world.applied() > 1500, within_s=5, what="storing goes on within 5 s")
    world.audit()


def test_no_connection_to_be_had_is_an_outage(worlds: Worlds, redis_url: str, own_postgres: Postgres) -> None:
    world = worlds(own_postgres.url(), redis_url)
    workers = world.workers(n=1)
    with ExitStack() as taken:
        while True:
            try:
                taken.enter_context(psycopg.connect(own_postgres.url()))
            except psycopg.OperationalError:
                break
        workers.start()
        world.send(evaluations(500))
        wait_until(world.is_waiting, what="it is an outage")
        time.sleep(3)  # Time for several retries.
        assert world.is_waiting()
    wait_until(lambda: world.applied() > 0, within_s=5, what="storing goes on within 5 s")
    world.audit()


def test_connections_ended_by_an_administrator_again_and_again_cost_nothing(
    worlds: Worlds, redis_url: str, own_postgres: Postgres
) -> None:
    world = worlds(own_postgres.url(), redis_url)
    workers = world.workers(n=2, EVALSTORE_BATCH_EVENTS="200")
    workers.start()
    with psycopg.connect(own_postgres.url(), autocommit=True) as conn, world.sending():
        give_up = time.monotonic() + 6
        while time.monotonic() < give_up:
            conn.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'evalstore%'")
            time.sleep(0.03)
    world.audit()
