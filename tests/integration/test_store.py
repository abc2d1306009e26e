"""`evaluations.store` gives exactly what `merge` gives, whoever stores what, in whatever order, how often, and at once."""

import base64
import hashlib
import itertools
import json
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg.rows import dict_row
from sqlalchemy import Connection, Engine

from evalstore.storage import database, event_store, event_writer, outbox
from evalstore.storage.event_store import ROW_LIMIT_BYTES, Stored
from evalstore.storage.outbox import Commit, Relayed, StreamId
from models import Event, Outage, Record, merge
from models.content import Reference
from models.errors import DatabaseOutage
from models.events import parse
from models.fold import fold
from models.record import EventRow, canonical_json, to_row
from tests.factories import parsed_event as event
from tests.integration.earlier_release import store_as_before

Json = dict[str, Any]
MORE = int(os.environ.get("EVALSTORE_MORE_EXAMPLES", "1"))
ENDINGS = ("evaluation:completed", "evaluation:failed", "evaluation:timed_out", "evaluation:cancelled")
_numbers = itertools.count(1)


@pytest.fixture(params=["few", "many"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few events take PipelineWriter, many take CopyWriter."""
    monkeypatch.setattr(event_writer, "_PIPELINE_ROWS", 64 if request.param == "few" else 0)


@pytest.fixture
def plain(database_url: str) -> Iterator[psycopg.Connection[Json]]:
    """A connection that looks at the tables, and has no part in what is tested."""
    with psycopg.connect(database_url, autocommit=True, row_factory=dict_row) as conn:
        yield conn


def store(engine: Engine, events: Sequence[Event]) -> Stored:
    with engine.connect() as conn:
        return event_store.store(conn, events)


def get(engine: Engine, eval_id: str = "e") -> Record | None:
    with engine.connect() as conn:
        return event_store.get(conn, eval_id)


def outbox_rows(plain: psycopg.Connection[Json], after: int = 0) -> list[list[Json]]:
    """The confirmations of each commit, in the order in which they are relayed."""
    rows = plain.execute("SELECT count, body FROM confirmations WHERE id > %s ORDER BY id", [after]).fetchall()
    commits = [[json.loads(line) for line in row["body"].split("\n")] for row in rows]
    assert [row["count"] for row in rows] == [len(commit) for commit in commits]
    return commits


# ---- the rule, under Hypothesis

EVALS = ("a", "A", "b")
IDS = [UUID(int=first << 124 | last) for first in (0, 8, 15) for last in (0, 1)]
TIMES = [f"2026-01-01T00:00:00.{micros:06}Z" for micros in (0, 1, 999_999)]
LARGE = "x" * (ROW_LIMIT_BYTES + 1)
REF = Reference(hashlib.sha256(LARGE.encode()).hexdigest(), len(LARGE), "zstd")

texts = st.sampled_from([None, "", "a", "b"])
ids = st.sampled_from([None, "r", "s"])
numbers = st.sampled_from([None, 0, 1.5, 1e300])
integers = st.sampled_from([None, 0, -(2**63), 2**63 - 1])
metadata = st.none() | st.dictionaries(
    st.sampled_from("ab"), st.sampled_from([None, 0, 1e16, 2**53 + 1, True, "é", [5e-324], {"a": None}]), max_size=2
)
contents = st.sampled_from(["", "\0", "\ud800", "x" * ROW_LIMIT_BYTES, LARGE, LARGE + "\0"])


def content(name: str) -> st.SearchStrategy[Json]:
    b64 = base64.b64encode(LARGE.encode()).decode()
    return st.fixed_dictionaries({name: contents}) | st.sampled_from([{f"{name}_b64": b64}, {f"{name}_ref": REF}])


def kind(
    types: tuple[str, ...], optional: dict[str, st.SearchStrategy[Any]], *more: st.SearchStrategy[Json]
) -> st.SearchStrategy[Json]:
    fields = st.fixed_dictionaries(
        {
            "type": st.sampled_from(types),
            "eval_id": st.sampled_from(EVALS),
            "event_id": st.sampled_from(IDS),
            "occurred_at": st.sampled_from(TIMES),
        },
        optional={
            "attempt": st.sampled_from([None, 1, 2]),
            "metadata": metadata,
            "future": st.sampled_from([0, "\0"]),
            **optional,
        },
    )
    return st.tuples(fields, *more).map(lambda parts: {name: value for part in parts for name, value in part.items()})


ran = {"executor_id": texts, "container_id": texts}
exit_code = st.fixed_dictionaries({"exit_code": st.sampled_from([0, 1])})
drawn_events = st.one_of(
    kind(("evaluation:queued",), {"language": texts, "submitter": texts, "run_id": ids}, content("code")),
    kind(("evaluation:started", "evaluation:running"), {**ran, "timeout_s": numbers}),
    kind(("evaluation:completed",), {**ran, "score": numbers}, exit_code),
    kind(
        ENDINGS[:3],
        {**ran, "duration_ms": numbers, "memory_bytes": integers},
        exit_code,
        st.just({}) | content("output"),
        content("error"),
    ),
    kind(("evaluation:cancelled",), {"reason": texts}),
    kind(("evaluation:lost",), {}),
)


class Batch(NamedTuple):
    """Events, and whether a worker of the release before merge states stores them."""

    events: list[Event]
    as_before: bool


@st.composite
def work_for_two(draw: st.DrawFn) -> list[list[Batch]]:
    """What two connections store: for each its batches, in its order. Events come up to three times, and in any batch."""
    prefix = f"{next(_numbers)}-"
    different = draw(st.lists(drawn_events, min_size=1, max_size=12))
    for one in different:
        one["eval_id"] = prefix + one["eval_id"]
    parsed = [parse(one) for one in different]
    repeated = draw(st.lists(st.sampled_from(parsed), max_size=12))
    everything = draw(st.permutations(parsed + repeated))
    ends = sorted({0, len(everything), *draw(st.lists(st.integers(0, len(everything)), max_size=5))})
    batches = [
        Batch(everything[start:end], draw(st.sampled_from([False, False, True]))) for start, end in itertools.pairwise(ends)
    ]
    return [batches[0::2], batches[1::2]]


def test_two_connections_at_once_store_what_merge_gives(
    engine: Engine, plain: psycopg.Connection[Json], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_writer, "_PIPELINE_ROWS", 4)  # So batches use both writers.
    both_begin = threading.Barrier(2)

    def work(conn: Connection, batches: list[Batch]) -> list[Stored]:
        both_begin.wait(30)
        return [
            store_as_before(conn, events) if as_before else event_store.store(conn, events) for events, as_before in batches
        ]

    with engine.connect() as one, engine.connect() as other, ThreadPoolExecutor(2) as threads:

        @settings(max_examples=1500 * MORE, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(work_for_two())
        def stores_what_merge_gives(batches_of: list[list[Batch]]) -> None:
            row = plain.execute("SELECT coalesce(max(id), 0) AS last FROM confirmations").fetchone()
            working = [threads.submit(work, conn, batches) for conn, batches in zip((one, other), batches_of, strict=True)]
            done = [stored for future in working for stored in future.result(60)]
            batches = [batch for batches in batches_of for batch in batches]
            assert row is not None
            standing = assert_outcomes_fit(batches, done)
            assert sorted(map(str, outbox_rows(plain, row["last"]))) == sorted(
                str(msgspec.to_builtins(stored.confirmations)) for stored in done if stored.confirmations
            )
            for eval_id in {key[0] for key in standing}:
                applied = [standing[key] for key in standing if key[0] == eval_id]
                # An event of this release rebuilds a record written by the previous release.
                applied.append(event("started", 7, eval_id=eval_id))
                assert event_store.store(one, applied[-1:]).outcomes == ["applied"]
                assert_row_is(merge(applied), one, plain)
                assert_merge_state_is(applied, plain)
                assert_log_is(applied, plain)
                assert_confirmed(merge(applied), applied, outbox_rows(plain, row["last"]))
            assert sum(stored.conflicting_results for stored in done) == conflicts_among(standing.values())

        stores_what_merge_gives()


def assert_outcomes_fit(batches: list[Batch], done: list[Stored]) -> dict[tuple[str, UUID | None], Event]:
    """Each event is applied exactly once; returns those that were."""
    outcomes = [
        (one, outcome, batch.as_before)
        for batch, stored in zip(batches, done, strict=True)
        for one, outcome in zip(batch.events, stored.outcomes, strict=True)
    ]
    standing = {(one.eval_id, one.event_id): one for one, outcome, _ in outcomes if outcome == "applied"}
    assert len(standing) == sum(outcome == "applied" for _, outcome, _ in outcomes)
    for one, outcome, as_before in outcomes:
        stands = standing[one.eval_id, one.event_id]
        if outcome != "applied" and not as_before:
            assert outcome == ("duplicate" if same(to_row(one), to_row(stands)) else "reused")
    return standing


def _inline(one: EventRow) -> dict[str, Any]:
    return {name: LARGE.encode() for name in ("code", "output", "error") if getattr(one, name) == REF}


def same(one: EventRow, other: EventRow) -> bool:
    """Whether two events say the same: content by its bytes, wherever they are; to Python 1 and True are the same."""
    one, other = one._replace(**_inline(one)), other._replace(**_inline(other))
    return one == other and canonical_json(one.metadata or {}) == canonical_json(other.metadata or {})


def assert_row_is(expected: Record, conn: Connection, plain: psycopg.Connection[Json]) -> None:
    got = event_store.get(conn, expected.eval_id)
    assert got is not None
    assert got.created_at is not None
    assert got.updated_at is not None
    assert got.created_at <= got.updated_at
    assert got.model_copy(update={"created_at": None, "updated_at": None}) == expected
    assert canonical_json(got.metadata) == canonical_json(expected.metadata)
    row = plain.execute("SELECT * FROM evaluations WHERE eval_id = %s", [expected.eval_id]).fetchone()
    assert row is not None
    assert {name: row.pop(name) is None for name in ("code_event_id", "result_event_id")} == {
        "code_event_id": expected.code is None,
        "result_event_id": expected.finished_at is None,
    }
    del row["merge_state"], row["merge_version"], row["repairs"]
    assert row == got.model_dump(exclude={"code", "output", "error"})


def assert_merge_state_is(applied: list[Event], plain: psycopg.Connection[Json]) -> None:
    """Beside the record is the merge state of the set of its events."""
    query = "SELECT merge_state, merge_version FROM evaluations WHERE eval_id = %s"
    row = plain.execute(query, [applied[0].eval_id]).fetchone()
    assert row == {"merge_state": fold(None, [to_row(one) for one in applied]).merge_state, "merge_version": len(applied)}


def assert_log_is(applied: list[Event], plain: psycopg.Connection[Json]) -> None:
    """Every event is in the log as it came, and each content once: in its event's row, or in one of its own."""
    eval_id = applied[0].eval_id
    logged = plain.execute("SELECT * FROM evaluation_events WHERE eval_id = %s", [eval_id]).fetchall()
    large = plain.execute("SELECT * FROM contents WHERE eval_id = %s", [eval_id]).fetchall()
    for row in large:
        if row["store"] == "objects":
            assert row["data"] is None
            row["data"] = LARGE.encode()
            assert (row["sha256"].hex(), row["size"], row["encoding"]) == REF
        assert row["size"] == len(row["data"]) > ROW_LIMIT_BYTES
        assert row["sha256"] == hashlib.sha256(row["data"]).digest()
    data = {(row["event_id"], row["kind"]): row["data"] for row in large}
    for row in logged:
        assert row.pop("recorded_at") is not None
        for name in ("code", "output", "error"):
            if row[name] is None:
                row[name] = data.pop((row["event_id"], name), None)
    assert data == {}
    facts = {row["event_id"]: EventRow(**row) for row in logged}
    assert len(facts) == len(applied)
    assert all(same(to_row(one), facts[one.event_id]) for one in applied)


def assert_confirmed(record: Record, applied: list[Event], committed: list[list[Json]]) -> None:
    """One confirmation for each commit, with what it applied, in the order of the versions; the last is the record's."""
    of_each_commit = [[one for one in body if one["eval_id"] == record.eval_id] for body in committed]
    assert all(len(of_commit) <= 1 for of_commit in of_each_commit)
    ours = [one for of_commit in of_each_commit for one in of_commit]
    assert [one["type"] for one in ours] == ["storage:evaluation:created"] + ["storage:evaluation:updated"] * (len(ours) - 1)
    assert [one["version"] for one in ours] == list(itertools.accumulate(len(one["event_ids"]) for one in ours))
    assert (ours[-1]["version"], ours[-1]["status"]) == (record.version, record.status)
    assert ours[-1].get("run_id", "none") == (record.run_id or "none")
    assert Counter(id_ for one in ours for id_ in one["event_ids"]) == Counter(str(one.event_id) for one in applied)


def conflicts_among(events: Any) -> int:
    endings = Counter((one.eval_id, one.attempt or 1) for one in events if one.type in ENDINGS)
    return sum(count - 1 for count in endings.values())


# ---- identity


@pytest.mark.usefixtures("both_ways")
def test_an_event_is_stored_once_and_its_repetition_changes_nothing(engine: Engine, plain: psycopg.Connection[Json]) -> None:
    events = [event("queued", 1), event("completed", 2, output=LARGE)]
    assert store(engine, events).outcomes == ["applied", "applied"]
    before = (get(engine), outbox_rows(plain))
    again = store(engine, [*events, *events])
    assert again == Stored(["duplicate"] * 4)
    assert (get(engine), outbox_rows(plain)) == before


OTHER_BODIES = [
    (event("queued", code="a"), event("queued", code="b")),
    (event("queued", code=LARGE), event("queued", code=LARGE + "x")),
    (event("queued", code=LARGE), event("queued", code="")),
    (event("queued", code=""), event("queued", code=LARGE)),
    (event("failed", output=None), event("failed", output="")),
    (event("failed", output="x", error="y"), event("failed", output="y", error="x")),
    (event("queued", language=""), event("queued")),
    (event("queued", submitter=""), event("queued")),
    (event("started", second=1), event("started", second=2)),
    (event("started"), event("started", attempt=2)),
    (event("started"), event("lost")),
    (event("started", timeout_s=1), event("started", timeout_s=2)),
    (event("completed"), event("completed", exit_code=1)),
    (event("started", metadata={"a": 1}), event("started", metadata={"a": True})),
    (event("started", metadata={"a": 1}), event("started", metadata={"a": None})),
    (event("started", metadata={"a": 1}), event("started")),
    (event("started", future=1), event("started")),
    (event("started", future=1), event("started", future="1")),
    (event("started", exit_code=1), event("started", exit_code=2)),
]
SAME_BODIES = [
    (event("queued", code="é"), event("queued", code=None, code_b64="w6k=")),
    (event("queued", language=None), event("queued", language="python")),
    (event("started"), event("running", attempt=1, executor_id=None, future=None, metadata=None)),
    (event("started", metadata={"a": 1, "b": 1e16}), event("started", metadata={"b": 1e16, "a": 1})),
    (event("started", future={"a": 1, "b": 2}, more=1), event("started", more=1, future={"b": 2, "a": 1})),
]


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("together", [True, False])
def test_the_same_event_id_with_another_body_is_told_and_changes_nothing(engine: Engine, together: bool) -> None:
    for number, pair in enumerate(OTHER_BODIES):
        first, other = (one.model_copy(update={"eval_id": f"e{number}"}) for one in pair)
        batches = [[first, other, first, other]] if together else [[first], [other], [first], [other]]
        outcomes = [outcome for batch in batches for outcome in store(engine, batch).outcomes]
        assert outcomes == ["applied", "reused", "duplicate", "reused"], pair
        stored = get(engine, first.eval_id)
        assert stored is not None
        assert stored.model_copy(update={"created_at": None, "updated_at": None}) == merge([first])


@pytest.mark.usefixtures("both_ways")
def test_the_same_body_said_in_other_words_is_a_duplicate(engine: Engine) -> None:
    for number, pair in enumerate(SAME_BODIES):
        first, same = (one.model_copy(update={"eval_id": f"e{number}"}) for one in pair)
        assert store(engine, [first]).outcomes == ["applied"]
        assert store(engine, [same]).outcomes == ["duplicate"], pair


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("inline_first", [True, False])
@pytest.mark.parametrize("text", ["x", LARGE])
def test_content_and_a_reference_to_the_same_bytes_are_the_same_body(
    engine: Engine, plain: psycopg.Connection[Json], inline_first: bool, text: str
) -> None:
    ref = Reference(hashlib.sha256(text.encode()).hexdigest(), len(text), "zstd")
    inline, referring = event("failed", error=text), event("failed", error=None, error_ref=ref)
    one, other = (inline, referring) if inline_first else (referring, inline)
    assert store(engine, [one, other]).outcomes == ["applied", "duplicate"]
    assert store(engine, [other]).outcomes == store(engine, [one]).outcomes == ["duplicate"]
    different = event("failed", error=None, error_ref=ref._replace(sha256="0" * 64))
    assert store(engine, [event("failed", error=text + "y"), different]).outcomes == ["reused", "reused"]
    if not inline_first:
        row = plain.execute("SELECT size, sha256, data, store, encoding FROM contents").fetchone()
        digest = bytes.fromhex(ref.sha256)
        assert row == {"size": len(text), "sha256": digest, "data": None, "store": "objects", "encoding": "zstd"}


@pytest.mark.usefixtures("both_ways")
def test_an_event_id_is_unique_within_its_evaluation_alone(engine: Engine) -> None:
    assert store(engine, [event("started"), event("started", eval_id="f")]).outcomes == ["applied", "applied"]


def test_storing_nothing_does_nothing(engine: Engine, plain: psycopg.Connection[Json]) -> None:
    assert store(engine, []) == Stored([])
    assert outbox_rows(plain) == []


# ---- exactness


@pytest.mark.usefixtures("both_ways")
def test_numbers_come_out_of_the_database_as_they_went_in(engine: Engine) -> None:
    floats = [1e16, 1e300, 5e-324, 1.7976931348623157e308, 2.0**53, 1e22, 123456789012345680.0, 0.1, 1e15, -1e16, 0.0]
    exact: Json = {"floats": floats, "ints": [2**53 + 1, 2**63 - 1, -(2**63), 0], "nested": {"1e16": [{"a": 1e16}]}}
    events = [
        event("completed", eval_id=eval_id, metadata=exact, duration_ms=5e-324, memory_bytes=2**53 + 1, score=-0.0)
        for eval_id in "efg"
    ]
    store(engine, events[:1])
    store(engine, events[1:])  # Several events go to PostgreSQL in another form than one.
    store(engine, [event("started", 2)])
    store(engine, [event("started", 2, eval_id=eval_id) for eval_id in "fg"])
    for got in (get(engine, eval_id) for eval_id in "efg"):
        assert got is not None
        assert canonical_json(got.metadata) == canonical_json(exact)
        assert (got.duration_ms, got.memory_bytes, str(got.score)) == (5e-324, 2**53 + 1, "-0.0")


jsonb_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5)
jsonb_numbers = st.floats(allow_nan=False, allow_infinity=False).map(lambda number: number or 0.0)  # jsonb has no -0.0
jsonb_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | jsonb_numbers | jsonb_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(jsonb_texts, inner, max_size=3),
)


@settings(max_examples=100 * MORE, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(jsonb_texts, jsonb_values, max_size=3), jsonb_texts)
@example({"": "", "'\"\\{}": ["\x1b\x7f\u2028\uffff"]}, "'\"\\{},\\u0000\x1b\x7f\u2028\uffff\U0001f600")
def test_metadata_and_text_come_out_of_the_database_as_they_went_in(engine: Engine, value: Json, text: str) -> None:
    eval_ids = [f"m{next(_numbers)}" for _ in range(3)]
    events = [event("queued", eval_id=eval_id, code="", metadata=value, submitter=text) for eval_id in eval_ids]
    store(engine, events[:1])
    store(engine, events[1:])  # Several events go to PostgreSQL in another form than one.
    for got in (get(engine, eval_id) for eval_id in eval_ids):
        assert got is not None
        assert canonical_json(got.metadata) == canonical_json(value)
        assert got.submitter == text


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        bytes(range(256)),
        b"x" * ROW_LIMIT_BYTES,
        b"x" * (ROW_LIMIT_BYTES + 1),
        b"".join(hashlib.sha256(bytes([i])).digest() for i in range(256)) * 400,
    ],
    ids=len,
)
def test_bytes_come_out_of_the_database_as_they_went_in(engine: Engine, data: bytes) -> None:
    b64 = base64.b64encode(data).decode()
    store(engine, [event("queued", 1, code=None, code_b64=b64), event("completed", 2, output_b64=b64, error_b64=b64)])
    record = get(engine)
    assert record is not None
    for got in (record.code, record.output, record.error):
        assert (got.encode() if isinstance(got, str) else got) == data


# ---- transactions


def waiting(plain: psycopg.Connection[Json]) -> list[int]:
    """The processes of evalstore that wait for a lock."""
    rows = plain.execute(
        "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'evalstore%' AND wait_event_type = 'Lock'"
        " AND datname = current_database()"
    )
    return [row["pid"] for row in rows]


HOLD = {
    "creating": "INSERT INTO evaluations (eval_id, status, attempt, version, metadata) VALUES ('b', '', 1, 1, '{}')",
    "locking": "SELECT FROM evaluations WHERE eval_id = 'c' FOR UPDATE",
    "logging": "INSERT INTO evaluation_events (eval_id, event_id, type, attempt, occurred_at) "
    "VALUES ('d', '00000000-0000-0000-0000-000000000005', '', 1, now())",
    "confirming": "LOCK TABLE confirmations",
}


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("moment", HOLD)
def test_a_transaction_that_dies_leaves_nothing_and_storing_again_stores_all(
    engine: Engine, database_url: str, plain: psycopg.Connection[Json], eventually: Callable[..., None], moment: str
) -> None:
    store(engine, [event("started", 9, eval_id="c")])
    tables = ("evaluations", "evaluation_events", "contents", "confirmations")
    before = [plain.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in tables]
    events = [event("failed", 5, eval_id=eval_id, output=LARGE) for eval_id in "abcd"]
    with engine.connect() as conn, ThreadPoolExecutor(1) as thread:
        with psycopg.connect(database_url) as holder:
            holder.execute(HOLD[moment])
            storing = thread.submit(event_store.store, conn, events)
            eventually(lambda: waiting(plain), what="the store held up")
            plain.execute("SELECT pg_terminate_backend(%s)", waiting(plain))
            with pytest.raises(DatabaseOutage):
                storing.result(10)
            holder.rollback()
        assert [plain.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in tables] == before
        assert event_store.store(conn, events).outcomes == ["applied"] * 4
        assert event_store.store(conn, events).outcomes == ["duplicate"] * 4


@pytest.mark.usefixtures("both_ways")
def test_a_record_is_never_updated_before_it_was_created(
    engine: Engine, database_url: str, plain: psycopg.Connection[Json], eventually: Callable[..., None]
) -> None:
    with ThreadPoolExecutor(1) as thread, psycopg.connect(database_url) as holder:
        holder.execute(HOLD["creating"])
        first: Future[Stored] = thread.submit(store, engine, [event("queued", 1, eval_id=eval_id) for eval_id in "bc"])
        eventually(lambda: waiting(plain), what="the first transaction held up")
        store(engine, [event("started", 2, eval_id="c")])
        holder.rollback()
        assert [one.type for one in first.result(10).confirmations] == [
            "storage:evaluation:created",
            "storage:evaluation:updated",
        ]
    row = plain.execute("SELECT updated_at - created_at AS age FROM evaluations WHERE eval_id = 'c'").fetchone()
    assert row is not None
    assert row["age"].total_seconds() > 0


@pytest.mark.usefixtures("both_ways")
def test_an_evaluation_deleted_while_its_lock_is_awaited_is_stored_anew(
    engine: Engine, database_url: str, plain: psycopg.Connection[Json], eventually: Callable[..., None]
) -> None:
    store(engine, [event("queued", 1, eval_id=eval_id) for eval_id in "ab"])
    more = [event("started", 2, eval_id=eval_id) for eval_id in "ab"]
    with ThreadPoolExecutor(1) as thread, psycopg.connect(database_url) as holder:
        holder.execute("SELECT FROM evaluations WHERE eval_id = 'a' FOR UPDATE")
        storing = thread.submit(store, engine, more)
        eventually(lambda: waiting(plain), what="the store held up")
        holder.execute("DELETE FROM evaluations WHERE eval_id = 'b'")
        holder.execute("DELETE FROM evaluation_events WHERE eval_id = 'b'")
        holder.commit()
        assert storing.result(10).outcomes == ["applied", "applied"]
    records = [get(engine, eval_id) for eval_id in "ab"]
    assert [record and record.version for record in records] == [2, 1]


@pytest.mark.usefixtures("both_ways")
def test_many_connections_on_the_same_evaluations_do_not_deadlock(engine: Engine, plain: psycopg.Connection[Json]) -> None:
    sets = [[event("running", number, eval_id=f"e{e}", metadata={"n": number}) for number in range(10)] for e in range(40)]
    everything = [one for events in sets for one in events] * 2
    everything.sort(key=lambda one: hashlib.sha256(f"{one.eval_id}{one.event_id}".encode()).digest())
    batches = [everything[start : start + 50] for start in range(0, len(everything), 50)]
    with ThreadPoolExecutor(5) as threads:
        done = list(threads.map(lambda batch: store(engine, batch), batches))
    outcomes = Counter(outcome for stored in done for outcome in stored.outcomes)
    assert outcomes == {"applied": 400, "duplicate": 400}
    versions: defaultdict[str, list[int]] = defaultdict(list)
    for body in outbox_rows(plain):
        for one in body:
            versions[one["eval_id"]].append(one["version"])
    assert all(found == sorted(set(found)) and found[-1] == 10 for found in versions.values())
    assert len(versions) == 40
    with engine.connect() as conn:
        for events in sets:
            assert_row_is(merge(events), conn, plain)


# ---- reading


def test_reading_an_unknown_evaluation_returns_none(engine: Engine) -> None:
    with engine.connect() as conn:
        assert event_store.get(conn, "none") is None
        assert event_store.applied(conn, []) == set()
        assert event_store.applied(conn, [("none", UUID(int=1))]) == set()
        assert event_store.count_by_status(conn) == {}


def test_evaluations_are_counted_by_status_and_found_by_key(engine: Engine) -> None:
    store(engine, [event("queued"), event("started", 2), event("queued", eval_id="f"), event("completed", 1, eval_id="g")])
    wanted = [("e", UUID(int=1)), ("e", UUID(int=2)), ("e", UUID(int=3)), ("f", UUID(int=2)), ("g", UUID(int=1))]
    with engine.connect() as conn:
        assert event_store.count_by_status(conn) == {"running": 1, "queued": 1, "completed": 1}
        assert event_store.applied(conn, wanted) == {wanted[0], wanted[1], wanted[4]}


# ---- the outbox


class Stream:
    """Takes confirmations as Redis does, and loses what it confirmed when told to."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def publish(self, known: StreamId, commits: Sequence[Commit]) -> Relayed:
        last = StreamId(0, len(self.lines))
        if last < known:
            return Relayed(last, done=False)
        self.lines += [line for commit in commits for line in commit.body.split("\n")]
        return Relayed(StreamId(0, len(self.lines)), done=True)

    @property
    def versions(self) -> list[int]:
        return [one["version"] for one in map(json.loads, self.lines) if one["eval_id"] == "e"]


def test_confirmations_are_relayed_in_order_once_and_then_forgotten(engine: Engine, plain: psycopg.Connection[Json]) -> None:
    stream = Stream()
    with engine.connect() as conn:
        assert outbox.relay(conn, stream.publish) == 0
        for number in range(45):
            event_store.store(conn, [event("running", number), event("running", number, eval_id="f")])
        assert outbox.relay(conn, stream.publish) == 90
        assert outbox.relay(conn, stream.publish) == 0
        assert [json.loads(line) for line in stream.lines] == [one for commit in outbox_rows(plain) for one in commit]
        assert stream.versions == list(range(1, 46))
        assert outbox.forget(conn, older_than_s=60) == 0
        assert outbox.forget(conn, older_than_s=0) == 45
    assert set(json.loads(stream.lines[0])) == {"type", "eval_id", "version", "status", "event_ids", "recorded_at"}
    assert json.loads(stream.lines[0])["recorded_at"].endswith("Z")


def test_confirmations_that_could_not_be_published_stay(engine: Engine) -> None:
    def fail(_known: StreamId, _commits: Sequence[Commit]) -> Relayed:
        raise Outage("not now")

    stream = Stream()
    with engine.connect() as conn:
        event_store.store(conn, [event("queued")])
        with pytest.raises(Outage, match="not now"):
            outbox.relay(conn, fail)
        assert outbox.relay(conn, stream.publish) == 1
    assert stream.versions == [1]


def test_confirmations_that_the_server_lost_are_relayed_again(engine: Engine) -> None:
    stream = Stream()
    with engine.connect() as conn:
        for number in range(6):
            event_store.store(conn, [event("running", number)])
            outbox.relay(conn, stream.publish)
        del stream.lines[2:]
        assert outbox.relay(conn, stream.publish) == 4
    assert stream.versions == [1, 2, 3, 4, 5, 6]


# ---- errors


@pytest.mark.parametrize("table", ["evaluations", "evaluation_events", "confirmations"])
@pytest.mark.parametrize("number", [1, 3, 60])
def test_an_error_in_a_pipeline_is_the_first_one_wherever_it_shows(
    engine: Engine, plain: psycopg.Connection[Json], table: str, number: int
) -> None:
    plain.execute("CREATE FUNCTION refuses() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$")
    plain.execute(f"CREATE TRIGGER refuses BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION refuses()".encode())
    events = [event("started", each, eval_id=f"e{each}") for each in range(number)]
    for _ in range(10):  # answers come by chance together or one by one
        with pytest.raises(psycopg.errors.RaiseException, match="no"):
            store(engine, events)

    plain.execute(f"DROP TRIGGER refuses ON {table}".encode())
    assert store(engine, events).outcomes == ["applied"] * number


def test_a_session_that_a_pooler_put_in_the_place_of_ours_is_an_outage_and_not_for_long(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_writer, "_PIPELINE_ROWS", 0)
    with engine.connect() as conn:
        event_store.store(conn, [event("queued", 1)])
        database.driver(conn).execute("DISCARD TEMP")
        conn.rollback()

        with pytest.raises(DatabaseOutage):
            event_store.store(conn, [event("started", 2)])
        assert event_store.store(conn, [event("started", 2)]).outcomes == ["applied"]


def test_few_events_need_nothing_of_the_session_they_are_stored_in(engine: Engine) -> None:
    with engine.connect() as conn:
        for number in range(10):
            assert event_store.store(conn, [event("started", number)]).outcomes == ["applied"]
            database.driver(conn).execute("DISCARD TEMP")
            conn.rollback()


def test_temporary_tables_of_others_in_our_session_are_left_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pooler hands one session to several applications in turn."""
    monkeypatch.setattr(event_writer, "_PIPELINE_ROWS", 0)
    with engine.connect() as conn:
        for name in ("stage_records", "stage_events", "stage_restored"):
            database.driver(conn).execute(f"CREATE TEMPORARY TABLE {name} (theirs int)".encode())
        conn.commit()
        assert event_store.store(conn, [event("queued", 1)]).outcomes == ["applied"]
        assert event_store.store(conn, [event("queued", 1)]).outcomes == ["duplicate"]
