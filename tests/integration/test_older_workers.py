"""Workers of the release before keep fields that they do not know in `extra`; workers of this release count them."""

from collections.abc import Iterator, Sequence
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import dict_row
from sqlalchemy import Engine

from evalstore.storage import event_store, event_writer, records
from evalstore.storage.event_store import Stored
from models import Event, Record
from models.events import parse
from models.record import canonical_json

Json = dict[str, Any]


@pytest.fixture(params=["few", "many"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few events take PipelineWriter, many take CopyWriter."""
    monkeypatch.setattr(event_writer, "_PIPELINE_ROWS", 64 if request.param == "few" else 0)


@pytest.fixture
def plain(database_url: str) -> Iterator[psycopg.Connection[Json]]:
    with psycopg.connect(database_url, autocommit=True, row_factory=dict_row) as conn:
        yield conn


def event(type_: str, number: int, *, second: int = 0, **fields: Any) -> Event:
    required: dict[str, Json] = {"queued": {"code": "c"}, "completed": {"exit_code": 0}}
    named = {"type": f"evaluation:{type_}", "eval_id": "e", "event_id": UUID(int=number)}
    return parse({**named, "occurred_at": f"2026-01-01T00:00:{second:02}Z", **required.get(type_, {}), **fields})


def store(engine: Engine, events: Sequence[Event]) -> Stored:
    with engine.connect() as conn:
        return event_store.store(conn, events)


def get(engine: Engine) -> Record | None:
    with engine.connect() as conn:
        return event_store.get(conn, "e")


def store_as_an_older_worker(engine: Engine, plain: psycopg.Connection[Json], given: Event) -> None:
    """Leave `given` in the log as a worker that knows neither `run_id` nor `score` does."""
    store(engine, [given])
    unknown = {name: value for name in ("run_id", "score") if (value := getattr(given, name, None)) is not None}
    plain.execute(
        "UPDATE evaluation_events SET run_id = NULL, score = NULL, extra = %s WHERE event_id = %s",
        [canonical_json(unknown | (given.model_extra or {})), given.event_id],
    )
    plain.execute("UPDATE evaluations SET run_id = NULL, score = NULL, merge_state = NULL, merge_version = NULL")


@pytest.mark.usefixtures("both_ways")
def test_fields_that_an_older_worker_kept_in_extra_count_as_if_columns_held_them(
    engine: Engine, plain: psycopg.Connection[Json]
) -> None:
    queued, completed = event("queued", 1, run_id="r", future=1), event("completed", 2, second=1, score=1)
    store_as_an_older_worker(engine, plain, queued)
    store_as_an_older_worker(engine, plain, completed)
    stored = store(engine, [event("started", 3)])
    record = get(engine)
    assert record is not None
    assert (record.run_id, record.score) == ("r", 1.0)
    assert stored.confirmations[0].run_id == "r"
    with engine.connect() as conn:
        log = {shown.fields["type"]: shown.fields for shown in records.log(conn, "e", limit=10)}
    assert (log["evaluation:queued"]["run_id"], log["evaluation:queued"]["extra"]) == ("r", '{"future":1}')
    assert (log["evaluation:completed"]["score"], log["evaluation:completed"]["extra"]) == (1.0, None)


@pytest.mark.usefixtures("both_ways")
def test_an_event_that_an_older_worker_stored_is_a_duplicate_and_with_another_value_it_is_reused(
    engine: Engine, plain: psycopg.Connection[Json]
) -> None:
    queued, completed = event("queued", 1, run_id="r", future=1), event("completed", 2, second=1, score=0.5)
    store_as_an_older_worker(engine, plain, queued)
    store_as_an_older_worker(engine, plain, completed)
    again = [queued, completed, event("queued", 1, run_id="s", future=1), event("queued", 1, run_id="r"), event("completed", 2)]
    outcomes = store(engine, again).outcomes
    assert outcomes == ["duplicate", "duplicate", "reused", "reused", "reused"]


@pytest.mark.usefixtures("both_ways")
def test_a_field_that_an_older_worker_kept_and_no_column_can_hold_stays_in_extra(
    engine: Engine, plain: psycopg.Connection[Json]
) -> None:
    extra = '{"run_id":"a b","score":0.5}'  # An invalid run_id, and a field that this type does not have.
    store(engine, [event("queued", 1)])
    plain.execute("UPDATE evaluation_events SET extra = %s", [extra])
    plain.execute("UPDATE evaluations SET merge_state = NULL, merge_version = NULL")
    store(engine, [event("started", 2)])
    record = get(engine)
    assert record is not None
    assert (record.run_id, record.score) == (None, None)
    with engine.connect() as conn:
        assert [shown.fields["extra"] for shown in records.log(conn, "e", limit=10)] == [extra, None]
