"""Lists over HTTP: filters, cursors, exports, event logs and batches."""

import json
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import Connection, Engine, text

from evalstore.storage import database, event_store, list_indexes, listing, migrations
from models.events import parse
from tests import factories

E = "/storage/evaluations"
COUNT = 60


@pytest.fixture
def engine(api: Any) -> Iterator[Engine]:
    made = database.engine(api.database_url)
    yield made
    made.dispose()


def event(number: int, **fields: Any) -> dict[str, Any]:
    team, language = f"team-{number % 3}", "rust" if number % 10 == 0 else "python"
    given = {
        "language": language,
        "submitter": team,
        "run_id": f"run-{number % 2}",
        "metadata": {"shard": number % 4},
        **fields,
    }
    return factories.event("queued", eval_id=f"e{number:03}") | given


@pytest.fixture
def stored(engine: Engine) -> list[str]:
    """Sixty evaluations, made by twelve commits; the ids from oldest to newest."""
    with engine.connect() as conn:
        for start in range(0, COUNT, 5):
            event_store.store(conn, [parse(event(number)) for number in range(start, start + 5)])
        ended = {"event_id": str(UUID(int=2)), "occurred_at": "2026-01-01T00:00:01Z", "executor_id": "x", "exit_code": 0}
        for number in range(0, COUNT, 7):
            event_store.store(conn, [parse({**ended, "eval_id": f"e{number:03}", "type": "evaluation:completed"})])
    return [f"e{number:03}" for number in range(COUNT)]


def ids(answer: Any) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [one["eval_id"] for one in answer.json()["evaluations"]]


def walk(api: Any, **query: Any) -> list[str]:
    found, cursor = [], ""
    while cursor is not None:
        answer = api.read.get(E, params={**query, "cursor": cursor})
        found += ids(answer)
        cursor = answer.json()["next"]
    return found


FILTERS: list[tuple[dict[str, Any], Callable[[int], bool]]] = [
    ({}, lambda _: True),
    ({"status": "completed"}, lambda n: n % 7 == 0),
    ({"status": ["completed", "queued"]}, lambda _: True),
    ({"status": "failed"}, lambda _: False),
    ({"language": "rust"}, lambda n: n % 10 == 0),
    ({"submitter": "team-1"}, lambda n: n % 3 == 1),
    ({"executor": "x"}, lambda n: n % 7 == 0),
    ({"metadata.shard": "2"}, lambda n: n % 4 == 2),
    ({"metadata.shard": "2", "submitter": "team-0"}, lambda n: n % 4 == 2 and n % 3 == 0),
    ({"metadata.absent": "2"}, lambda _: False),
    ({"executor_id": "x", "submitter": "team-0"}, lambda n: n % 21 == 0),
    ({"run_id": "run-1"}, lambda n: n % 2 == 1),
    ({"run_id": "run-1", "status": "completed"}, lambda n: n % 2 == 1 and n % 7 == 0),
    ({"status": ["queued", "failed", "lost"]}, lambda n: n % 7 != 0),
    ({"status": ["queued", "failed"], "language": "rust"}, lambda n: n % 7 != 0 and n % 10 == 0),
    ({"eval_id_prefix": "e03"}, lambda n: 30 <= n < 40),
    ({"eval_id_prefix": "e", "run_id": "run-0"}, lambda n: n % 2 == 0),
    ({"sort": "eval_id", "submitter": "team-1"}, lambda n: n % 3 == 1),
]


@pytest.mark.parametrize(("query", "matches"), FILTERS, ids=[str(query) for query, _ in FILTERS])
def test_a_list_holds_what_matches_in_order_however_it_is_read(
    api: Any, stored: list[str], query: dict[str, Any], matches: Callable[[int], bool]
) -> None:
    expected = [eval_id for number, eval_id in enumerate(stored) if matches(number)]
    for order, wanted in (("oldest", expected), ("newest", expected[::-1])):
        asked = {**query, "order": order}
        assert ids(api.read.get(E, params={**asked, "limit": 1000})) == wanted
        assert walk(api, **asked, limit=7) == wanted
        pages = [ids(api.read.get(E, params={**asked, "limit": 11, "offset": offset})) for offset in range(0, COUNT, 11)]
        assert list(chain(*pages)) == wanted
        exported = api.read.get(E, params={**asked, "format": "ndjson"})
        assert [json.loads(line)["eval_id"] for line in exported.text.splitlines()] == wanted
    counted = api.read.get(E, params={**query, "limit": 1, "total": "true"}).json()
    assert (counted["total"], counted["total_is_estimate"]) == (len(expected), False)


def test_a_page_read_by_cursor_looks_at_a_bounded_number(
    engine: Engine, stored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "SCAN", 10)
    rare = listing.Filter(metadata={"shard": "2"}, language="rust", oldest_first=True)
    pages: list[list[str]] = []
    after: listing.Position | None = None
    with engine.connect() as conn:
        while len(pages) < 20:
            page = listing.page(conn, rare, limit=10, after=after)
            pages.append([row["eval_id"] for row in page.rows])
            after = page.following
            if after is None:
                break
    expected = [one for number, one in enumerate(stored) if number % 4 == 2 and number % 10 == 0]
    assert len(pages) == COUNT // 10 + 1
    assert list(chain(*pages)) == expected


def test_a_list_that_takes_too_long_gives_what_it_found_and_where_to_go_on(
    engine: Engine, stored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By number a page is full, as long as that does not keep the database busy for longer than it is worth."""
    rare = listing.Filter(metadata={"shard": "2"}, language="rust", oldest_first=True)
    expected = [one for number, one in enumerate(stored) if number % 4 == 2 and number % 10 == 0]
    many = """INSERT INTO evaluations (eval_id, status, attempt, version, metadata, created_at)
        SELECT 'many-' || g, 'queued', 1, 1, '{"a": {"b": ["c"]}}', now() FROM generate_series(1, 100000) g"""
    with engine.connect() as conn:
        with conn.begin():
            conn.execute(text(many))
        assert (whole := listing.numbered_page(conn, rare, limit=10, offset=0))
        assert whole.following is None
        assert [row["eval_id"] for row in whole.rows] == expected
        assert listing.count(conn, rare) == (len(expected), False)
        monkeypatch.setattr(listing, "PATIENCE_S", 0.001)
        monkeypatch.setattr(listing, "LOOKED", COUNT + 5000)
        page = listing.numbered_page(conn, rare, limit=10, offset=0)
        assert page is not None
        assert [row["eval_id"] for row in page.rows] == expected
        assert page.following is not None
        assert page.following.eval_id.startswith("many-")
        assert listing.numbered_page(conn, rare, limit=10, offset=1) is None
        assert listing.count(conn, rare).is_estimate


def test_a_count_that_takes_too_long_costs_the_count_and_not_the_page(start_api: Callable[..., Any]) -> None:
    impatient = (
        "import evalstore.storage.listing as listing, evalstore.api.__main__ as main\nlisting.PATIENCE_S = 0.001\nmain.main()"
    )
    api = start_api(command=("-c", impatient))
    many = """INSERT INTO evaluations (eval_id, status, attempt, version, metadata, created_at)
        SELECT g, 'queued', 1, 1, '{}', now() FROM generate_series(1, 100000) g"""
    with psycopg.connect(api.database_url) as conn:
        conn.execute(many)
    answer = api.read.get(E, params={"cursor": "", "limit": 10, "total": "true"})
    assert (answer.status_code, answer.json()["total_is_estimate"]) == (200, True)
    assert len(answer.json()["evaluations"]) == 10


@pytest.mark.parametrize(
    "other", [{}, {"submitter": "team-1"}, {"submitter": "team-0", "order": "oldest"}, {"status": "queued"}]
)
def test_a_cursor_of_another_list_is_refused(api: Any, stored: list[str], other: dict[str, str]) -> None:
    cursor = api.read.get(E, params={"submitter": "team-0", "cursor": "", "limit": 5}).json()["next"]
    answer = api.read.get(E, params={**other, "cursor": cursor})
    assert (answer.status_code, [fault["field"] for fault in answer.json()["faults"]]) == (422, ["cursor"])


@pytest.mark.parametrize("sort", ["duration_ms", "memory_bytes", "score"])
def test_a_run_is_sorted_by_a_value_and_evaluations_without_it_come_last(api: Any, engine: Engine, sort: str) -> None:
    values = [3, 1, None, 2, None, 2]
    with engine.connect() as conn:
        for number, value in enumerate(values):
            ended = {**factories.unique_event("completed", eval_id=f"e{number}", exit_code=0), sort: value}
            event_store.store(conn, [parse({**event(number), "eval_id": f"e{number}", "run_id": "r"}), parse(ended)])
    walked = {order: walk(api, run_id="r", sort=sort, order=order, limit=2) for order in ("oldest", "newest")}
    assert walked == {"oldest": ["e1", "e3", "e5", "e0", "e2", "e4"], "newest": ["e0", "e5", "e3", "e1", "e4", "e2"]}


def test_since_and_until_are_about_when_an_evaluation_was_created(api: Any, stored: list[str]) -> None:
    times = [one["created_at"] for one in api.read.get(E, params={"order": "oldest"}).json()["evaluations"]]
    found = ids(api.read.get(E, params={"since": times[10], "until": times[20], "order": "oldest"}))
    assert found == stored[10:20]


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=1001", "limit=x", "offset=-1", "status=done", "order=up", "cursor=x", "cursor=W10", "since=yesterday",
     "since=2026-01-01T00:00:00", "sort=x", "metadata=x", "metadata.=x", "metadata.a=%00", "submitter=%00", "cursor=&offset=1",
     "metadata.a=1&metadata.a=2", "total=maybe", "sort=duration_ms", "sort=created_at&eval_id_prefix=e", "eval_id_prefix=%2F",
     "run_id=%00", "executor_id=%00", "format=xml", "cursor=WyIwMDAxIiwiLi4iXQ"],
)  # fmt: skip
def test_a_parameter_that_is_wrong_is_named(api: Any, query: str) -> None:
    answer = api.read.get(f"{E}?{query}")
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    name = query.partition("=")[0] if query != "cursor=&offset=1" else "offset"
    assert [fault["field"] for fault in answer.json()["faults"]] == [name]
    assert "Input should" not in answer.json()["detail"]  # pydantic's words


def test_the_log_of_an_evaluation_is_read_in_pages(api: Any) -> None:
    made = api.both.post(E, json={"eval_id": "e", "code": "x" * 5000, "occurred_at": "2026-01-01T00:00:00Z"})
    for second in range(1, 8):
        api.both.put(f"{E}/e", json={"status": "running", "occurred_at": f"2026-01-01T00:00:0{second}Z"})
    first = api.read.get(f"{E}/e/events", params={"limit": 5}).json()
    rest = api.read.get(f"{E}/e/events", params={"limit": 5, "cursor": first["next"]}).json()
    events = first["events"] + rest["events"]
    assert made.status_code == 201
    assert ([one["type"] for one in events], rest["next"]) == (["evaluation:queued"] + ["evaluation:started"] * 7, None)
    assert (events[0]["code_size"], "code" in events[0]) == (5000, False)
    assert api.read.get(events[0]["code_url"]).text == "x" * 5000
    assert api.read.get(f"{E}/absent/events").status_code == 404


def test_each_line_of_a_batch_is_answered(api: Any) -> None:
    lines = [
        event(1),
        event(1),
        event(1, code="another"),
        event(2, type="evaluation:completed"),
        {"type": "evaluation:started", "eval_id": "e001", "metadata": {"a": 1}},
    ]
    body = "\n".join([*map(json.dumps, lines), "", "{", "[]"])
    answer = api.both.post("/storage/events:batch", content=body, headers={"Content-Type": "application/x-ndjson"})
    told = api.lines(answer)
    assert [(one["line"], one["outcome"]) for one in told] == [
        (1, "applied"), (2, "duplicate"), (3, "reused"), (4, "invalid"), (5, "applied"), (7, "invalid"), (8, "invalid"),
    ]  # fmt: skip
    assert [fault["field"] for fault in told[3]["faults"]] == ["exit_code", "code", "language", "submitter", "run_id"]
    assert api.read.get(f"{E}/e001").json()["version"] == 2


def test_events_of_one_evaluation_may_leave_out_its_id(api: Any) -> None:
    one = api.both.post(f"{E}/e/events", json={"type": "evaluation:queued", "code": "c"}, headers={"Idempotency-Key": "k"})
    again = api.both.post(f"{E}/e/events", json={"type": "evaluation:queued", "code": "c"}, headers={"Idempotency-Key": "k"})
    body = b'{"type": "evaluation:started"}\n{"type": "evaluation:started", "eval_id": "other"}\n'
    many = api.both.post(f"{E}/e/events", content=body, headers={"Content-Type": "application/x-ndjson"})
    assert [one.json()["outcome"], again.json()["outcome"]] == ["applied", "duplicate"]
    assert [line["outcome"] for line in api.lines(many)] == ["applied", "invalid"]
    assert api.both.post(f"{E}/e/events", json={"type": "evaluation:lost"}).status_code == 422
    assert api.read.get(f"{E}/other").status_code == 404


def test_a_batch_holds_at_most_ten_thousand_events(api: Any) -> None:
    headers = {"Content-Type": "application/x-ndjson"}
    line = json.dumps({"type": "evaluation:started", "eval_id": "e"})
    full = api.both.post("/storage/events:batch", content="\n".join([line] * 10_000), headers=headers)
    over = api.both.post("/storage/events:batch", content="\n".join([line] * 10_001), headers=headers)
    none = api.both.post("/storage/events:batch", content="\n", headers=headers)
    assert (full.status_code, over.status_code, none.status_code) == (200, 422, 422)
    assert api.read.get(f"{E}/e").json()["version"] == 10_000


def scans(plan: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the scans of a plan: the index, or the kind of scan without one, and the rows that it read."""
    if "Scan" in plan["Node Type"] and plan["Node Type"] != "Subquery Scan":
        rows = plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)
        yield plan.get("Index Name", plan["Node Type"]), int(rows * plan["Actual Loops"])
    for part in plan.get("Plans", ()):
        yield from scans(part)


@pytest.mark.parametrize(
    ("chosen", "index"),
    [
        (listing.Filter(run_id="run-1"), "evaluations_by_run"),
        (listing.Filter(submitter="s-1"), "evaluations_by_submitter"),
        (listing.Filter(executor_id="x-1"), "evaluations_by_executor"),
        (listing.Filter(statuses=["failed", "lost"]), "evaluations_by_status"),
        (listing.Filter(metadata={"a%'b": "m-1"}), list_indexes.metadata_index("a%'b")),
        (listing.Filter(eval_id_prefix="e1"), "evaluations_pkey"),
        (listing.Filter(), "evaluations_by_time"),
    ],
    ids=str,
)
@pytest.mark.parametrize("analyzed", [False, True], ids=["without statistics of the planner", "with them"])
def test_a_page_reads_its_index_and_few_rows(conn: Connection, chosen: listing.Filter, index: str, analyzed: bool) -> None:
    """Also where all matches are old, and the planner would rather walk through the newest."""
    migrations.upgrade(_url(conn), indexed_metadata=["a%'b"])
    fill = """INSERT INTO evaluations
        (eval_id, status, attempt, version, run_id, submitter, executor_id, metadata, created_at)
        SELECT 'e' || g, CASE WHEN g < 2000 AND g % 2 = 0 THEN 'failed' ELSE 'completed' END, 1, 1, 'run-' || g / 2000,
            's-' || g / 2000, 'x-' || g / 2000, jsonb_build_object('a%''b', 'm-' || g / 2000), now() + g / 10 * interval '1 s'
        FROM generate_series(1, 20000) g"""
    with conn.begin():
        database.driver(conn).execute(fill.encode())
        if analyzed:
            conn.execute(text("ANALYZE evaluations"))
    plan = listing.explain(conn, chosen, limit=10)
    found = list(scans(plan))
    assert {name for name, _ in found} == {index}
    assert sum(rows for _, rows in found) <= 40
    first = listing.page(conn, chosen, limit=10)
    assert len(first.rows) == 10
    assert first.following is not None
    assert next(scans(listing.explain(conn, chosen, limit=10, after=first.following)))[0] == index


def _url(conn: Connection) -> str:
    raw = database.driver(conn)
    return f"{raw.info.dsn} password={raw.info.password}"


def test_a_text_too_long_for_an_index_is_stored_and_found(conn: Connection) -> None:
    long = "".join(chr(0x4E00 + (number * 7919) % 20_000) for number in range(1000))
    for number, name in enumerate((long, long[:-1] + "x")):
        queued = factories.unique_event("queued", f"e{number}", code="", submitter=name, metadata={"a%'b": name * 2})
        event_store.store(conn, [parse(queued)])
    migrations.upgrade(_url(conn), indexed_metadata=["a%'b"])
    for chosen in (listing.Filter(submitter=long), listing.Filter(metadata={"a%'b": long * 2})):
        assert [row["eval_id"] for row in listing.page(conn, chosen, limit=10).rows] == ["e0"]


def test_indexes_of_metadata_are_built_and_dropped_and_broken_ones_are_built_again(conn: Connection) -> None:
    migrations.upgrade(_url(conn), indexed_metadata=["a", "b"])
    assert {list_indexes.metadata_index("a"), list_indexes.metadata_index("b")} <= list_indexes.existing(conn)
    with conn.begin():
        conn.execute(text("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'evaluations_by_run'::regclass"))
    assert "evaluations_by_run" not in list_indexes.existing(conn)
    conn.rollback()
    migrations.upgrade(_url(conn), indexed_metadata=["b"])
    found = list_indexes.existing(conn)
    assert "evaluations_by_run" in found
    assert list_indexes.metadata_index("a") not in found
