"""Storing reads no history, and makes a record anew from its log only where its merge state does not fit."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import dict_row
from sqlalchemy import Engine

from evalstore.storage import conditional, event_store, event_writer, rebuild
from evalstore.storage.conditional import AlreadyQueued, WriteRequest
from evalstore.storage.event_store import Stored
from models import Event, merge
from models.events import parse
from models.fold import fold
from models.merge_state import MAX_KEYS, MAX_VALUE_BYTES
from models.record import to_row

Json = dict[str, Any]
Eventually = Callable[..., None]


@pytest.fixture(params=["few", "many"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few events take PipelineWriter, many take CopyWriter."""
    monkeypatch.setattr(event_writer, "_PIPELINE_ROWS", 64 if request.param == "few" else 0)


@pytest.fixture
def plain(database_url: str) -> Iterator[psycopg.Connection[Json]]:
    """A connection that looks at the tables, and has no part in what is tested."""
    with psycopg.connect(database_url, autocommit=True, row_factory=dict_row) as conn:
        yield conn


def event(type_: str, number: int, *, eval_id: str = "e", second: int = 0, **fields: Any) -> Event:
    required: dict[str, Json] = {"queued": {"code": "c"}, "completed": {"exit_code": 0}}
    named = {"type": f"evaluation:{type_}", "eval_id": eval_id, "event_id": UUID(int=number)}
    return parse({**named, "occurred_at": f"2026-01-01T00:00:{second:02}Z", **required.get(type_, {}), **fields})


def store(engine: Engine, events: Sequence[Event], progress: Callable[[], object] = lambda: None) -> Stored:
    with engine.connect() as conn:
        return event_store.store(conn, events, None, progress)


def assert_is_merged(engine: Engine, plain: psycopg.Connection[Json], events: Sequence[Event]) -> None:
    """Both the record and its merge state are those of the set of events."""
    with engine.connect() as conn:
        got = event_store.get(conn, "e")
    assert got is not None
    assert got.model_copy(update={"created_at": None, "updated_at": None}) == merge(events)
    row = plain.execute("SELECT merge_state, merge_version FROM evaluations WHERE eval_id = 'e'").fetchone()
    assert row == {"merge_state": fold(None, [to_row(one) for one in events]).merge_state, "merge_version": len(events)}


def rows_read(plain: psycopg.Connection[Json]) -> int:
    """The rows and index entries of the event log that were read so far, by anybody."""
    row = plain.execute("""
        SELECT t.seq_tup_read + t.idx_tup_fetch + (
            SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE relname = t.relname) AS read
        FROM pg_stat_user_tables t WHERE relname = 'evaluation_events'""").fetchone()
    assert row is not None
    return int(row["read"])


@pytest.mark.usefixtures("both_ways")
def test_storing_an_event_reads_none_of_the_20000_before_it(engine: Engine, plain: psycopg.Connection[Json]) -> None:
    events = [event("running", number, second=number % 60, metadata={"n": number}) for number in range(1, 20_001)]
    for start in range(0, len(events), 2000):
        store(engine, events[start : start + 2000])
    queued = event("queued", 20_001, eval_id="e")
    with engine.connect() as conn:
        conn.exec_driver_sql("SELECT pg_stat_force_next_flush()")
        conn.commit()
        before = rows_read(plain)
        assert event_store.store(conn, [event("running", 20_002, metadata={"n": 1})]).outcomes == ["applied"]
        assert event_store.store(conn, events[:1]).outcomes == ["duplicate"]
        assert conditional.create(conn, WriteRequest(queued, has_explicit_time=True)) == "applied"
        with pytest.raises(AlreadyQueued):
            conditional.create(conn, WriteRequest(event("queued", 20_003), has_explicit_time=True))
        conditional.update(conn, "e", lambda _: WriteRequest(event("completed", 20_004), has_explicit_time=True), [20_002])
        conn.exec_driver_sql("SELECT pg_stat_force_next_flush()")
        conn.commit()
        assert rows_read(plain) - before < 20


SPOILT = {
    "absent": "merge_state = NULL, merge_version = NULL",
    "stale": "merge_version = version - 1",
    "undecodable": "merge_state = substr(merge_state, 1, 9)",
}
OTHERS = ["merge_state = '\\x'", "merge_state = '\\x01'", "merge_state = '\\xff00'", "merge_state = merge_state || '\\x00'"]


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("page", [1, 2, 4, 1000])
@pytest.mark.parametrize(("reason", "change"), [*SPOILT.items(), *[("undecodable", other) for other in OTHERS]])
def test_a_merge_state_that_does_not_fit_is_made_anew_from_the_log_and_counted(
    engine: Engine, plain: psycopg.Connection[Json], monkeypatch: pytest.MonkeyPatch, page: int, reason: str, change: str
) -> None:
    monkeypatch.setattr(rebuild, "PAGE", page)
    everything = [
        event("queued", 2**128 - 1, metadata={"a": 1}),
        *[event("running", number, second=number, executor_id=f"x{number}", metadata={"b": number}) for number in range(4)],
        event("completed", 7, second=9),
        event("queued", 9, metadata={"c": 1}),
    ]
    events, last, other = everything[:-1], everything[-1], event("queued", 1, eval_id="f")
    store(engine, events)
    plain.execute(f"UPDATE evaluations SET {change}".encode())
    steps: list[None] = []
    stored = store(engine, [other, last], lambda: steps.append(None))
    assert (stored.outcomes, stored.rebuilt) == (["applied", "applied"], {reason: 1})
    assert len(steps) == (0 if page == 1000 else -(-len(events) // page))
    assert_is_merged(engine, plain, everything)
    assert store(engine, [event("started", 8)]).rebuilt == {}


def test_a_record_that_another_transaction_creates_meanwhile_is_taken_up(
    engine: Engine, database_url: str, plain: psycopg.Connection[Json], eventually: Eventually
) -> None:
    """The condition of a conditional write is looked at again, as its locks went with the transaction."""
    queued, other = event("queued", 1), event("queued", 2)
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"

    def create(given: Event) -> str:
        with engine.connect() as conn:
            return conditional.create(conn, WriteRequest(given, has_explicit_time=True))

    for number, storing in enumerate((lambda: store(engine, [other]).outcomes, lambda: create(other), lambda: create(queued))):
        plain.execute("TRUNCATE evaluations, evaluation_events")
        with ThreadPoolExecutor(1) as thread, psycopg.connect(database_url) as holder:
            made = fold(None, [to_row(queued)])
            values = [made.record.code_event_id, made.record.queued_at, made.merge_state]
            holder.execute(
                "INSERT INTO evaluations (eval_id, status, attempt, version, language, metadata, code_event_id, queued_at,"
                " merge_state, merge_version) VALUES ('e', 'queued', 1, 1, 'python', '{}', %s, %s, %s, 1)",
                values,
            )
            holder.execute(
                "INSERT INTO evaluation_events (eval_id, event_id, type, attempt, occurred_at, language, code)"
                " VALUES ('e', %s, 'evaluation:queued', 1, %s, 'python', 'c')",
                values[:2],
            )
            done = thread.submit(storing)
            eventually(lambda: plain.execute(waits).fetchone(), what="the store held up")
            holder.commit()
            if number == 0:
                assert done.result(10) == ["applied"]
                assert_is_merged(engine, plain, [queued, other])
            elif number == 1:
                with pytest.raises(AlreadyQueued):
                    done.result(10)
            else:
                assert done.result(10) == "duplicate"


def test_metadata_is_bounded_in_the_record_and_whole_in_the_log(engine: Engine, plain: psycopg.Connection[Json]) -> None:
    events = [
        event("running", number, metadata={f"{number}-{key}": None for key in range(500)} | {"big": ["x" * MAX_VALUE_BYTES]})
        for number in range(5)
    ]
    for one in events:
        store(engine, [one])
    assert_is_merged(engine, plain, events)
    row = plain.execute("SELECT metadata, metadata_truncated FROM evaluations").fetchone()
    assert row is not None
    assert row["metadata_truncated"]
    assert len(row["metadata"]) == MAX_KEYS
    assert row["metadata"].get("big", {"$omitted_bytes": MAX_VALUE_BYTES + 4}) == {"$omitted_bytes": MAX_VALUE_BYTES + 4}
    logged = plain.execute("SELECT metadata FROM evaluation_events ORDER BY event_id").fetchall()
    assert [one["metadata"] for one in logged] == [one.metadata for one in events]
