"""An outage of PostgreSQL costs nothing but time; what looks like one but is a message's fault costs that message alone."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from uuid_utils.compat import uuid7

from evalstore.local.servers import Postgres
from evalstore.storage import migrations
from tasks.actor import EventActor
from tasks.broker import SendingBroker
from tasks.keys import QUEUE

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def database(postgres_server: Postgres) -> Postgres:
    migrations.upgrade(postgres_server.url())
    return postgres_server


@pytest.fixture
def start(database: Postgres, redis_url: str, tmp_path: Path) -> Iterator[Start]:
    """Start a worker; its log is `worker.log`."""
    started = []

    def begin(**environment: str) -> subprocess.Popen[str]:
        addresses = {"EVALSTORE_DATABASE_URL": database.url(), "EVALSTORE_REDIS_URL": redis_url}
        with (tmp_path / "worker.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dramatiq", "worker.tasks", "-p", "1", "-t", "2"],
                env={**os.environ, **addresses, **environment},
                stderr=log,
                text=True,
            )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def event(eval_id: str, kind: str = "started", **fields: Any) -> dict[str, Any]:
    return {"type": f"evaluation:{kind}", "eval_id": eval_id, "event_id": str(uuid7()), **fields}


def send(broker: SendingBroker, *events: dict[str, Any]) -> None:
    actor = EventActor("store_evaluation", QUEUE)
    broker.enqueue_many([actor.message(one) for one in events])


def rows(database: Postgres, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(database.url(), autocommit=True) as conn:
        return conn.execute(sql.SQL(query)).fetchall()


def stored(database: Postgres) -> int:
    return int(rows(database, "SELECT count(*) FROM evaluation_events")[0][0])


class Sender(threading.Thread):
    """Sends 500 events a second until told to stop."""

    def __init__(self, broker: SendingBroker) -> None:
        super().__init__(daemon=True)
        self.sent = 0
        self._broker = broker
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.1):
            send(self._broker, *(event(f"e{self.sent + n}") for n in range(50)))
            self.sent += 50

    def stop(self) -> None:
        self._done.set()
        self.join()


def memory(process: subprocess.Popen[str]) -> int:
    """Of the process that stores, in bytes."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    pages = max(int(Path(f"/proc/{child}/statm").read_text().split()[1]) for child in children)
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def killed(database: Postgres) -> Iterator[None]:
    database.kill()
    yield
    database.start()


@contextlib.contextmanager
def frozen(database: Postgres) -> Iterator[None]:
    database.freeze()
    yield
    database.thaw()


@contextlib.contextmanager
def read_only(database: Postgres) -> Iterator[None]:
    for value in ("on", "off"):
        with psycopg.connect(database.url("postgres"), autocommit=True, options="-c default_transaction_read_only=off") as conn:
            conn.execute(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
            conn.execute("SELECT pg_reload_conf()")
        if value == "on":
            yield


@pytest.mark.parametrize("outage", [killed, frozen, read_only])
def test_an_outage_costs_nothing_but_time(
    outage: Callable[[Postgres], contextlib.AbstractContextManager[None]],
    database: Postgres,
    broker: SendingBroker,
    start: Start,
    tmp_path: Path,
    eventually: Callable[..., None],
) -> None:
    seconds = float(os.environ.get("EVALSTORE_OUTAGE_S", "12"))
    worker = start()
    sender = Sender(broker)
    sender.start()
    eventually(lambda: stored(database) > 100, within_s=20)

    with outage(database):
        time.sleep(min(5, seconds / 2))
        before = memory(worker)
        time.sleep(seconds - min(5, seconds / 2))
        assert memory(worker) < before + 20e6
    back = time.monotonic()
    then = stored(database)
    eventually(lambda: stored(database) > then, within_s=5, what="storing goes on within 5 s of the return")

    assert time.monotonic() - back < 6
    sender.stop()
    eventually(lambda: stored(database) == sender.sent, within_s=20 + seconds / 5)
    assert rows(database, "SELECT count(*) FROM dead_letters") == [(0,)]
    assert broker.counts(QUEUE)["dead"] == 0
    log = (tmp_path / "worker.log").read_text()
    assert log.count("until it is over") <= 6, log  # Once for each batch that waits and for the background thread.
    assert worker.poll() is None


@pytest.mark.parametrize("outage", [killed, frozen])
def test_a_worker_stops_within_seconds_during_an_outage_and_leaves_all_in_the_queue(
    outage: Callable[[Postgres], contextlib.AbstractContextManager[None]],
    database: Postgres,
    broker: SendingBroker,
    start: Start,
    eventually: Callable[..., None],
) -> None:
    worker = start()
    send(broker, event("first"))
    eventually(lambda: stored(database) == 1, within_s=20)

    with outage(database):
        send(broker, *(event(f"e{n}") for n in range(5000)))
        eventually(lambda: broker.counts(QUEUE)["inflight"] > 0, within_s=20)
        worker.send_signal(signal.SIGTERM)
        stopping = time.monotonic()
        assert worker.wait(timeout=30) == 0
        assert time.monotonic() - stopping < 12
        assert broker.counts(QUEUE) == {"ready": 5000, "inflight": 0, "delayed": 0, "dead": 0}

    start()
    eventually(lambda: stored(database) == 5001, within_s=20)


SINKS = """
CREATE FUNCTION sinks() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.eval_id = 'culprit' THEN {what}; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER sinks BEFORE INSERT ON evaluations FOR EACH ROW EXECUTE FUNCTION sinks();
"""


@pytest.mark.parametrize(
    ("what", "error_class"),
    [
        ("RAISE EXCEPTION 'out of memory' USING ERRCODE = '53200'", "DatabaseOutage"),
        ("RAISE EXCEPTION 'it breaks a rule' USING ERRCODE = '23514'", "CheckViolation"),
    ],
    ids=["runs out of memory", "violates a constraint"],
)
def test_one_message_that_fails_each_time_dies_alone(
    what: str, error_class: str, database: Postgres, broker: SendingBroker, start: Start, eventually: Callable[..., None]
) -> None:
    with psycopg.connect(database.url(), autocommit=True) as conn:
        conn.execute(SINKS.format(what=what).encode())
    others = [event(f"e{n}") for n in range(300)]
    send(broker, *others[:150], event("culprit"), *others[150:])

    start()

    eventually(lambda: stored(database) == 300, within_s=90)
    eventually(
        lambda: rows(database, "SELECT eval_id, error_class FROM dead_letters") == [("culprit", error_class)], within_s=60
    )


# The server process ends as after an out-of-memory kill, and PostgreSQL restarts all processes.
CRASHES = "COPY (SELECT 1) TO PROGRAM 'kill -KILL $PPID'"


def test_one_message_over_which_postgresql_crashes_dies_alone(
    database: Postgres, broker: SendingBroker, start: Start, eventually: Callable[..., None]
) -> None:
    with psycopg.connect(database.url(), autocommit=True) as conn:
        conn.execute(SINKS.format(what=CRASHES).encode())
    send(broker, *(event(f"e{n}") for n in range(8)), event("culprit"), *(event(f"f{n}") for n in range(8)))

    start()
    start()

    eventually(lambda: not any(broker.counts(QUEUE).values()), within_s=180)
    assert stored(database) == 16
    assert rows(database, "SELECT eval_id FROM dead_letters") == [("culprit",)]


def test_a_lock_that_somebody_keeps_holds_up_only_the_events_that_need_it(
    database: Postgres, broker: SendingBroker, start: Start, eventually: Callable[..., None]
) -> None:
    send(broker, event("held", "queued", code="1"))
    start()
    eventually(lambda: stored(database) == 1, within_s=20)
    with psycopg.connect(database.url()) as holder:
        holder.execute("SELECT FROM evaluations WHERE eval_id = 'held' FOR UPDATE")

        send(broker, *(event(f"e{n}") for n in range(200)), event("held"), *(event(f"e{n}") for n in range(200, 400)))
        eventually(lambda: stored(database) == 401, within_s=10, what="the others are stored once the wait is over")
        # From now on without waiting.
        send(broker, *(event(f"f{n}") for n in range(100)), event("held", "cancelled"), *(event(f"g{n}") for n in range(100)))
        eventually(lambda: stored(database) == 601, within_s=3, what="the others are stored at once")
        eventually(lambda: broker.counts(QUEUE)["delayed"] == 2, within_s=5)
    eventually(lambda: stored(database) == 603, within_s=10, what="what waited is stored when the lock is gone")
    assert rows(database, "SELECT status, version FROM evaluations WHERE eval_id = 'held'") == [("cancelled", 3)]
    assert rows(database, "SELECT count(*) FROM dead_letters") == [(0,)]


def test_a_time_limit_of_ours_is_no_outage_of_the_server(
    database: Postgres, broker: SendingBroker, start: Start, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    send(broker, event("first"))
    start()
    eventually(lambda: stored(database) == 1, within_s=20)
    with psycopg.connect(database.url()) as holder:
        holder.execute("LOCK TABLE evaluation_events IN SHARE MODE")
        send(broker, event("waits"))
        log = tmp_path / "worker.log"
        eventually(lambda: "exceeded a time limit" in log.read_text(), within_s=20, what="the wait for the lock ends")
        seen: Any = broker.client.hvals(broker.keys(QUEUE).workers)
    eventually(lambda: stored(database) == 2, within_s=20, what="it is stored once the table is free")
    assert "until it is over" not in log.read_text()
    assert all(json.loads(value.partition(b" ")[2])["away"] == [] for value in seen)


def test_the_breaker_opens_when_most_turns_bad_and_closes_when_one_is_stored(
    database: Postgres, broker: SendingBroker, start: Start, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    with psycopg.connect(database.url(), autocommit=True) as conn:
        conn.execute(SINKS.format(what="RAISE EXCEPTION 'a bad release'").replace("= 'culprit'", "LIKE 'bad%'").encode())
    send(broker, *(event(f"bad{n}") for n in range(1000)), *(event(f"good{n}") for n in range(1000)))

    start(EVALSTORE_BATCH_EVENTS="200", EVALSTORE_BREAKER_MESSAGES="100", EVALSTORE_BREAKER_PROBE_S="1")

    # The breaker opened, and the messages tried since were bad.
    eventually(lambda: (tmp_path / "worker.log").read_text().count("the breaker is open") >= 3, within_s=30)
    assert rows(database, "SELECT count(*) < 20 FROM dead_letters") == [(True,)]
    assert broker.counts(QUEUE)["ready"] > 1000

    with psycopg.connect(database.url(), autocommit=True) as conn:
        conn.execute("DROP TRIGGER sinks ON evaluations")
    eventually(lambda: "the breaker is closed" in (tmp_path / "worker.log").read_text(), within_s=30)
    eventually(lambda: stored(database) + rows(database, "SELECT count(*) FROM dead_letters")[0][0] == 2000, within_s=30)
