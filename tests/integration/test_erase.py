"""`evalstore erase` and DELETE: nothing is left of an evaluation, nothing comes back, and others keep what they share."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import redis
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row
from sqlalchemy import Engine

from evalstore.local.servers import Postgres
from evalstore.objects import object_store
from evalstore.objects.object_store import Store
from evalstore.storage import database, event_store, event_writer, tombstones
from models import Event
from models.content import Reference
from models.events import parse
from models.settings import Settings
from tasks.keys import Names
from tasks.uploads import Uploader
from tests.chaos.relay import ROOT
from tests.chaos.world import World, wait_until
from tests.conftest import new_database
from tests.integration.shell import KEYS, Done, Operator, bury

Json = dict[str, Any]
NAMES = Names("dramatiq")
URL = "/storage/evaluations"
DIES = """
import os, signal, sys
from importlib import import_module
module, name, when = sys.argv[1:4]
room = import_module(module)
step = getattr(room, name)
def dying(*args, **given):
    if when == "after":
        step(*args, **given)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(room, name, dying)
sys.argv = ["evalstore", "erase", "e", "--reason", "asked for", "--yes"]
from evalstore.cli.app import main
main()
"""
STEPS = [
    *("evalstore.storage.tombstones:keep", "evalstore.storage.tombstones:add", "evalstore.storage.dead_letters:erase"),
    *("evalstore.telemetry.queues:forget_dead_letters", "evalstore.storage.erasure:_delete"),
    "evalstore.telemetry.queues:forget_evaluation",
    "evalstore.storage.erasure:_delete_objects",
]


@pytest.fixture
def plain(database_url: str) -> Iterator[psycopg.Connection[Json]]:
    with psycopg.connect(database_url, autocommit=True, row_factory=dict_row) as conn:
        yield conn


@pytest.fixture(params=["few", "many"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_writer, "_PIPELINE_ROWS", 64 if request.param == "few" else 0)


@pytest.fixture(params=["directory", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path, operator: Operator) -> Iterator[Store]:
    """An object store, which the operator's commands use as well."""
    url = f"file://{tmp_path}/objects"
    endpoint = None
    if request.param == "bucket":
        url, endpoint = request.getfixturevalue("s3_url"), request.getfixturevalue("s3_server").endpoint
        operator.env |= {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
        operator.env["EVALSTORE_S3_ENDPOINT_URL"] = endpoint
    operator.env["EVALSTORE_OBJECT_STORE_URL"] = url
    made = object_store.open_store(url, Settings(object_store_url=url, s3_endpoint_url=endpoint))
    yield made
    made.close()


def fields(type_: str, number: int, *, eval_id: str = "e", **more: Any) -> Json:
    required: dict[str, Json] = {"queued": {"code": "c"}, "completed": {"exit_code": 0}}
    named = {"type": f"evaluation:{type_}", "eval_id": eval_id, "event_id": str(UUID(int=number))}
    return {**named, "occurred_at": "2026-01-01T00:00:00Z", **required.get(type_, {}), **more}


def event(type_: str, number: int, **more: Any) -> Event:
    return parse(fields(type_, number, **more))


def put(engine: Engine, events: Sequence[Event]) -> list[str]:
    with engine.connect() as conn:
        return list(event_store.store(conn, events).outcomes)


def erase(operator: Operator, *words: str) -> Done:
    return operator.evalstore("erase", *words, "--reason", "asked for", "--yes", "-o", "json")


def left(plain: psycopg.Connection[Json], eval_id: str = "e") -> Json:
    """How many rows name an evaluation, by table."""
    tables = ("evaluations", "evaluation_events", "contents", "dead_letters")
    counts = {}
    for table in tables:
        row = plain.execute(f"SELECT count(*) AS n FROM {table} WHERE eval_id = %s".encode(), [eval_id]).fetchone()
        assert row is not None
        counts[table] = row["n"]
    return {table: count for table, count in counts.items() if count}


def keys_of(store: Store) -> set[str]:
    return {one.key for one in store.objects()}


def referring(store: Store, text: bytes) -> tuple[Reference, Json]:
    reference = object_store.put(store, text).reference
    return reference, {"sha256": reference.sha256, "size": reference.size, "encoding": reference.encoding}


def test_nothing_is_left_of_an_erased_evaluation_and_others_keep_a_shared_object(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json], store: Store, world: World, redis_url: str
) -> None:
    own, own_ref = referring(store, os.urandom(5000))
    shared, shared_ref = referring(store, os.urandom(5000))
    put(engine, [event("queued", 1, code="x" * 5000), event("completed", 2, output_ref=own_ref, error_ref=shared_ref)])
    put(engine, [event("completed", 3, eval_id="other", output_ref=shared_ref)])
    bury(engine, world, 1, events=[fields("queued", 9)])
    client = redis.Redis.from_url(redis_url)
    client.set(NAMES.cached_record("e"), "cached")
    client.set(NAMES.given_time("e", str(UUID(int=1))), "2026-01-01T00:00:00Z")
    operator.env["EVALSTORE_SWEEP_GRACE_DAYS"] = "0.00000001"
    done = erase(operator, "e")
    assert (done.status, done.json) == (
        0,
        {"evaluations": 1, "events": 2, "dead_letters": 1, "objects": 1, "objects_left": 0},
    )
    assert left(plain) == {}
    assert keys_of(store) == {shared.key}
    assert own.key != shared.key
    assert not client.exists(NAMES.cached_record("e"), NAMES.given_time("e", str(UUID(int=1))))
    assert operator.evalstore("get", "e").status == 3
    assert operator.evalstore("archive", "verify").status == 0
    told = plain.execute("SELECT body FROM confirmations ORDER BY id DESC LIMIT 1").fetchone()
    assert told is not None
    confirmed = json.loads(told["body"])
    assert (confirmed["type"], confirmed["eval_id"], confirmed["version"]) == ("storage:evaluation:erased", "e", 2)
    actions = plain.execute("SELECT actor, verb, reason, details FROM operator_actions").fetchall()
    details = {"eval_id": "e", "events": 2, "dead_letters": 1}
    assert actions == [{"actor": "ada", "verb": "erase", "reason": "asked for", "details": details}]
    tombs = plain.execute("SELECT digest FROM tombstones").fetchall()
    assert {one["digest"].hex() for one in tombs} | {"key"} == set(store.notes(tombstones.FOLDER))
    again = erase(operator, "e")
    assert (again.status, again.json["evaluations"]) == (0, 0)


def test_an_object_that_was_touched_lately_is_left_to_the_sweep_which_is_said(
    operator: Operator, engine: Engine, store: Store
) -> None:
    reference, given = referring(store, os.urandom(5000))
    put(engine, [event("completed", 1, output_ref=given)])
    done = erase(operator, "e")
    assert (done.status, done.json["objects"], done.json["objects_left"]) == (0, 0, 1)
    assert "sweep" in done.err
    assert keys_of(store) == {reference.key}


@pytest.mark.usefixtures("both_ways")
def test_late_events_of_an_erased_evaluation_are_not_stored(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json]
) -> None:
    put(engine, [event("queued", 1), event("queued", 1, eval_id="f")])
    assert erase(operator, "e").status == 0
    late = [
        event("queued", 1),
        event("started", 2, eval_id="f"),
        event("completed", 3),
        event("completed", 3),
        event("queued", 4, eval_id="g"),
    ]
    assert put(engine, late) == ["erased", "applied", "erased", "erased", "applied"]
    assert left(plain) == {}
    row = plain.execute("SELECT count(*) AS n FROM evaluations").fetchone()
    assert row == {"n": 2}


def test_without_a_reason_or_a_choice_it_is_wrong_usage(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json]
) -> None:
    put(engine, [event("queued", 1)])
    for words in (
        ("e", "--yes"),
        ("e", "--yes", "--reason", " "),
        ("--yes", "--reason", "r"),
        ("e", "--run-id", "r", "--reason", "r"),
    ):
        assert operator.evalstore("erase", *words).status == 2
    assert operator.evalstore("erase", "e", "--reason", "r").status == 5
    assert left(plain)


def test_an_id_that_never_was_is_told_and_leaves_no_tombstone(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json]
) -> None:
    assert erase(operator, "never").status == 3
    assert erase(operator, "--submitter", "nobody").status == 3
    assert plain.execute("SELECT count(*) AS n FROM tombstones").fetchone() == {"n": 0}
    put(engine, [event("queued", 1)])
    assert erase(operator, "e", "never").status == 4
    assert plain.execute("SELECT count(*) AS n FROM tombstones").fetchone() == {"n": 1}


def test_by_submitter_or_run_what_exists_now_is_erased_and_a_dry_run_lists_it(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json]
) -> None:
    names = [("a", "s", "r"), ("b", "s", "q"), ("c", "t", "r"), ("d", "t", "q")]
    put(engine, [event("queued", 1, eval_id=eval_id, submitter=who, run_id=run) for eval_id, who, run in names])
    dry = operator.evalstore("erase", "--submitter", "s", "--dry-run", "-o", "json")
    assert (dry.status, dry.json) == (0, [{"eval_id": "a"}, {"eval_id": "b"}])
    assert erase(operator, "--submitter", "s").json["evaluations"] == 2
    assert erase(operator, "--run-id", "r").json["evaluations"] == 1
    assert plain.execute("SELECT eval_id FROM evaluations").fetchall() == [{"eval_id": "d"}]
    assert put(engine, [event("queued", 2, eval_id="z", submitter="s")]) == ["applied"]


def test_it_refuses_while_a_worker_of_an_older_release_runs(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json], redis_url: str
) -> None:
    put(engine, [event("queued", 1)])
    client = redis.Redis.from_url(redis_url)
    now_ms = int(datetime.now(UTC).timestamp() * 1000)
    client.hset(KEYS.workers, "old", f"{now_ms} " + json.dumps({"host": "h", "pid": 7, "events_per_s": 0}))
    done = erase(operator, "e")
    assert (done.status, "h 7" in done.err) == (1, True)
    assert left(plain) == {"evaluations": 1, "evaluation_events": 1}
    client.hset(KEYS.workers, "old", f"{now_ms} " + json.dumps({"host": "h", "pid": 7, "revision": "0012"}))
    assert erase(operator, "e").status == 0


@pytest.mark.parametrize(("name", "status"), [("evalstore", 1), ("evalstore 0011", 1), ("evalstore 0012", 0), ("psql", 0)])
def test_it_refuses_while_any_other_process_of_an_older_release_is_connected(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json], database_url: str, name: str, status: int
) -> None:
    """An API process sends no heartbeat. Its connections tell which tables it knows."""
    put(engine, [event("queued", 1)])
    with psycopg.connect(database_url, application_name=name):
        done = erase(operator, "e")
    assert (done.status, "older release" in done.err) == (status, bool(status))
    assert bool(left(plain)) == bool(status)


def test_dead_letters_that_still_lie_in_redis_go_as_well(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json], world: World
) -> None:
    put(engine, [event("queued", 1)])
    for redis_id, eval_id in (("a", "e"), ("b", "other"), ("c", "e")):
        _die_in_redis(world, redis_id, fields("completed", 5, eval_id=eval_id))
    world.client.hset(KEYS.dead_bodies, "d", b"no message")
    done = erase(operator, "e")
    assert (done.status, done.json["dead_letters"]) == (0, 2)
    assert set(world.client.hkeys(KEYS.dead_bodies)) == {b"b", b"d"}
    assert [world.client.zrange(KEYS.dead, 0, -1), world.client.hkeys(KEYS.causes)] == [[b"b"], [b"b"]]
    # A letter that died meanwhile is not moved to the table.
    _die_in_redis(world, "late", fields("completed", 6))
    world.client.hdel(KEYS.dead_bodies, "d")
    world.workers().start()
    wait_until(lambda: not world.client.hlen(KEYS.dead_bodies), what="the letters are moved")
    assert left(plain) == {}
    assert left(plain, "other") == {"dead_letters": 1}


def _die_in_redis(world: World, redis_id: str, given: Json) -> None:
    world.client.hset(KEYS.dead_bodies, redis_id, world.message(given).encode())
    world.client.hset(KEYS.causes, redis_id, json.dumps({"error_class": "InvalidEvent"}))
    world.client.zadd(KEYS.dead, {redis_id: datetime.now(UTC).timestamp() * 1000})


@pytest.mark.parametrize("age", [0.49, 30.0], ids=["younger than half the grace", "old"])
def test_an_object_that_a_sender_has_just_found_stays_and_its_event_is_whole(
    operator: Operator, engine: Engine, world: World, tmp_path: Path, eventually: Callable[..., None], age: float
) -> None:
    """The sender has not sent its event yet when the only evaluation that names the object is erased."""
    url, content = f"file://{tmp_path}/objects", "x" * 100_000
    operator.env["EVALSTORE_OBJECT_STORE_URL"] = url
    made = object_store.open_store(url, Settings())
    reference, given = referring(made, content.encode())
    put(engine, [event("completed", 1, output_ref=given)])
    [path] = (tmp_path / "objects").rglob(f"{reference.sha256}*")

    def grow_older(by: float) -> None:
        then = path.stat().st_mtime - by * Settings().sweep_grace_days * 86_400
        os.utime(path, (then, then))

    grow_older(age)
    found = fields("completed", 2, eval_id="later", output=content)
    Uploader(Settings(object_store_url=url)).offload([found])
    assert found["output_ref"] == given
    grow_older(0.1)
    done = erase(operator, "e")
    assert (done.json["objects"], done.json["objects_left"]) == (0, 1)
    world.workers(EVALSTORE_OBJECT_STORE_URL=url).start()
    world.send([found])
    eventually(lambda: operator.evalstore("get", "later").status == 0, within_s=30, what="the event is stored")
    assert operator.evalstore("get", "later", "--output").out == content
    assert operator.evalstore("archive", "verify").status == 0


def test_after_a_restore_the_tombstones_are_applied_again(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json], store: Store
) -> None:
    put(engine, [event("queued", 1), event("queued", 1, eval_id="f")])
    assert erase(operator, "e").status == 0
    plain.execute("DELETE FROM tombstones")
    assert put(engine, [event("queued", 1)]) == ["applied"]  # as a backup brings it back
    done = operator.evalstore("erase", "--reapply", "-o", "json")
    assert (done.status, done.json["evaluations"], done.json["tombstones"]) == (0, 1, 1)
    assert left(plain) == {}
    assert put(engine, [event("queued", 1)]) == ["erased"]
    # A database made anew has a key of its own, until it takes that of the object store.
    plain.execute("DELETE FROM tombstones")
    plain.execute("UPDATE erasure_key SET key = '\\x00', inner_pad = '\\x00', outer_pad = '\\x00'")
    assert erase(operator, "f").status == 1
    assert operator.evalstore("erase", "--reapply").status == 0
    assert put(engine, [event("queued", 1)]) == ["erased"]
    assert left(plain, "f")


def test_a_restored_backup_holds_nothing_erased_once_the_tombstones_are_applied(
    operator: Operator, engine: Engine, shared_postgres: Postgres, database_url: str, store: Store
) -> None:
    own, own_ref = referring(store, os.urandom(5000))
    put(engine, [event("completed", 1, output_ref=own_ref), event("queued", 1, eval_id="f"), event("queued", 1, eval_id="g")])
    assert erase(operator, "f").status == 0
    engine.dispose()  # PostgreSQL copies only a database without connections.
    with new_database(shared_postgres, str(conninfo_to_dict(database_url)["dbname"])) as restored_url:
        assert erase(operator, "e").status == 0
        operator.env["EVALSTORE_DATABASE_URL"] = restored_url
        assert operator.evalstore("get", "e").status == 0
        done = operator.evalstore("erase", "--reapply", "-o", "json")
        assert (done.status, done.json["evaluations"], done.json["tombstones"]) == (0, 1, 2)
        assert operator.evalstore("erase", "--reapply", "-o", "json").json["evaluations"] == 0
        assert [operator.evalstore("get", eval_id).status for eval_id in "efg"] == [3, 3, 0]
        restored = database.engine(restored_url)
        assert put(restored, [event("queued", 5), event("queued", 5, eval_id="f")]) == ["erased", "erased"]
        restored.dispose()
        with psycopg.connect(restored_url, row_factory=dict_row) as conn:
            assert left(conn) == {}
        # The object goes with the sweep: somebody touched it lately.
        operator.env["EVALSTORE_SWEEP_GRACE_DAYS"] = "0.00000001"
        assert operator.evalstore("archive", "sweep", "--yes").status == 0
        assert own.key not in keys_of(store)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_under_load_it_ends_when_repeated(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json], tmp_path: Path, world: World, step: str, when: str
) -> None:
    operator.env |= {"EVALSTORE_OBJECT_STORE_URL": f"file://{tmp_path}/objects", "EVALSTORE_SWEEP_GRACE_DAYS": "0.00000001"}
    made = object_store.open_store(operator.env["EVALSTORE_OBJECT_STORE_URL"], Settings())
    _, given = referring(made, os.urandom(5000))
    shared, shared_ref = referring(made, os.urandom(5000))
    put(engine, [event("completed", 1, output_ref=given, error_ref=shared_ref, metadata={"a": "x" * 5000})])
    put(engine, [event("completed", 1, eval_id="sharing", output_ref=shared_ref)])
    bury(engine, world, 1, events=[fields("queued", 9)])
    _die_in_redis(world, "dead", fields("queued", 8))
    redis_keys = [NAMES.cached_record("e"), NAMES.given_time("e", str(UUID(int=1)))]
    for key in redis_keys:
        world.client.set(key, "kept")
    stop, outcomes, failures = threading.Event(), [""], list[BaseException]()

    def go_on() -> None:
        number = 1
        while not stop.is_set():
            number += 1
            try:
                outcomes[0] = put(engine, [event("started", number), event("queued", number, eval_id="other")])[0]
            except BaseException as error:  # noqa: BLE001 - told by the test
                failures.append(error)
                return

    sender = threading.Thread(target=go_on)
    sender.start()
    try:
        module, _, name = step.partition(":")
        dying = [sys.executable, "-c", DIES, module, name, when]
        assert subprocess.run(dying, env=operator.env, cwd=ROOT, check=False).returncode == -9
        assert erase(operator, "e").status == 0
        put(engine, [event("started", 10**9)])
    finally:
        stop.set()
        sender.join()
    assert failures == []
    assert outcomes == ["erased"]
    assert left(plain) == {}
    assert not world.client.exists(*redis_keys, KEYS.dead, KEYS.dead_bodies, KEYS.causes)
    operator.evalstore("archive", "sweep", "--yes")
    assert keys_of(made) == {shared.key}
    assert operator.evalstore("archive", "verify").status == 0
    told = plain.execute("SELECT body FROM confirmations WHERE body LIKE '%%:erased%%'").fetchall()
    assert [json.loads(one["body"])["eval_id"] for one in told] == ["e"]
    assert left(plain, "other")


@pytest.mark.usefixtures("both_ways")
def test_a_record_that_is_created_at_the_same_moment_does_not_slip_through(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json], eventually: Callable[..., None], database_url: str
) -> None:
    """The transaction that creates has looked for a tombstone before the eraser writes it."""
    put(engine, [event("queued", 1)])
    plain.execute("DELETE FROM evaluations")  # so that the eraser knows the id
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with ThreadPoolExecutor(1) as thread, psycopg.connect(database_url) as holder:
        holder.execute(
            "INSERT INTO evaluations (eval_id, status, attempt, version, metadata) VALUES ('e', 'queued', 1, 1, '{}')"
        )
        erased = thread.submit(erase, operator, "e")
        eventually(lambda: plain.execute(waits).fetchone(), what="the eraser waits for the record")
        holder.commit()
        assert erased.result(30).status == 0
    assert left(plain) == {}
    # And one that begins while the eraser holds the place: it waits, and then sees the tombstone.
    plain.execute("DELETE FROM tombstones")
    put(engine, [event("queued", 1)])
    with ThreadPoolExecutor(1) as thread, psycopg.connect(database_url) as holder:
        holder.execute("SELECT FROM evaluations WHERE eval_id = 'e' FOR UPDATE")
        erased = thread.submit(erase, operator, "e")
        eventually(lambda: plain.execute(waits).fetchone(), what="the eraser waits for the record")
        with ThreadPoolExecutor(1) as other:
            stored = other.submit(put, engine, [event("started", 2)])
            eventually(lambda: len(plain.execute(waits).fetchall()) == 2, what="the event waits as well")
            holder.commit()
            assert (erased.result(30).status, stored.result(30)) == (0, ["erased"])
    assert left(plain) == {}


def test_dead_letters_and_redrives_of_an_erased_evaluation_do_not_come_back(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json], world: World, eventually: Callable[..., None]
) -> None:
    given = [fields("completed", number) for number in (1, 2)]
    bury(engine, world, 2, events=given)
    assert operator.dlq("redrive", "--all", "--yes", "--detach").status == 0
    assert erase(operator, "e").json["dead_letters"] == 2
    bury(engine, world, 1, events=given[:1])
    assert left(plain) == {}
    assert plain.execute("SELECT state, returned FROM redrives").fetchall() == [{"state": "done", "returned": 2}]
    workers = world.workers()
    workers.start()
    world.send(given)
    counted = "SELECT 1 FROM evaluation_events WHERE eval_id = 'f'"
    world.send([fields("queued", 3, eval_id="f")])
    eventually(lambda: plain.execute(counted).fetchone(), within_s=30, what="the later event is stored")
    told = operator.evalstore("status", "-o", "json").json["workers"]
    eventually(
        lambda: sum(one.get("erased", 0) for one in operator.evalstore("status", "-o", "json").json["workers"]) == 2,
        what=f"the count of erased events, of {told}",
    )
    assert left(plain) == {}
    lines = "".join(json.dumps({"eval_id": one["eval_id"], "event_id": one["event_id"]}) + "\n" for one in given)
    (operator.folder / "sent.jsonl").write_text(lines)
    audit = operator.evalstore("audit", "sent.jsonl", "-o", "json")
    assert (audit.status, [one["fate"] for one in audit.json]) == (0, ["erased", "erased"])


def test_the_service_erases_for_a_key_that_may_and_then_answers_410(api: Any) -> None:
    body = {"eval_id": "e", "code": "c"}
    api.both.post(URL, json=body)
    assert api.read.get(f"{URL}/e").status_code == 200
    assert api.both.delete(f"{URL}/e").status_code == 403
    assert api.admin.delete(f"{URL}/never").status_code == 404
    done = api.admin.delete(f"{URL}/e", params={"reason": "asked for"})
    assert (done.status_code, done.json()) == (200, {"eval_id": "e", "events": 1, "objects": 0, "objects_left": 0})
    assert api.read.get(f"{URL}/e").status_code == 404
    assert api.admin.delete(f"{URL}/e").status_code == 200
    late = [
        api.both.post(URL, json=body),
        api.both.put(f"{URL}/e", json={"status": "running"}),
        api.both.put(f"{URL}/e", json={"status": "running"}, headers={"If-Match": '"1"'}),
        api.both.post(f"{URL}/e/events", json={"type": "evaluation:started"}),
    ]
    assert [one.status_code for one in late] == [410] * 4
    assert late[0].json()["type"] == "urn:evalstore:problem:erased"
    lines = json.dumps({"type": "evaluation:started", "eval_id": "e", "event_id": str(uuid4())})
    batch = api.both.post("/storage/events:batch", content=lines, headers={"Content-Type": "application/x-ndjson"})
    assert (batch.status_code, [one["outcome"] for one in api.lines(batch)]) == (200, ["erased"])
    with psycopg.connect(api.database_url, row_factory=dict_row) as conn:
        actions = conn.execute("SELECT actor, verb, reason FROM operator_actions").fetchall()
    assert [(one["verb"], one["reason"], one["actor"].startswith("key ")) for one in actions] == [("erase", "asked for", True)]


def test_a_key_that_may_administer_may_also_read_and_write(api: Any, operator: Operator) -> None:
    operator.env["EVALSTORE_DATABASE_URL"] = api.database_url
    made = operator.evalstore("keys", "create", "ops", "--scope", "admin", "-o", "json")
    client = api.client(made.json["key"])
    for one in (client, api.admin):
        assert one.post(URL, json={"eval_id": "e", "code": "c"}).status_code in {201, 409}
        assert one.get(f"{URL}/e").status_code == 200
    assert client.delete(f"{URL}/e").status_code == 200
