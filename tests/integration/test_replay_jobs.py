"""`evalstore replay --background`: jobs of the workers compare and repair records, and survive kills."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from sqlalchemy import Engine

from evalstore.storage import replay_jobs
from tests.chaos.world import World
from tests.integration.shell import Done, Operator
from tests.integration.test_replay import corrupt, events_of, store

Json = dict[str, Any]


@pytest.fixture
def plain(database_url: str) -> Iterator[psycopg.Connection[Json]]:
    with psycopg.connect(database_url, autocommit=True, row_factory=dict_row) as conn:
        yield conn


def fill(engine: Engine, plain: psycopg.Connection[Json], number: int, corrupted: int) -> set[str]:
    """Store that many evaluations, with statistics, and corrupt some; returns those."""
    ids = [f"e{at:05}" for at in range(number)]
    for start in range(0, number, 500):
        store(engine, [one for at in range(start, min(start + 500, number)) for one in events_of(ids[at], at)])
    plain.execute("ANALYZE evaluations")
    chosen = ids[:: number // corrupted][:corrupted]
    for eval_id in chosen:
        corrupt(plain, eval_id, "submitter")
    return set(chosen)


def background(operator: Operator, *words: object) -> Done:
    return operator.evalstore("replay", *words, "--background", "-o", "json")


def shown(operator: Operator, replay_id: str) -> Json:
    return dict(operator.evalstore("replay", "--show", replay_id, "-o", "json").json)


def wait_done(operator: Operator, replay_id: str, eventually: Callable[..., None]) -> Json:
    states = f"SELECT 1 FROM replays WHERE id = '{replay_id}' AND state <> 'running'"
    eventually(lambda: operator.rows(states), within_s=60, what="the replay ends")
    return shown(operator, replay_id)


def test_workers_check_and_repair_in_ranges_and_the_command_shows_how_far_they_are(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json], world: World, eventually: Callable[..., None]
) -> None:
    corrupted = fill(engine, plain, 2000, 20)
    asked = background(operator, "--all", "--parallel", 4)
    assert (asked.status, asked.json["state"], asked.json["ranges"], asked.json["evaluations"]) == (0, "running", 4, 0)
    again = background(operator, "--all")
    assert again.json["id"] == asked.json["id"]
    assert operator.evalstore("status", "-o", "json").json["replays_running"][0]["id"] == asked.json["id"]
    world.workers().start()
    found = wait_done(operator, asked.json["id"], eventually)
    assert (found["state"], found["evaluations"], found["equal"], found["different"]) == ("done", 2000, 1980, 20)
    assert {one["eval_id"] for one in found["differences"]} == corrupted
    assert {one["field"] for one in found["differences"]} == {"submitter"}
    assert operator.evalstore("replay", "--show", asked.json["id"][:8]).status == 1

    written = background(operator, "--all", "--write", "--reason", "a drill", "--rate", 100_000)
    done = wait_done(operator, written.json["id"], eventually)
    assert (done["evaluations"], done["different"], done["unrepairable"]) == (2000, 20, 0)
    assert operator.evalstore("replay", "--show", written.json["id"]).status == 0
    assert operator.evalstore("replay", "--all").status == 0
    listed = operator.evalstore("replay", "--list", "-o", "json").json
    assert [one["id"] for one in listed] == [written.json["id"], asked.json["id"]]
    actions = plain.execute("SELECT actor, reason, count, details FROM operator_actions WHERE verb = 'replay'").fetchall()
    begun = [one for one in actions if one["details"].get("replay") == written.json["id"]]
    assert [(one["actor"], one["reason"], one["count"]) for one in begun] == [("ada", "a drill", 2000)]
    repaired = [one["details"]["eval_id"] for one in actions if "eval_id" in one["details"]]
    assert (set(repaired), len(repaired)) == (corrupted, 20)


def test_after_workers_are_killed_others_go_on_and_each_record_counts_once(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json], world: World, eventually: Callable[..., None]
) -> None:
    fill(engine, plain, 1200, 60)
    replay_id = background(operator, "--all", "--write", "--rate", 300).json["id"]
    for least in (100, 600):
        workers = world.workers()
        workers.start()
        counted = f"SELECT 1 FROM replay_ranges WHERE replay = '{replay_id}' HAVING sum(evaluations) >= {least}"
        eventually(lambda query=counted: operator.rows(query), within_s=30, what=f"{least} records")
        workers.kill()
    assert shown(operator, replay_id)["state"] == "running"
    world.workers().start()
    done = wait_done(operator, replay_id, eventually)
    assert (done["state"], done["evaluations"], done["different"]) == ("done", 1200, 60)
    assert operator.evalstore("replay", "--all").status == 0


def test_a_step_that_two_processes_do_counts_once_and_a_killed_one_loses_no_count(
    engine: Engine, plain: psycopg.Connection[Json], operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupted = fill(engine, plain, 200, 10)
    replay_id = background(operator, "--all", "--write", "--parallel", 1).json["id"]
    [one] = [found for found in _unfinished(engine) if str(found.replay) == replay_id]
    advance = replay_jobs._advance

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(replay_jobs, "_advance", killed)
    with engine.connect() as conn, pytest.raises(Killed):
        replay_jobs.step(conn, *one)
    monkeypatch.setattr(replay_jobs, "_advance", lambda *given: (advance(*given), advance(*given)))
    with engine.connect() as conn:
        plain.execute("UPDATE replays SET paced_until = NULL")
        assert replay_jobs.step(conn, *one) == 0
        plain.execute("UPDATE replays SET paced_until = NULL")
        assert replay_jobs.step(conn, *one) is None
    done = shown(operator, replay_id)
    assert (done["state"], done["evaluations"], done["different"]) == ("done", 200, 10)
    assert {one["eval_id"] for one in done["differences"]} == corrupted


def _unfinished(engine: Engine) -> list[replay_jobs.Range]:
    with engine.connect() as conn:
        return replay_jobs.unfinished(conn)


def test_the_rate_bounds_all_jobs_together(engine: Engine, plain: psycopg.Connection[Json], operator: Operator) -> None:
    fill(engine, plain, 300, 1)
    background(operator, "--all", "--rate", 50, "--parallel", 3)
    ranges, began = _unfinished(engine), time.monotonic()
    with engine.connect() as conn:
        waits = [replay_jobs.step(conn, *one) for one in ranges]
        while time.monotonic() < began + 2.2:
            for one in ranges:
                replay_jobs.step(conn, *one)
    assert [wait_s for wait_s in waits if wait_s == 0] == [0]
    row = plain.execute("SELECT sum(evaluations)::int AS n FROM replay_ranges").fetchone()
    assert row is not None
    assert 100 <= row["n"] <= 150


def test_a_lost_job_is_asked_for_again_and_a_cancelled_replay_ends(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json], world: World, eventually: Callable[..., None]
) -> None:
    fill(engine, plain, 100, 1)
    replay_id = background(operator, "--all").json["id"]
    cancelled = background(operator, "--run-id", "r0").json["id"]
    assert operator.evalstore("replay", "--cancel", cancelled, "--reason", "too late").status == 0
    world.client.flushall()
    world.workers().start()
    assert operator.evalstore("cron", "run", "continue_replays").status == 0
    assert wait_done(operator, replay_id, eventually)["evaluations"] == 100
    assert shown(operator, cancelled)["state"] == "cancelled"
    assert operator.evalstore("replay", "--show", cancelled).status == 1
    action = plain.execute("SELECT verb, reason, details FROM operator_actions WHERE verb = 'cancel'").fetchone()
    assert action == {"verb": "cancel", "reason": "too late", "details": {"replay": cancelled}}


def test_a_record_without_events_is_counted_and_left_as_it_is(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json], world: World, eventually: Callable[..., None]
) -> None:
    fill(engine, plain, 20, 1)
    plain.execute("DELETE FROM evaluation_events WHERE eval_id = 'e00003'")
    world.workers().start()
    replay_id = background(operator, "--all", "--write").json["id"]
    done = wait_done(operator, replay_id, eventually)
    assert (done["evaluations"], done["different"], done["unrepairable"]) == (20, 2, 1)
    assert operator.evalstore("replay", "--show", replay_id).status == 1


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("--background",), 2),
        (("--background", "e9"), 3),
        (("--background", "--all", "--after", "e"), 2),
        (("--show", "no id"), 2),
        (("--show", "00000000"), 3),
        (("--cancel", "00000000"), 3),
        (("--list", "--show", "00000000"), 2),
        (("--list",), 0),
    ],
)
def test_wrong_usage_and_unknown_replays_are_told(operator: Operator, words: tuple[str, ...], status: int) -> None:
    assert operator.evalstore("replay", *words).status == status
