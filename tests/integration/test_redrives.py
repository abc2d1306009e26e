"""Dead letters sent again: each once, whoever asks, in whatever way a worker dies meanwhile, and what comes of it is known."""

import json
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import Engine

from evalstore.storage import dead_letters, redrives
from evalstore.storage.dead_letters import DeadLetterInsert, Selection
from evalstore.storage.operator_actions import Intent
from evalstore.storage.redrives import Pace
from models.settings import Settings
from tests.chaos.world import World, wait_until
from tests.integration.shell import (
    JOBS,
    KEYS,
    SMALL,
    Operator,
    body,
    bury,
    counts,
    dead_by,
    dying,
    event,
    states,
)
from worker import redrive_job as work
from worker.broker import Broker
from worker.dead_letter_mover import move


def test_after_a_fix_a_redrive_stores_all(world: World, operator: Operator) -> None:
    dead_by(world, operator, world.workers(**SMALL), [event(number) for number in range(60)])
    world.workers().start()
    done = operator.dlq("redrive", "--error-class", "InvalidEvent", "--canary", "3", "--yes", "--reason", "fixed", "-o", "json")
    assert done.status == 0, done.err
    redrive = done.json
    assert counts(redrive) == {"state": "done", "total": 60, "sent": 60, "stored": 60, "died": 0, "returned": 0}
    assert (redrive["actor"], redrive["reason"]) == ("ada", "fixed")
    assert states(operator) == {"stored": 60}
    assert {letter["redrives"] for letter in operator.letters()} == {1}
    assert world.applied() == 60
    assert operator.dlq("ls").status == 0
    assert len(operator.dlq("ls", "--state", "stored", "-o", "jsonl").out.splitlines()) == 60
    (action,) = operator.rows("SELECT * FROM operator_actions")
    assert (action["actor"], action["verb"], action["reason"], action["count"]) == ("ada", "redrive", "fixed", 60)
    assert action["filter"] == {"error_class": "InvalidEvent", "canary": 3}
    assert str(action["redrive"]) == redrive["id"]


def test_an_event_whose_id_was_taken_is_stored_once_that_is_mended(world: World, operator: Operator) -> None:
    workers = world.workers()
    workers.start()
    world.send([event(1)])
    wait_until(lambda: world.applied() == 1, what="the first is stored")
    world.raw(body(world, event(1, output="another")))
    wait_until(lambda: len(operator.letters()) == 1, what="the other is a dead letter")
    letter = str(operator.letters()[0]["id"])
    again = operator.dlq("redrive", letter, "--yes", "-o", "json")
    assert (again.status, again.json["died"]) == (1, 1)
    assert [(one["state"], one["deliveries"]) for one in operator.letters()] == [("dead", 2)]
    with psycopg.connect(world.database_url) as conn:
        conn.execute("DELETE FROM evaluation_events")
        conn.execute("DELETE FROM evaluations")
    assert operator.dlq("redrive", letter, "--yes").status == 0
    assert [(one["state"], one["redrives"]) for one in operator.letters()] == [("stored", 2)]


def test_without_a_fix_the_canary_stops_a_redrive_and_the_others_are_as_they_were(world: World, operator: Operator) -> None:
    workers = world.workers(**SMALL)
    dead_by(world, operator, workers, [event(number) for number in range(40)])
    workers.start()
    done = operator.dlq("redrive", "--all", "--canary", "4", "--yes", "-o", "json")
    assert done.status == 1
    assert "stopped" in done.err
    assert counts(done.json) == {"state": "stopped", "total": 40, "sent": 4, "stored": 0, "died": 4, "returned": 36}
    assert Counter((one["state"], one["deliveries"], one["redrives"]) for one in operator.letters()) == {
        ("dead", 2, 1): 4,
        ("dead", 1, 0): 36,
    }
    (listed,) = operator.dlq("redrives", "-o", "json").json
    assert listed == done.json
    assert operator.dlq("redrives", listed["id"][:8], "-o", "json").json == listed
    assert operator.dlq("redrive", "--all", "--max-redrives", "1", "--dry-run", "-o", "json").json[0]["count"] == 36


def test_two_operators_at_once_send_each_message_once(world: World, operator: Operator, engine: Engine) -> None:
    bury(engine, world, 300)
    world.workers(n=2).start()
    running = [operator.start("redrive", "--all", "--yes", "-o", "json") for _ in range(3)]
    ended = [(*process.communicate(timeout=60), process.returncode) for process in running]
    totals = [json.loads(out)["total"] for out, _, status in ended if status == 0 and out]
    assert sum(totals) == 300, ended
    assert {status for *_, status in ended} <= {0, 3}
    assert Counter((one["state"], one["redrives"], one["deliveries"]) for one in operator.letters()) == {("stored", 1, 1): 300}
    assert world.applied() == 300
    assert sum(one["sent"] for one in operator.rows("SELECT sent FROM redrives")) == 300


def test_the_second_redrive_waits_and_finds_no_letters_to_claim(world: World, operator: Operator, engine: Engine) -> None:
    bury(engine, world, 5)
    second: list[Future[tuple[UUID | None, int]]] = []
    waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"

    def claim(accept: Callable[[int], bool]) -> tuple[UUID | None, int]:
        with engine.connect() as conn:
            return dead_letters.redrive(conn, Selection(), Intent("redrive", "ada", None, {}), Pace(), accept=accept)

    def while_another_comes(_: int) -> bool:
        second.append(threads.submit(claim, lambda _: True))
        wait_until(lambda: second[0].done() or operator.rows(waiting), what="the other waits")
        return True

    with ThreadPoolExecutor() as threads:
        assert claim(while_another_comes)[1] == 5
        assert second[0].result() == (None, 0)
    assert [row["total"] for row in operator.rows("SELECT total FROM redrives")] == [5]


def test_a_letter_that_a_worker_sent_and_died_before_it_said_so_was_redriven_once(
    world: World, operator: Operator, engine: Engine
) -> None:
    bury(engine, world, 1)
    with engine.connect() as conn:
        dead_letters.redrive(conn, Selection(), Intent("redrive", "ada", None, {}), Pace())
        for _ in range(2):  # The same outcome twice.
            redrives.stored(conn, [operator.letters()[0]["id"]])
    (letter,) = operator.letters()
    assert (letter["state"], letter["redrives"]) == ("stored", 1)


def test_a_redrive_goes_on_after_its_worker_was_killed(world: World, operator: Operator, engine: Engine) -> None:
    bury(engine, world, 120)
    workers = world.workers()
    workers.start()
    began = time.monotonic()
    assert operator.dlq("redrive", "--all", "--rate", "40/s", "--yes", "--detach").status == 0
    for enough in (20, 60):
        wait_until(lambda enough=enough: states(operator)["stored"] >= enough, what=f"{enough} are stored")  # type: ignore[misc]
        workers.kill()
        workers.start()
    wait_until(lambda: states(operator) == {"stored": 120}, within_s=60, what="all are stored")
    assert time.monotonic() - began > 2.5  # the pace outlives the worker
    assert {(one["redrives"], one["deliveries"]) for one in operator.letters()} == {(1, 1)}
    (redrive,) = operator.dlq("redrives", "-o", "json").json
    assert (redrive["state"], redrive["sent"], redrive["stored"]) == ("done", 120, 120)


@pytest.mark.parametrize("release", ["fixed", "faulty"])
def test_what_was_sent_by_a_worker_that_died_before_it_could_say_so_is_not_sent_again(
    world: World, operator: Operator, engine: Engine, release: str
) -> None:
    bury(engine, world, 30)
    dies, mark = dying(world.folder, script="redrive", when="after")
    workers = world.workers(**dies, **(SMALL if release == "faulty" else {}))
    workers.start()
    running = operator.start("redrive", "--all", "--yes", "-o", "json")
    wait_until(mark.exists, what="it dies")
    wait_until(lambda: world.client.hlen(KEYS.bodies) == 30, what="all are in Redis, and nobody knows")
    workers.kill()
    workers.start()
    out, err = running.communicate(timeout=60)
    assert running.returncode == (0 if release == "fixed" else 1), err
    column, outcome = ("stored", ("stored", 1)) if release == "fixed" else ("died", ("dead", 2))
    assert (json.loads(out)["sent"], json.loads(out)[column]) == (30, 30)
    assert Counter((one["state"], one["deliveries"]) for one in operator.letters()) == {outcome: 30}


def sent_and_killed(engine: Engine, broker: Broker) -> UUID:
    """A redrive of all there is, which a worker sent and died before it could say so."""

    def send_and_die(letters: Sequence[redrives.DeadLetterRef]) -> None:
        work.send(broker, broker.lua, letters)
        raise KeyboardInterrupt

    with engine.connect() as conn:
        redrive_id, _ = dead_letters.redrive(conn, Selection(), Intent("redrive", "ada", None, {}), Pace())
        assert redrive_id
        with pytest.raises(KeyboardInterrupt):
            redrives.step(conn, redrive_id, send_and_die)
    return redrive_id


@pytest.mark.parametrize("moved", ["before", "after"])
def test_a_letter_that_died_again_after_it_was_sent_is_not_sent_twice(
    world: World, operator: Operator, engine: Engine, broker: Broker, moved: str
) -> None:
    bury(engine, world, 3)
    redrive_id = sent_and_killed(engine, broker)
    unacked = broker.unacked("evaluations")
    found = world.client.lpop(KEYS.queue, 3)
    world.client.zadd(unacked, dict.fromkeys(found, 1))
    causes = [part for redis_id in found for part in (redis_id, b"{}")]
    places = [unacked, KEYS.bodies, KEYS.dead, KEYS.dead_bodies, KEYS.causes, KEYS.deaths]
    assert broker.lua.run("dead_letter", places, *causes) == 3
    with engine.connect() as conn:
        assert move(conn, broker, broker.lua) == 3 if moved == "before" else True
        redrives.step(conn, redrive_id, lambda letters: work.send(broker, broker.lua, letters))
        assert world.client.hlen(KEYS.bodies) == 0
        assert move(conn, broker, broker.lua) == (0 if moved == "before" else 3)
    assert Counter((one["state"], one["deliveries"]) for one in operator.letters()) == {("dead", 2): 3}
    (row,) = operator.rows("SELECT * FROM redrives")
    assert (row["sent"], row["died"], row["state"]) == (3, 3, "done")


def test_what_had_left_already_when_it_was_cancelled_is_stored_all_the_same(
    world: World, operator: Operator, engine: Engine, broker: Broker
) -> None:
    bury(engine, world, 3)
    redrive_id = sent_and_killed(engine, broker)
    assert operator.dlq("cancel", redrive_id).status == 0
    assert states(operator) == {"dead": 3}
    world.workers().start()
    wait_until(lambda: states(operator) == {"stored": 3}, what="all are stored")
    assert world.applied() == 3
    (row,) = operator.rows("SELECT * FROM redrives")
    assert (row["returned"], row["stored"], row["state"]) == (3, 0, "cancelled")


def test_a_cancelled_redrive_gives_back_what_it_did_not_send(world: World, operator: Operator, engine: Engine) -> None:
    bury(engine, world, 50)
    world.workers().start()
    redrive = operator.dlq("redrive", "--all", "--rate", "5/s", "--yes", "--detach", "-o", "json").json["id"]
    wait_until(lambda: states(operator)["stored"] >= 2, what="some are stored")
    assert operator.dlq("cancel", redrive, "--reason", "enough").status == 0
    wait_until(lambda: operator.rows("SELECT finished_at FROM redrives")[0]["finished_at"], what="it is finished")
    row = operator.dlq("redrives", redrive, "-o", "json").json
    assert (row["state"], row["stored"] + row["returned"], row["died"]) == ("cancelled", 50, 0)
    assert states(operator) == {"stored": row["stored"], "dead": row["returned"]}
    assert row["stored"] < 25
    assert [one["verb"] for one in operator.dlq("actions", "-o", "json").json] == ["cancel", "redrive"]


def test_a_redrive_whose_job_redis_lost_is_asked_for_again(
    world: World, operator: Operator, engine: Engine, broker: Broker
) -> None:
    bury(engine, world, 10)
    with engine.connect() as conn:  # The operator's terminal dies here.
        dead_letters.redrive(conn, Selection(), Intent("redrive", "ada", None, {}), Pace())
        for asked in (1, 1):
            assert work.sweep(conn, broker, Settings().max_content_bytes)["redrives"] == asked
    assert world.client.hlen(JOBS.bodies) == 1
    world.workers().start()
    wait_until(lambda: states(operator) == {"stored": 10}, what="all are stored")


def test_messages_that_redis_lost_are_dead_letters_again_unless_they_are_stored(
    world: World, operator: Operator, engine: Engine, broker: Broker
) -> None:
    stored, lost, other, waiting = (event(number) for number in range(4))
    ids = bury(engine, world, 4, events=[stored, lost, other, waiting])
    world.send([stored, other | {"output": "what stands under this id is another"}])
    workers = world.workers()
    workers.start()
    wait_until(lambda: world.applied() == 2, what="two are stored")
    workers.stop()
    with engine.connect() as conn:
        redrive_id, _ = dead_letters.redrive(conn, Selection(), Intent("redrive", "ada", None, {}), Pace())
        assert redrive_id
        assert redrives.step(conn, redrive_id, lambda letters: work.send(broker, broker.lua, letters)).sent == 4
    for letter_id in ids[:3]:
        world.client.lrem(KEYS.queue, 0, work.redis_id_of(letter_id).decode())
        world.client.hdel(KEYS.bodies, work.redis_id_of(letter_id).decode())
    with psycopg.connect(world.database_url) as conn:
        conn.execute("UPDATE dead_letters SET sent_at = sent_at - interval '1 minute'")
    with engine.connect() as conn:
        assert work.sweep(conn, broker, Settings().max_content_bytes) == {"redrives": 0, "stored": 1, "dead": 2}
        assert work.sweep(conn, broker, Settings().max_content_bytes) == {"redrives": 0, "stored": 0, "dead": 0}
    found = {one["id"]: one["state"] for one in operator.letters()}
    assert [found[letter_id] for letter_id in ids] == ["stored", "dead", "dead", "redriving"]
    (row,) = operator.rows("SELECT * FROM redrives")
    assert (row["stored"], row["returned"], row["finished_at"]) == (1, 2, None)


def test_ctrl_c_detaches_and_the_redrive_goes_on(world: World, operator: Operator, engine: Engine) -> None:
    bury(engine, world, 20)
    running = operator.start("redrive", "--all", "--yes", start_new_session=True)
    assert running.stderr
    assert running.stderr.readline().startswith("redrive ")
    with psycopg.connect(world.database_url) as conn:  # The interrupt comes during a query.
        conn.execute("LOCK TABLE redrives")
        waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        wait_until(lambda: operator.rows(waits)[0]["count"] == 1, what="it waits for PostgreSQL")
        running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=20)
    assert running.returncode == 0
    redrive = re.findall(r"evalstore dlq redrives (\S+)`", err)[0]
    world.workers().start()
    wait_until(lambda: states(operator) == {"stored": 20}, what="all are stored")
    assert operator.dlq("redrives", redrive, "-o", "json").json["state"] == "done"


def test_a_letter_of_a_job_starts_anew_and_its_outcome_is_recorded(
    world: World, operator: Operator, engine: Engine, broker: Broker
) -> None:
    spent = world.message(None, queue_name="jobs", actor_name="move_dead_letters", args=(), options={"retries": 20, "eta": 1})
    work.send(broker, broker.lua, [redrives.DeadLetterRef(UUID(int=1), "jobs", spent.encode())])
    (sent,) = world.client.hvals(JOBS.bodies)
    assert json.loads(sent) == spent.asdict() | {"args": [], "options": {}}
    world.client.delete(JOBS.queue, JOBS.bodies)
    burial = DeadLetterInsert(
        *(uuid4(), "jobs", "move_dead_letters", None, None, spent.encode(), "ValueError", "once", "", "s", 20),
        *(datetime.now(UTC), None, None),
    )
    with engine.connect() as conn:
        dead_letters.write(conn, [burial])
    world.workers().start()
    done = operator.dlq("redrive", "--all", "--yes")
    assert done.status == 0, done.err
    assert states(operator) == {"stored": 1}
