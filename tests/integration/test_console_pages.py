"""The console's pages of evaluations and runs: what they show, to whom, and what they cost."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import psycopg
import pytest
from sqlalchemy import Engine

from evalstore.storage import api_keys, database, overview_samples, rollups, sink_cursors
from evalstore.storage.visibility import Visibility
from tests.factories import unique_event
from tests.integration.conftest import READ
from tests.integration.test_console import signed_in
from tests.polling import looks

E = "/storage/evaluations"
PAGE_BYTES = 100_000


@pytest.fixture
def engine(api: Any) -> Iterator[Engine]:
    made = database.engine(api.database_url)
    yield made
    made.dispose()


@pytest.fixture
def console(api: Any) -> httpx.Client:
    return signed_in(api, READ)


def send(api: Any, *events: dict[str, Any]) -> None:
    body = "\n".join(json.dumps({"code": "c", **event} if "queued" in event["type"] else event) for event in events)
    answer = api.both.post("/storage/events:batch", content=body, headers={"Content-Type": "application/x-ndjson"})
    outcomes = {json.loads(line)["outcome"] for line in answer.text.splitlines()}
    assert outcomes == {"applied"}, answer.text


def test_the_list_has_the_filters_and_cursors_of_the_api(api: Any, console: httpx.Client) -> None:
    for number in range(120):
        team = "blue" if number % 2 else "green"
        send(api, unique_event("queued", f"e{number:03d}", submitter="ann", metadata={"team": team}))
    filters = {"status": "queued", "submitter": "ann", "metadata.team": "blue"}
    first = console.get("/console/evaluations", params={**filters, "format": "json"}).json()
    assert (len(first["evaluations"]), first["total"], first["total_is_estimate"]) == (50, 60, False)
    second = console.get("/console/evaluations", params={**filters, "format": "json", "cursor": first["next"]}).json()
    assert (len(second["evaluations"]), second["next"]) == (10, None)
    ids = [row["eval_id"] for row in first["evaluations"] + second["evaluations"]]
    assert ids == [f"e{number:03d}" for number in range(119, 0, -2)]
    page = console.get("/console/evaluations", params={"metadata": "team=blue", "status": ""})
    assert page.status_code == 200
    assert page.text.count('href="/console/evaluations/e') == 50
    assert console.get("/console/evaluations", params={"statos": "queued"}).status_code == 422
    assert console.get("/console/evaluations", params={"cursor": "x"}).status_code == 422


def test_the_count_of_a_list_is_bounded(api: Any, console: httpx.Client) -> None:
    with psycopg.connect(api.database_url, autocommit=True) as conn:
        conn.execute(
            "INSERT INTO evaluations (eval_id, status, attempt, version, metadata) "
            "SELECT 'e' || n, 'queued', 1, 1, '{}' FROM generate_series(1, 12000) n"
        )
        conn.execute("ANALYZE evaluations")
    found = console.get("/console/evaluations?format=json").json()
    assert found["total_is_estimate"]
    assert 10_000 <= found["total"] <= 14_000


def test_an_evaluation_shows_its_attempts_and_content(api: Any, console: httpx.Client) -> None:
    send(
        api,
        unique_event("queued", "e", code="print(1)", language="python", run_id="r", submitter="ann", metadata={"a": [1]}),
        unique_event("started", "e", attempt=1, executor_id="x1"),
        unique_event("failed", "e", attempt=1, error="worker went away"),
        unique_event("started", "e", attempt=2, executor_id="x2"),
        unique_event("completed", "e", attempt=2, exit_code=0, output="\x1b[32mok\x1b[0m\n"),
    )
    page = console.get("/console/evaluations/e").text
    for part in (
        "attempt 2",
        'class="fg-2">ok',
        "/console/runs/r",
        '<span class="nb">print</span>',
        "/console/evaluations/e/output",
    ):
        assert part in page
    assert page.count('class="lane"') == 2
    twin = console.get("/console/evaluations/e?format=json").json()
    assert twin["evaluation"] == api.read.get(f"{E}/e").json()
    assert twin["events"] == api.read.get(f"{E}/e/events").json()["events"]
    assert console.get("/console/evaluations/none").status_code == 404
    assert console.get("/console/evaluations/..%2fx").status_code == 404


def test_a_long_log_is_read_by_page(api: Any, console: httpx.Client) -> None:
    send(api, *(unique_event("started", "e", attempt=attempt) for attempt in range(1, 251)))
    seen, cursor = [], ""
    for _ in range(3):
        page = console.get("/console/evaluations/e", params={"format": "json", "cursor": cursor}).json()
        seen += [event["attempt"] for event in page["events"]]
        cursor = page["next"]
    assert cursor is None
    assert sorted(seen) == list(range(1, 251))


def test_a_hundred_megabytes_open_at_once(api: Any, console: httpx.Client) -> None:
    line = "0123456789abcdef" * 4 + "\n"
    text = line * (60 * 1024 * 1024 // len(line)) + "the needle\n"
    api.both.post(E, json={"eval_id": "e", "code": "c"})
    api.both.put(f"{E}/e", json={"status": "completed", "exit_code": 0, "output": text}).raise_for_status()
    lines = text.count("\n")
    began = time.monotonic()
    first = console.get("/console/evaluations/e/output")
    assert time.monotonic() - began < 2
    assert first.status_code == 200
    assert int(first.headers.get("content-length", 0)) < PAGE_BYTES
    assert 'data-line="1"' in first.text
    end = console.get("/console/evaluations/e/output", params={"before": str(len(text)), "format": "json"}).json()
    assert end["stop"] == len(text)
    found = console.get("/console/evaluations/e/output", params={"q": "needle", "format": "json"}).json()
    assert [match["line"] for match in found["matches"]] in ([lines], [])  # [] where a slow machine stops at the time limit
    part = console.get("/console/evaluations/e/output/raw", headers={"Range": "bytes=0-9"})
    assert (part.status_code, part.text) == (206, "0123456789")
    assert part.headers["content-disposition"].startswith("attachment")
    assert "sandbox" in part.headers["content-security-policy"]


def test_bytes_are_shown_in_hexadecimal(api: Any, console: httpx.Client) -> None:
    api.both.post(E, json={"eval_id": "e", "code": "c"})
    api.both.put(f"{E}/e", json={"status": "completed", "exit_code": 0, "output_b64": "AAECA/9BQg=="}).raise_for_status()
    twin = console.get("/console/evaluations/e/output?format=json").json()
    assert (twin["is_hex"], twin["rows"][0]["hex"]) == (True, "00 01 02 03 ff 41 42")
    assert "00 01 02 03 ff 41 42" in console.get("/console/evaluations/e/output").text


def test_a_link_leads_to_the_trace(start_api: Callable[..., Any]) -> None:
    api = start_api(EVALSTORE_CONSOLE_TRACE_URL="https://traces.example/t/{trace_id}?of={eval_id}")
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    send(
        api,
        unique_event("queued", "e", metadata={"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}),
        unique_event("queued", "f"),
    )
    console = signed_in(api, READ)
    assert f'href="https://traces.example/t/{trace_id}?of=e"' in console.get("/console/evaluations/e").text
    assert "traces.example" not in console.get("/console/evaluations/f").text


def test_a_restricted_key_sees_only_its_own(api: Any, engine: Engine) -> None:
    for submitter in ("ann", "bob"):
        e, run = f"{submitter}-e", f"{submitter}-run"
        send(
            api,
            unique_event("queued", e, submitter=submitter, run_id=run),
            unique_event("completed", e, exit_code=0, output="o"),
        )
    with engine.connect() as conn:
        key, _ = api_keys.create(conn, "ann", ["read"], visibility=Visibility(submitter="ann"))
    console = signed_in(api, key)
    rows = console.get("/console/evaluations?format=json").json()["evaluations"]
    assert [row["eval_id"] for row in rows] == ["ann-e"]
    for path in ("ann-e", "ann-e/output", "ann-e/output/raw"):
        assert console.get(f"/console/evaluations/{path}").status_code == 200
        assert console.get(f"/console/evaluations/{path.replace('ann', 'bob')}").status_code == 404
    with console.stream("GET", "/console/evaluations/bob-e/live") as answer:
        assert "bob" not in answer.read().decode()
    assert console.get("/console/runs/bob-run").status_code == 404
    assert console.get("/console").headers["location"] == "/console/evaluations"
    for path in ("/console/live", "/console/runbook", "/console?format=json"):
        assert console.get(path).status_code == 404
    assert 'href="/console/runbook"' not in console.get("/console/evaluations").text


def fill_runs(api: Any, engine: Engine) -> None:
    """Two runs of four evaluations, of which one changed and one is new."""
    for run, results in (("a", (0, 0, 1)), ("b", (0, 1, 1, 0))):
        for number, exit_code in enumerate(results):
            eval_id = f"{run}/task-{number}".replace("/", ".")
            send(
                api,
                unique_event("queued", eval_id, run_id=run, metadata={"task": f"t{number}"}),
                unique_event("completed", eval_id, exit_code=exit_code, score=number / 4, duration_ms=100 * (number + 1)),
            )
    with engine.connect() as conn:
        count_runs(conn)


def count_runs(conn: Any) -> None:
    """Keep the sums of runs, as the process of sinks does."""
    sink_cursors.create(conn, rollups.NAME, "statistics")
    lease = sink_cursors.claim(conn, rollups.NAME, "test")
    assert lease is not None
    with database.errors(), conn.begin():
        ids = [row[0] for row in database.driver(conn).execute("SELECT eval_id FROM evaluations").fetchall()]
    rollups.apply(conn, lease, lease.cursor, ids, [])


@pytest.mark.parametrize("by", [None, "task"])
def test_two_runs_show_which_evaluations_changed_their_outcome(
    api: Any, engine: Engine, console: httpx.Client, by: str | None
) -> None:
    fill_runs(api, engine)
    twin = console.get("/console/compare", params={"a": "a", "b": "b", "by": by or "", "format": "json"}).json()
    assert {(move["a"], move["b"]): move["count"] for move in twin["moves"]} == {
        ("passed", "passed"): 1,
        ("passed", "exit code"): 1,
        ("exit code", "exit code"): 1,
        ("missing", "passed"): 1,
    }
    assert [(row["a_eval_id"], row["b_eval_id"]) for row in twin["changed"]] == [("a.task-1", "b.task-1"), (None, "b.task-3")]
    page = console.get("/console/compare", params={"a": "a", "b": "b"})
    assert page.status_code == 200
    assert "How outcomes moved" in page.text


def test_a_run_shows_its_progress_distributions_slowest_and_failing(api: Any, engine: Engine, console: httpx.Client) -> None:
    fill_runs(api, engine)
    assert [run["run_id"] for run in console.get("/console/runs?format=json").json()["runs"]] == ["b", "a"]
    twin = console.get("/console/runs/b?format=json").json()
    assert twin["run"]["evaluations"] == 4
    assert [row["eval_id"] for row in twin["slowest"]] == ["b.task-3", "b.task-2", "b.task-1", "b.task-0"]
    page = console.get("/console/runs/b").text
    assert page.count('class="bars"') == 2
    assert 'class="shares"' in page
    assert console.get("/console/runs/none").status_code == 404


def test_curves_survive_a_restart(start_api: Callable[..., Any], database_url: str) -> None:
    api = start_api()
    engine = database.engine(database_url)
    with engine.connect() as conn:
        overview_samples.add(conn, {"waiting": 7, "oldest_age_s": 1, "events_per_s": 3, "workers": 2})
    engine.dispose()
    page = signed_in(api, READ).get("/console").text
    assert "Messages waiting, last 24 hours, at most 7" in page


def transactions(conn: psycopg.Connection[Any]) -> int:
    ((count,),) = conn.execute(
        "SELECT pg_stat_get_db_xact_commit(oid) FROM pg_database WHERE datname = current_database()"
    ).fetchall()
    conn.execute("SELECT pg_stat_clear_snapshot()")
    return int(count)


def test_a_hundred_open_overviews_cost_postgresql_no_more_than_one(start_api: Callable[..., Any]) -> None:
    api = start_api()
    console = signed_in(api, READ)
    cookies = dict(console.cookies)
    costs = []
    for pages in (1, 100):
        limits = httpx.Limits(max_connections=200)
        with ExitStack() as stack, psycopg.connect(api.database_url, autocommit=True) as conn:
            client = stack.enter_context(httpx.Client(base_url=api.url, cookies=cookies, timeout=60, limits=limits))
            streams = [stack.enter_context(client.stream("GET", "/console/live")) for _ in range(pages)]
            lines = [stream.iter_lines() for stream in streams]  # An iterator that is dropped closes its stream.
            for each in lines:
                while not next(each).startswith("data: "):
                    pass
            before, began = transactions(conn), time.monotonic()
            for _ in looks(8):
                if time.monotonic() - began > 6:
                    break
            costs.append(transactions(conn) - before)
    assert costs[0] > 0
    assert costs[1] <= costs[0] * 1.5 + 10
