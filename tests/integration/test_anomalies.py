"""The anomaly detector behind the runner: each evaluation counts once, whatever dies, and what it finds can be seen."""

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import dict_row, tuple_row
from sqlalchemy import Connection, Engine

from evalstore.sinks.anomaly_options import AnomalyOptions
from evalstore.sinks.protocol import Batch, SinkEvent
from evalstore.storage import anomalies, api_keys, database, event_store, outbox
from evalstore.storage.anomalies import Anomaly, Detection, Filter
from evalstore.storage.detector_state import SavedGroup
from evalstore.storage.operator_actions import Intent
from evalstore.storage.outbox import Commit, Relayed, StreamId
from evalstore.storage.visibility import Visibility
from models.anomalies import group_key
from models.errors import Outage
from models.events import parse
from models.webhooks import now
from tasks.confirmations import Confirmations
from tests.executions import Execution, executions, planted
from tests.integration.shell import Operator
from tests.receivers import Receiver
from tests.sinks import Runner
from worker.broker import Broker

pytest.importorskip("river", reason="river is not installed: run `make setup-integrations`")

from evalstore.sinks import anomaly_state
from evalstore.sinks.anomaly_detector import Group
from evalstore.sinks.anomaly_sink import AnomalySink

Eventually = Callable[..., None]
Start = Callable[..., Runner]
SINKS = '[watch]\ntype = "anomaly"\nmin_evaluations = 1\npause_s = 0\n'
HOOKS = '[hooks]\ntype = "webhook"\nfirst_retry_s = 0.05\nrequest_timeout_s = 2\n'
LOCAL = {"EVALSTORE_WEBHOOK_ALLOW": "127.0.0.0/8"}
INTENT = Intent("anomalies ack", "ada", "seen", {})


def events(number: int, row: Execution) -> list[dict[str, Any]]:
    """The events of an execution, a second after the one before."""
    groups, at = row.groups(number), datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
    shared = {"eval_id": f"e-{number}", "occurred_at": at}
    queued = {"type": "evaluation:queued", "code": "", "language": groups["language"], "submitter": groups["submitter"]}
    completed = {"type": "evaluation:completed", "executor_id": groups["executor"], "output": "x" * row.output_bytes}
    return [shared | queued | {"event_id": uuid4()}, shared | completed | row.fields | {"event_id": uuid4()}]


def store(conn: Connection, rows: Sequence[Execution], start: int = 0, size: int = 250) -> None:
    """Store executions, so many in a commit."""
    for first in range(0, len(rows), size):
        given = [parse(one) for at, row in enumerate(rows[first : first + size], start + first) for one in events(at, row)]
        event_store.store(conn, given)


@pytest.fixture
def plain(database_url: str) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    with psycopg.connect(database_url, autocommit=True, row_factory=dict_row) as conn:
        yield conn


@pytest.fixture
def start(tmp_path: Path, database_url: str, redis_url: str) -> Iterator[Start]:
    """`start()`: a runner of the detector."""
    made: list[Runner] = []

    def begin(sinks: str = SINKS) -> Runner:
        folder = tmp_path / f"runner-{len(made)}"
        folder.mkdir()
        servers = {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url} | LOCAL
        made.append(Runner(folder, servers, sinks))
        made[-1].start()
        return made[-1]

    yield begin
    for runner in made:
        runner.kill()
        print(f"--- {runner.log}\n{runner.log.read_text()[-4000:]}")


@pytest.fixture
def sink(database_url: str) -> Iterator[Callable[[], AnomalySink]]:
    made: list[AnomalySink] = []

    def begin() -> AnomalySink:
        options = AnomalyOptions(type="anomaly", min_evaluations=1, pause_s=0)
        made.append(AnomalySink("watch", options, database.engine(database_url, pool_size=1)))
        return made[-1]

    yield begin
    for one in made:
        one.close()


def counted(plain: psycopg.Connection[dict[str, Any]], dimension: str = "language", value: str = "python") -> int:
    """How many evaluations of a group the kept state has seen."""
    query = "SELECT dimension, key, used, state, digest FROM anomaly_groups WHERE dimension = %s AND key = %s"
    with plain.cursor(row_factory=tuple_row) as cursor:
        found = cursor.execute(query, [*Group.of(dimension, value)]).fetchone()
    if found is None:
        return 0
    try:
        return anomaly_state.load(SavedGroup(*found)).series["failure_rate"].count
    except anomaly_state.UnreadableState:
        return -1


def found(engine: Engine, **chosen: str) -> list[Anomaly]:
    with engine.connect() as conn:
        return anomalies.page(conn, Filter(**chosen), 1000)


def detect(engine: Engine, *values: str, dimension: str = "executor", eval_ids: tuple[str, ...] = ("e-1", "e-2")) -> list[UUID]:
    """Findings, as the detector writes them."""
    made = [
        Detection(
            dimension, value, group_key(dimension, value), "duration_ms", "drift", 20.0, 55.5, eval_ids, str(uuid4()), now()
        )
        for value in values
    ]
    with engine.connect() as conn, conn.begin():
        return anomalies.record(database.driver(conn), "watch", made)


def batch(position: int, rows: Sequence[Execution], first: int = 0, at: datetime | None = None, **cursor: Any) -> Batch:
    """Completed executions as the runner gives them, up to a position."""
    recorded_at = (at or datetime(2026, 1, 1, tzinfo=UTC)).isoformat()
    made = [
        SinkEvent(
            f"e-{number}",
            str(uuid4()),
            "evaluation:completed",
            {
                "type": "evaluation:completed",
                "executor_id": "x",
                "recorded_at": recorded_at,
                "occurred_at": recorded_at,
                **row.fields,
            },
        )
        for number, row in enumerate(rows, first)
    ]
    place = {"place": (position, 0, recorded_at), "generation": 0, "timeline": 1, "replay_until": None, "replay_at": None}
    return Batch(made, place | cursor)


@pytest.mark.parametrize(
    ("case", "metric", "kind"),
    [("slow", "duration_ms", "drift"), ("failing", "failure_rate", "drift"), ("memory", "memory_bytes", "outlier")],
)
def test_what_is_planted_is_found_with_the_evaluations_that_show_it(
    start: Start, conn: Connection, engine: Engine, eventually: Eventually, case: str, metric: str, kind: str
) -> None:
    rows = planted(case, 1500)
    start()
    store(conn, rows)
    eventually(lambda: found(engine, metric=metric, kind=kind, dimension="language"), within_s=60)
    (one,) = found(engine, metric=metric, kind=kind, dimension="language")
    assert (one.value, one.state, one.sink) == ("python", "open", "watch")
    assert one.observed > 1.3 * one.expected
    assert min(int(eval_id.removeprefix("e-")) for eval_id in one.eval_ids) >= 1500, str(one._asdict())


def test_nothing_is_found_in_10000_normal_executions(
    start: Start, conn: Connection, plain: psycopg.Connection[dict[str, Any]], engine: Engine, eventually: Eventually
) -> None:
    start()
    store(conn, executions("normal"), size=1000)
    eventually(lambda: counted(plain) == 10_000, within_s=120)
    assert found(engine) == []


def test_a_finding_is_confirmed_once_in_the_commit_that_holds_it(
    engine: Engine, conn: Connection, broker: Broker, plain: psycopg.Connection[dict[str, Any]]
) -> None:
    (first,) = detect(engine, "x")
    assert detect(engine, "x", eval_ids=("e-3",)) == []
    (row,) = plain.execute("SELECT count, body FROM confirmations").fetchall()
    assert row["count"] == 1
    told = json.loads(row["body"])
    assert told.pop("recorded_at")
    assert told == {
        "type": "storage:anomaly:detected",
        "anomaly_id": str(first),
        "kind": "drift",
        "dimension": "executor",
        "value": "x",
        "metric": "duration_ms",
        "expected": 20.0,
        "observed": 55.5,
    }
    (one,) = found(engine)
    assert (one.occurrences, one.eval_ids) == (2, ["e-1", "e-2", "e-3"])


def test_a_service_reads_findings_among_its_confirmations(broker: Broker, engine: Engine, conn: Connection) -> None:
    detect(engine, "x")
    bodies = list[str]()

    def publish(_: StreamId, commits: Sequence[Commit]) -> Relayed:
        bodies.extend(one.body for one in commits)
        return Relayed(StreamId(1, 1), done=True)

    outbox.relay(conn, publish)
    client, stream = broker.client, broker.names.stream
    for number, line in enumerate([*bodies, *bodies], 1):
        client.xadd(stream, {"confirmation": line}, id=f"{number}-1")
    read = list(Confirmations("billing", client=client, namespace=broker.namespace, idle_s=0.1))
    assert [one["type"] for one in read] == ["storage:anomaly:detected"] * 2


def test_a_finding_keeps_its_first_and_last_evaluations(engine: Engine) -> None:
    detect(engine, "x", eval_ids=("first",))
    for number in range(50):
        detect(engine, "x", eval_ids=(f"e-{number}",))
    (one,) = found(engine)
    assert len(one.eval_ids) == 20
    assert (one.eval_ids[0], one.eval_ids[-1], one.occurrences) == ("first", "e-49", 51)


def test_every_evaluation_counts_once_although_runners_are_killed(
    start: Start, conn: Connection, plain: psycopg.Connection[dict[str, Any]], eventually: Eventually
) -> None:
    rows = executions("normal")[:3000]
    runner = start(SINKS + "batch_events = 100\n")
    for first in range(0, 3000, 500):
        store(conn, rows[first : first + 500], first, size=20)
        seen = counted(plain)
        eventually(lambda: counted(plain) > seen, within_s=60)  # noqa: B023 - called at once
        runner.kill()
        with conn.begin():
            conn.exec_driver_sql("UPDATE sinks SET lease_until = NULL")
        runner.start()
    eventually(lambda: counted(plain) == 3000, within_s=60)
    assert counted(plain, "submitter", "submitter-1") == 750
    assert counted(plain, "executor", "executor-1") == 1000


def test_a_batch_that_was_committed_without_an_answer_counts_once(
    sink: Callable[[], AnomalySink], plain: psycopg.Connection[dict[str, Any]]
) -> None:
    one = sink()
    assert one.cursor() is None
    rows = executions("normal")
    one.write(batch(1, rows[:10]))
    one._detector = None  # as after an outage while it was written
    one.write(batch(1, rows[:10]))
    assert counted(plain, "executor", "x") == 10
    one.write(batch(2, rows[10:30], 10))
    assert counted(plain, "executor", "x") == 30
    again = sink()
    cursor = again.cursor()
    assert cursor is not None
    assert cursor["place"][0] == 2


def test_a_runner_that_lost_its_lease_changes_nothing(
    sink: Callable[[], AnomalySink], plain: psycopg.Connection[dict[str, Any]]
) -> None:
    old, new, rows = sink(), sink(), executions("normal")
    old.cursor()
    old.write(batch(1, rows[:10]))
    new.cursor()
    for _ in range(2):
        with pytest.raises(Outage, match="another process"):
            old.write(batch(2, rows[10:30], 10))
    new.write(batch(2, rows[10:30], 10))
    assert counted(plain, "executor", "x") == 30


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE anomaly_groups SET state = 'x'",
        "UPDATE anomaly_groups SET state = 'x', digest = sha256('x')",
        "UPDATE anomaly_detectors SET library = 'river 0.1'",
    ],
)
def test_state_that_cannot_be_read_is_learned_again_from_the_log(
    start: Start,
    conn: Connection,
    plain: psycopg.Connection[dict[str, Any]],
    engine: Engine,
    eventually: Eventually,
    damage: str,
) -> None:
    rows = planted("failing", 1500)
    runner = start()
    store(conn, rows)
    eventually(lambda: counted(plain) == 2000, within_s=60)
    before = [(one.id, one.occurrences) for one in found(engine)]
    assert before
    runner.kill()
    with conn.begin():
        conn.exec_driver_sql(damage)
        conn.exec_driver_sql("UPDATE sinks SET lease_until = NULL")
    store(conn, executions("normal")[:10], 2000)
    runner.start()
    eventually(lambda: counted(plain) == 2010, within_s=60)
    assert [(one.id, one.occurrences) for one in found(engine)] == before
    assert "learns again from the event log" in runner.log.read_text()


def test_a_rewind_trains_anew_and_reports_nothing_twice(
    start: Start,
    conn: Connection,
    plain: psycopg.Connection[dict[str, Any]],
    engine: Engine,
    eventually: Eventually,
    operator: Operator,
) -> None:
    start()
    store(conn, planted("failing", 1500))
    eventually(lambda: counted(plain) == 2000, within_s=60)
    before = [(one.id, one.occurrences) for one in found(engine)]
    with conn.begin():
        conn.exec_driver_sql("UPDATE evaluation_events SET recorded_at = recorded_at - interval '3 hours'")
    assert operator.evalstore("sinks", "rewind", "watch", "--to", "start").status == 0

    def is_trained() -> bool:
        row = plain.execute("SELECT replay_until FROM sinks").fetchone()
        return row is not None and row["replay_until"] is None and counted(plain) == 2000

    eventually(is_trained, within_s=60)
    assert [(one.id, one.occurrences) for one in found(engine)] == before


def test_a_replay_of_the_last_minutes_counts_nothing_twice(
    sink: Callable[[], AnomalySink], plain: psycopg.Connection[dict[str, Any]]
) -> None:
    one, rows, at = sink(), executions("normal"), datetime(2026, 1, 1, 12, tzinfo=UTC)
    one.cursor()
    one.write(batch(1, rows[:10], at=at))
    replay: dict[str, Any] = {
        "generation": 1,
        "replay_until": at.isoformat(),
        "replay_at": (at.isoformat(), "", at.isoformat(), str(uuid4())),
    }
    one.write(batch(1, rows[:10], at=at, **replay))
    one.write(batch(1, rows[10:15], 10, at=at + timedelta(seconds=1), **replay))
    assert counted(plain, "executor", "x") == 15


def test_an_erased_evaluation_is_named_in_no_finding(engine: Engine, conn: Connection, operator: Operator) -> None:
    store(conn, executions("normal")[:3])
    detect(engine, "x")
    detect(engine, "alice", dimension="submitter", eval_ids=("e-1",))
    detect(engine, "bob", dimension="submitter", eval_ids=("e-1", "e-0"))
    erased = operator.evalstore("erase", "e-1", "--reason", "asked for", "--yes", "-o", "json")
    assert erased.status == 0, erased.err
    assert {one.value: one.eval_ids for one in found(engine)} == {"x": ["e-2"], "bob": ["e-0"]}


def test_an_erasure_removes_what_a_late_batch_brought(sink: Callable[[], AnomalySink], engine: Engine) -> None:
    one = sink()
    one.cursor()
    one.write(batch(1, planted("failing", 1500)))
    eval_id = found(engine)[0].eval_ids[-1]
    one.erase(eval_id)
    assert all(eval_id not in one.eval_ids for one in found(engine))
    one.write(batch(2, executions("failing"), 10_000))
    assert all(eval_id not in one.eval_ids for one in found(engine))


def test_findings_are_listed_shown_and_acknowledged_at_the_command_line(engine: Engine, operator: Operator) -> None:
    assert operator.evalstore("anomalies", "ls", "-o", "json").json == []
    assert operator.evalstore("anomalies", "ls", "--state", "open").status == 3
    assert operator.evalstore("anomalies", "ls", "--metric", "speed").status == 2
    first, second = detect(engine, "x", "y\x1b[2J")
    listed = operator.evalstore("anomalies", "ls", "-o", "json").json
    assert {one["id"] for one in listed} == {str(first), str(second)}
    assert "\x1b" not in operator.evalstore("anomalies", "ls").out
    assert len(operator.evalstore("anomalies", "ls", "--value", "x", "-o", "jsonl").out.splitlines()) == 1
    shown = operator.evalstore("anomalies", "show", str(first)[:8], "-o", "json").json
    assert shown["eval_ids"] == ["e-1", "e-2"]
    assert "e-2" in operator.evalstore("anomalies", "show", first).out
    assert operator.evalstore("anomalies", "show", uuid4()).status == 3
    acknowledged = operator.evalstore("anomalies", "ack", first, uuid4(), "--reason", "replaced the executor")
    assert acknowledged.status == 4
    assert operator.evalstore("anomalies", "ack", first).status == 0
    assert operator.evalstore("anomalies", "ack", uuid4()).status == 3
    row = operator.evalstore("anomalies", "show", first, "-o", "json").json
    assert (row["state"], row["acknowledged_by"], row["reason"]) == ("acknowledged", "ada", "replaced the executor")
    (action,) = operator.rows("SELECT * FROM operator_actions WHERE verb = 'anomalies ack'")
    assert (action["actor"], action["reason"]) == ("ada", "replaced the executor")
    assert [one["id"] for one in operator.evalstore("anomalies", "ls", "--state", "open", "-o", "json").json] == [str(second)]


def test_findings_are_read_and_acknowledged_over_http(api: Any) -> None:
    engine = database.engine(api.database_url, pool_size=1)
    ids = [str(one) for number in range(5) for one in detect(engine, f"x-{number}")]
    engine.dispose()
    first = api.read.get("/storage/anomalies?limit=2").json()
    assert [one["id"] for one in first["anomalies"]] == ids[:-3:-1]
    rest = api.read.get("/storage/anomalies", params={"limit": 3, "cursor": first["next"]}).json()
    assert ([one["id"] for one in rest["anomalies"]], rest["next"]) == (ids[2::-1], None)
    one = f"/storage/anomalies/{ids[0]}"
    assert api.read.get(one).json()["observed"] == 55.5
    assert api.read.post(f"{one}/acknowledge").status_code == 403
    done = api.admin.post(f"{one}/acknowledge", json={"reason": "seen"})
    assert done.status_code == 200, done.text
    assert (done.json()["state"], done.json()["reason"]) == ("acknowledged", "seen")
    assert done.json()["acknowledged_by"].startswith("key ")
    assert api.admin.post(f"{one}/acknowledge").json() == done.json()
    assert len(api.read.get("/storage/anomalies?state=open").json()["anomalies"]) == 4
    assert api.nobody.get("/storage/anomalies").status_code == 401
    engine = database.engine(api.database_url, pool_size=1)
    with engine.connect() as conn:
        keys = [api_keys.create(conn, "x", ["read"], visibility=one)[0] for one in (Visibility("ann"), Visibility(None, "r"))]
    engine.dispose()
    for client in map(api.client, keys):
        assert client.get("/storage/anomalies").json() == {"anomalies": [], "next": None}
        assert client.get("/storage/anomalies?dimension=executor").json() == {"anomalies": [], "next": None}
        assert client.get(one).status_code == 404
    assert api.read.get(f"/storage/anomalies/{uuid4()}").status_code == 404
    assert api.admin.post(f"/storage/anomalies/{uuid4()}/acknowledge").status_code == 404
    for query in ("state=closed", "kind=odd", "cursor=x", "limit=0", "value=%00"):
        assert api.read.get(f"/storage/anomalies?{query}").status_code == 422, query
    bodies: list[Any] = [{"reason": 7}, {"reasons": "x"}, {"reason": "x" * 1001}, {"reason": "\0"}, []]
    for body in bodies:
        assert api.admin.post(f"/storage/anomalies/{ids[1]}/acknowledge", json=body).status_code == 422, body


def test_webhooks_are_sent_findings_and_repairs_and_the_cursor_goes_on(
    start: Start, engine: Engine, conn: Connection, operator: Operator, eventually: Eventually
) -> None:
    receiver = Receiver()
    operator.env |= LOCAL
    types = ("storage:anomaly:detected", "storage:evaluation:repaired", "storage:run:finished")
    words = [word for one in types for word in ("--event-type", one)]
    assert operator.evalstore("webhooks", "create", receiver.url, *words).status == 0
    for_bob = operator.evalstore("webhooks", "create", receiver.url, "--submitter", "bob")
    assert for_bob.status == 0
    start(HOOKS)
    store(conn, executions("normal")[:1])
    (anomaly,) = detect(engine, "x")
    with conn.begin():
        for line in (
            '{"type":"storage:evaluation:repaired","eval_id":"e-0","version":2,"status":"completed","event_ids":[],"recorded_at":"2026-01-01T00:00:00Z"}',
            '{"type":"storage:run:finished","run_id":"r-1","recorded_at":"2026-01-01T00:00:00Z"}',
        ):
            conn.exec_driver_sql("INSERT INTO confirmations (count, body) VALUES (1, %s)", (line,))
    try:
        eventually(lambda: len(receiver.requests) == 3)
        told = {one.data["type"]: one.data for one in receiver.requests}
    finally:
        receiver.close()
    assert told.keys() == set(types)
    assert told["storage:anomaly:detected"]["anomaly_id"] == str(anomaly)
    assert told["storage:evaluation:repaired"]["eval_id"] == "e-0"
    assert told["storage:run:finished"]["run_id"] == "r-1"
    eventually(lambda: operator.evalstore("sinks", "ls", "-o", "json").json[0]["lag_events"] == 0)


def test_open_findings_are_a_metric(engine: Engine, conn: Connection) -> None:
    (one, _) = detect(engine, "x", "y")
    assert anomalies.count_open(conn) == {("duration_ms", "drift"): 2}
    assert anomalies.acknowledge(conn, one, INTENT)
    assert not anomalies.acknowledge(conn, one, INTENT)
    assert anomalies.count_open(conn) == {("duration_ms", "drift"): 1}
