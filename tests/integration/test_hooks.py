"""Validators and enrichers see each event before it is stored, and never hold up storing."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from dramatiq import Message
from sqlalchemy import Engine

from evalstore import hooks
from evalstore.hooks import Fault, Hooks, InvalidEvent, Limits
from evalstore.storage import event_store, records
from evalstore.telemetry.counters import Counters, Schema
from models.events import parse
from models.metrics import METRICS
from models.settings import Settings
from tasks.actor import ACTOR
from tasks.keys import QUEUE
from tests.integration.shell import Operator
from tests.polling import looks
from worker.batches import Batch, Delivery
from worker.handler import Handler
from worker.in_flight import InFlight
from worker.metrics import WorkerMetrics
from worker.verified_database import VerifiedDatabase

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/hooks_team"


def counters(*names: str) -> Counters:
    return Counters(Schema([one for one in METRICS if "hook" in one.labels], {"hook": names}))


def made(limits: Limits | None = None, **functions: Callable[[Mapping[str, Any]], Any]) -> tuple[Hooks, Counters]:
    """`validators_a=…`: hooks under these names."""
    found = {name.replace("_", ".", 1): function for name, function in functions.items()}
    counted = counters(*found)
    return Hooks(found.items(), limits or Limits(5, 60), counted), counted


def delivery(eval_id: str, **fields: Any) -> Delivery:
    event = {"type": "evaluation:started", "eval_id": eval_id, "event_id": str(uuid4()), **fields}
    return Delivery(f"{eval_id}:{uuid4()}".encode(), Message(QUEUE, ACTOR, (event,), {}, {}).encode())


@pytest.fixture
def connections(database_url: str) -> Iterator[VerifiedDatabase]:
    made = VerifiedDatabase.of(Settings.model_validate({"database_url": database_url}))
    yield made
    made.engine.dispose()


@pytest.fixture
def handler(connections: VerifiedDatabase, database_url: str) -> Callable[[Hooks], Handler]:
    loaded = Settings.model_validate({"database_url": database_url})
    return lambda given: Handler(connections, loaded, InFlight(), WorkerMetrics(), given)


def enrichments(database_url: str) -> dict[str, Any]:
    with psycopg.connect(database_url) as conn:
        return dict(conn.execute("SELECT eval_id, enrichment FROM evaluations").fetchall())


def refuse_bad(event: Mapping[str, Any]) -> None:
    if event["eval_id"].startswith("bad"):
        raise InvalidEvent([Fault("metadata.team", "required")])


@pytest.mark.parametrize("events", [3, 300])
def test_refused_events_become_dead_letters_and_the_others_are_enriched(
    handler: Callable[[Hooks], Handler], database_url: str, events: int
) -> None:
    """With few events, and with so many that they are copied."""
    given, counted = made(validators_a=refuse_bad, enrichers_b=lambda event: {"attempt": event["attempt"]})
    batch = [delivery(f"good{number}") for number in range(events)] + [delivery("bad")]

    outcome = handler(given)(Batch(batch))

    (why,) = outcome.dead.values()
    assert json.loads(why)["error_class"] == "InvalidEvent"
    assert json.loads(why)["error_message"] == "metadata.team: required"
    assert enrichments(database_url) == {f"good{number}": {"attempt": 1} for number in range(events)}
    assert counted.get("evalstore_hook_events_total", "validators.a", "refused") == 1
    assert counted.get("evalstore_hook_events_total", "enrichers.b", "passed") == events


def test_enrichments_of_later_events_are_merged_and_repeats_add_nothing(
    handler: Callable[[Hooks], Handler], database_url: str
) -> None:
    given, _ = made(enrichers_a=lambda event: {"last": event["metadata"]["n"], str(event["metadata"]["n"]): True})
    handle = handler(given)
    first, second = delivery("e", metadata={"n": 1}), delivery("e", metadata={"n": 2})

    for one in (first, second, first):
        handle(Batch([one]))

    assert enrichments(database_url) == {"e": {"last": 2, "1": True, "2": True}}


def test_an_enrichment_stays_bounded(handler: Callable[[Hooks], Handler], database_url: str) -> None:
    given, _ = made(enrichers_a=lambda event: {event["metadata"]["key"]: "x" * 60_000})
    handle = handler(given)

    for number in range(5):
        handle(Batch([delivery("e", metadata={"key": f"k{number}"})]))

    assert 1 <= len(enrichments(database_url)["e"]) <= 2
    assert "k4" in enrichments(database_url)["e"]


def test_a_hook_that_fails_is_counted_and_the_event_is_stored_without_it(
    handler: Callable[[Hooks], Handler], database_url: str
) -> None:
    def fail(event: Mapping[str, Any]) -> None:
        raise KeyError("nothing")

    results = {"a": ["no object"], "b": {"nul": "\0"}, "c": {"big": "x" * 70_000}, "d": {"nan": float("nan")}}
    given, counted = made(validators_a=fail, enrichers_b=lambda event: results[event["eval_id"]])

    outcome = handler(given)(Batch([delivery(eval_id) for eval_id in results]))

    assert outcome.dead == {}
    assert enrichments(database_url) == dict.fromkeys(results)
    for hook in ("validators.a", "enrichers.b"):
        assert counted.get("evalstore_hook_events_total", hook, "failed") == 4


def test_a_hook_changes_no_event(handler: Callable[[Hooks], Handler], database_url: str) -> None:
    def change(event: Mapping[str, Any]) -> None:
        event["metadata"]["tags"].append("changed")
        event["eval_id"] = "changed"  # type: ignore[index]

    given, _ = made(enrichers_a=change)
    handler(given)(Batch([delivery("e", metadata={"tags": []})]))

    with psycopg.connect(database_url) as conn:
        assert conn.execute("SELECT eval_id, metadata FROM evaluation_events").fetchall() == [("e", {"tags": []})]


def test_a_hook_that_hangs_is_switched_off_and_tried_again_later(
    handler: Callable[[Hooks], Handler], database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    gate, called = threading.Event(), []

    def hang(event: Mapping[str, Any]) -> dict[str, Any]:
        called.append(event["eval_id"])
        gate.wait()
        return {"by": "hang"}

    given, counted = made(Limits(0.2, 0.3), enrichers_a=hang, enrichers_b=lambda _: {"other": 1})
    handle = handler(given)
    began = time.monotonic()
    for number in range(20):
        handle(Batch([delivery(f"e{number}")]))
    assert time.monotonic() - began < 10
    assert called == ["e0"]
    assert enrichments(database_url) == {f"e{number}": {"other": 1} for number in range(20)}
    assert counted.get("evalstore_hook_off", "enrichers.a") == 1
    assert counted.get("evalstore_hook_events_total", "enrichers.a", "skipped") == 20

    time.sleep(0.3)
    handle(Batch([delivery("while-it-hangs")]))
    assert called == ["e0"]  # a second call would hang as well
    gate.set()
    for _ in looks(10):
        if not any(thread.name == "enrichers.a" for thread in threading.enumerate()):
            break
    handle(Batch([delivery("after")]))

    assert enrichments(database_url)["after"] == {"by": "hang", "other": 1}
    assert counted.get("evalstore_hook_off", "enrichers.a") == 0
    assert [record.levelname for record in caplog.records if record.name == "evalstore.hooks"] == ["ERROR", "WARNING"]


def test_a_slow_hook_keeps_the_results_that_it_gave_in_time(handler: Callable[[Hooks], Handler], database_url: str) -> None:
    def take_time(_: Mapping[str, Any]) -> dict[str, bool]:
        time.sleep(0.02)
        return {"seen": True}

    given, _ = made(Limits(0.3, 60), enrichers_a=take_time)

    handler(given)(Batch([delivery(f"e{number}") for number in range(100)]))

    seen = [value for value in enrichments(database_url).values() if value]
    assert 1 <= len(seen) < 50


def test_a_replay_and_an_older_state_leave_the_enrichment_alone(engine: Engine, database_url: str) -> None:
    fields = {"type": "evaluation:started", "eval_id": "e", "occurred_at": "2026-01-01T00:00:00Z"}
    first, second = (parse({**fields, "event_id": str(uuid4())}) for _ in range(2))
    with engine.connect() as conn:
        event_store.store(conn, [first], enrichments={0: {"kept": 1e17}})
        with psycopg.connect(database_url, autocommit=True) as plain:
            plain.execute("UPDATE evaluations SET merge_state = NULL, status = 'lost'")
        event_store.store(conn, [second])
        record = event_store.get(conn, "e")
        view = records.load(conn, "e")
    assert record is not None
    assert record.enrichment == {"kept": 1e17}
    assert record.version == 2
    assert view is not None
    assert view.fields["enrichment"] == {"kept": 1e17}


def installed(folder: Path) -> dict[str, str]:
    """The environment in which the example is installed."""
    info = folder / "installed" / "evalstore_hooks_team-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evalstore-hooks-team\nVersion: 1.0\n")
    points = (EXAMPLE / "pyproject.toml").read_text()
    groups = [
        line.removeprefix('[project.entry-points."').removesuffix('"]') for line in points.splitlines() if "entry-p" in line
    ]
    assert groups == ["evalstore.validators", "evalstore.enrichers"]
    (info / "entry_points.txt").write_text(
        "[evalstore.validators]\nteam = evalstore_hooks_team:require_team\n"
        "[evalstore.enrichers]\ncost = evalstore_hooks_team:add_cost\n"
    )
    return {"PYTHONPATH": f"{folder / 'installed'}:{EXAMPLE}:{ROOT}"}


def test_the_example_works_in_the_http_service(start_api: Callable[..., Any], tmp_path: Path, operator: Operator) -> None:
    api = start_api(**installed(tmp_path))

    created = [{"eval_id": "e", "code": "1"}, {"eval_id": "e", "code": "1", "metadata": {"team": "a"}}]
    refused, accepted = (api.both.post("/storage/evaluations", json=event) for event in created)
    assert (refused.status_code, refused.json()["faults"][0]["field"]) == (422, "metadata.team")
    assert accepted.status_code == 201
    changed = {"status": "completed", "exit_code": 0, "duration_ms": 2000, "executor_id": "gpu-1"}
    enrichment = {"cents": 0.4, "pool": "gpu"}
    assert api.both.put("/storage/evaluations/e", json=changed).json()["enrichment"] == enrichment
    assert api.both.get("/storage/evaluations/e").json()["enrichment"] == enrichment
    assert operator.evalstore("get", "e", "-o", "json").json["enrichment"] == enrichment

    queued = {"type": "evaluation:queued", "code": "1"}
    ended = {"type": "evaluation:completed", "exit_code": 0, "duration_ms": 500}
    events = [{"eval_id": "f", **queued}, {"eval_id": "g", **queued, "metadata": {"team": "b"}}, {"eval_id": "g", **ended}]
    body = "".join(json.dumps(event) + "\n" for event in events)
    answer = api.both.post("/storage/events:batch", content=body, headers={"content-type": "application/x-ndjson"})
    assert [line["outcome"] for line in api.lines(answer)] == ["invalid", "applied", "applied"]
    assert api.both.get("/storage/evaluations/f").status_code == 404
    assert api.both.get("/storage/evaluations/g").json()["enrichment"] == {"cents": 0.005, "pool": "cpu"}
    one = api.both.post("/storage/evaluations/h/events", json=queued)
    assert one.status_code == 422
    series = 'evalstore_hook_events_total{hook="validators.team",outcome="refused"} 3'
    assert series in api.nobody.get("/metrics").text


def test_a_hook_that_cannot_be_loaded_ends_the_start_with_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[evalstore.validators]\nx = not_there:check\n")
    monkeypatch.syspath_prepend(tmp_path)
    hooks._points.cache_clear()
    try:
        with pytest.raises(SystemExit) as end:
            hooks.load_or_exit(Settings(), counters("validators.x"))
    finally:
        monkeypatch.undo()
        hooks._points.cache_clear()
    assert end.value.code == 2
    assert sys.path[0] != str(tmp_path)
