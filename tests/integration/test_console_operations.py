"""The console's pages for operators: dead letters, queues, sinks, webhooks, anomalies, keys and the audit."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection, Engine

from evalstore.storage import api_keys, database, dead_letters, operator_actions, sink_cursors
from evalstore.storage.visibility import Visibility
from tests import console
from tests.integration.conftest import ADMIN, READ

Start = Callable[..., Any]
DL = "/console/dead-letters"


@pytest.fixture
def engine(api: Any) -> Iterator[Engine]:
    made = database.engine(api.database_url)
    yield made
    made.dispose()


@pytest.fixture
def conn(engine: Engine) -> Iterator[Connection]:
    with engine.connect() as made:
        yield made


@pytest.fixture
def ids(api: Any, conn: Connection) -> dict[str, str]:
    console.store(conn)
    return console.fill(conn, api.redis_url)


def signed_in(api: Any, key: str) -> httpx.Client:
    client: httpx.Client = api.client(None)
    assert client.post("/console/login", data={"key": key}).status_code == 303
    return client


def csrf_of(client: httpx.Client) -> str:
    found = re.search('name="csrf" value="([0-9a-f]+)"', client.get("/console/keys").text)
    assert found is not None
    return found[1]


def act(client: httpx.Client, path: str, **form: str) -> httpx.Response:
    answer: httpx.Response = client.post(path, data={"csrf": csrf_of(client), "reason": "a test", **form})
    return answer


def latest(conn: Connection) -> dict[str, Any]:
    return operator_actions.latest(conn, 1)[0]


def test_each_page_shows_what_is_there_and_has_a_twin_of_json(api: Any, ids: dict[str, str]) -> None:
    client = signed_in(api, ADMIN)
    for path in console.paths(ids):
        page = client.get(f"/console{path}")
        assert page.status_code == 200, (path, page.text)
        assert "<h1" in page.text
        twin = client.get(f"/console{path}{'&' if '?' in path else '?'}format=json")
        assert twin.headers["content-type"] == "application/json", path
        assert twin.json(), path


def test_a_page_with_nothing_says_how_to_switch_it_on(api: Any) -> None:
    client = signed_in(api, ADMIN)
    for path, words in (
        ("sinks", "evalstore sinks run"),
        ("webhooks", "evalstore webhooks create"),
        ("anomalies", "EVALSTORE_SINKS_FILE"),
        ("archive", "EVALSTORE_ARCHIVE_URL"),
    ):
        assert words in client.get(f"/console/{path}").text
    for path in ("dead-letters", "redrives", "queues", "schedule", "keys", "audit", "dead-letters/redrive"):
        assert client.get(f"/console/{path}").status_code == 200


def test_a_key_that_reads_sees_no_action_and_cannot_act(api: Any, ids: dict[str, str], conn: Connection) -> None:
    client = signed_in(api, READ)
    for path in (f"/dead-letters/{ids['letter']}", "/dead-letters/redrive", "/schedule", "/sinks/kafka-main", "/keys"):
        page = client.get(f"/console{path}").text
        assert re.findall('<form[^>]*method="post"[^>]*action="([^"]*)"', page) == ["/console/logout"], path
    before = operator_actions.latest(conn)
    for path in (
        "dead-letters/redrive",
        f"dead-letters/{ids['letter']}/edit",
        "schedule/sweep_objects/run",
        "archive/retry",
        "sinks/kafka-main/pause",
        f"webhooks/{ids['webhook']}/test",
        f"anomalies/{ids['anomaly']}/acknowledge",
        "keys",
    ):
        assert act(client, f"/console/{path}").status_code == 403, path
    assert operator_actions.latest(conn) == before
    assert client.get("/console/webhooks").status_code == 403
    assert client.get("/console/keys?format=json").json()["keys"] == []


def test_a_restricted_key_sees_no_page_of_operators(api: Any, ids: dict[str, str], conn: Connection) -> None:
    key, _ = api_keys.create(conn, "ann", ["read"], visibility=Visibility("judge", None))
    client = signed_in(api, key)
    operators = ("dead-letters", "redrives", "queues", "schedule", "archive", "sinks", "webhooks", "anomalies", "audit")
    assert {client.get(f"/console/{path}").status_code for path in operators} == {404}
    assert client.get(f"{DL}/{ids['letter']}").status_code == 404
    assert client.get(f"{DL}/export").status_code == 404
    (own,) = client.get("/console/keys?format=json").json()["keys"]
    assert own["name"] == "ann"


def test_a_read_only_console_hides_actions_and_refuses_them(start_api: Start) -> None:
    api = start_api(EVALSTORE_CONSOLE="read-only")
    client = signed_in(api, ADMIN)
    page = client.get("/console/keys").text
    assert 'action="/console/keys"' not in page
    answer = act(client, "/console/keys", name="x", read="1")
    assert answer.status_code == 403
    assert "read-only" in answer.text


def test_an_action_needs_the_token_and_a_reason(api: Any, ids: dict[str, str], conn: Connection) -> None:
    client = signed_in(api, ADMIN)
    path = "/console/sinks/kafka-main/pause"
    assert client.post(path, data={"reason": "x"}).status_code == 403
    assert client.post(path, data={"reason": "x", "csrf": csrf_of(signed_in(api, ADMIN))}).status_code == 403
    assert act(client, path, reason=" ").status_code == 422
    assert sink_cursors.statuses(conn, "kafka-main")[0].state == "running"


def test_groups_and_single_dead_letters_match_the_filter(api: Any, ids: dict[str, str]) -> None:
    client = signed_in(api, ADMIN)
    found = client.get(f"{DL}?format=json").json()
    assert sum(group["count"] for group in found["groups"]) == 12
    signature = found["groups"][0]["signature"]
    chosen = client.get(f"{DL}?format=json&signature={signature}").json()
    assert {letter["signature"] for letter in chosen["dead_letters"]} == {signature}
    assert client.get(f"{DL}?since=never").status_code == 422
    assert client.get(f"{DL}?cursor=x").status_code == 422
    assert client.get(f"{DL}/no-id").status_code == 404
    assert client.get(f"{DL}?id=x").status_code == 422


def test_dead_letters_come_in_pages_without_gaps(api: Any, conn: Connection) -> None:
    many = console.letters(130)
    at = many[0].died_at
    dead_letters.write(conn, [letter._replace(died_at=at) for letter in many[:70]] + many[70:])
    client, seen, cursor = signed_in(api, ADMIN), [], ""
    while cursor is not None:
        page = client.get(DL, params={"format": "json", "cursor": cursor}).json()
        seen += [letter["id"] for letter in page["dead_letters"]]
        cursor = page["next"]
    assert sorted(seen) == sorted(str(letter.id) for letter in many)


def test_ten_thousand_dead_letters_of_one_group_are_redriven_only_with_their_number(api: Any, conn: Connection) -> None:
    dead_letters.write(conn, console.letters(10_000, causes=console.CAUSES[:1]))
    client = signed_in(api, ADMIN)
    plan = client.get(f"{DL}/redrive?error_class=InvalidEvent")
    assert "Type 10000 to confirm" in plan.text
    path = f"{DL}/redrive?error_class=InvalidEvent"
    assert act(client, path, shown="10000").status_code == 422
    assert act(client, path, shown="10000", count="1000").status_code == 422
    answer = act(client, path, shown="10000", count="10,000", canary="10", rate="50")
    assert answer.status_code == 303, answer.text
    redrive = client.get(f"{answer.headers['location']}?format=json").json()
    assert (redrive["total"], redrive["canary"], redrive["rate"], redrive["actor"][:4]) == (10_000, 10, 50.0, "key ")
    assert redrive["filter"] == {"error_class": "InvalidEvent", "rate": 50.0, "canary": 10}
    assert "10,000 dead letters are sent again" in client.get(answer.headers["location"]).text
    cancelled = act(client, f"{answer.headers['location']}/cancel")
    assert cancelled.status_code == 303
    assert client.get(f"{answer.headers['location']}?format=json").json()["returned"] == 10_000
    assert latest(conn)["verb"] == "cancel"


def test_a_redrive_takes_no_more_than_the_operator_saw(api: Any, ids: dict[str, str], conn: Connection) -> None:
    client = signed_in(api, ADMIN)
    answer = act(client, f"{DL}/redrive", shown="3")
    assert answer.status_code == 409
    assert dead_letters.count_of(conn, dead_letters.Selection(states=("dead",))) == 12


def test_an_edit_shows_its_difference_and_its_faults_first(api: Any, ids: dict[str, str], conn: Connection) -> None:
    client = signed_in(api, ADMIN)
    path = f"{DL}/{ids['letter']}"
    old = client.get(f"{path}?format=json").json()
    refused = json.loads(json.dumps(old["message"]))
    refused["args"][0]["exit_code"] = "zero"
    answer = act(client, path, message=json.dumps(refused))
    assert answer.status_code == 422
    assert "exit_code" in answer.text
    assert act(client, path, message="{no json").status_code == 422
    edited = json.loads(json.dumps(old["message"]))
    edited["args"][0]["exit_code"] = 7
    answer = act(client, path, message=json.dumps(edited))
    assert answer.status_code == 200
    assert re.search(r'class="removed">.*exit_code.*0.*</span>\n<span class="added">.*exit_code.*7', answer.text)
    digest = re.search('name="digest" value="([0-9a-f]+)"', answer.text)
    assert digest is not None
    assert act(client, f"{path}/edit", message=json.dumps(edited), digest="0" * 64).status_code == 409
    done = act(client, f"{path}/edit", message=json.dumps(edited), digest=digest[1])
    assert done.status_code == 303, done.text
    assert client.get(f"{path}?format=json").json()["message"]["args"][0]["exit_code"] == 7
    action = latest(conn)
    assert (action["verb"], action["reason"], action["count"]) == ("edit", "a test", 1)
    assert any("exit_code" in line for line in action["details"]["diff"])
    assert act(client, f"{path}/edit", message=json.dumps(old["message"]), digest=digest[1]).status_code == 409


def test_the_export_has_every_match_with_its_message(api: Any, conn: Connection) -> None:
    dead_letters.write(conn, console.letters(25))
    answer = signed_in(api, READ).get(f"{DL}/export?error_class=InvalidEvent")
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert len(lines) == 17
    assert lines[0]["message"]["args"][0]["eval_id"].startswith("dead-")
    assert "attachment" in answer.headers["content-disposition"]


def test_a_job_is_queued_now_and_the_action_is_recorded(api: Any, conn: Connection) -> None:
    client = signed_in(api, ADMIN)
    assert act(client, "/console/schedule/sweep_objects/run").status_code == 303
    assert act(client, "/console/schedule/nothing/run").status_code == 404
    assert (latest(conn)["verb"], latest(conn)["filter"]) == ("cron run", {"job": "sweep_objects"})
    queues = client.get("/console/queues?format=json").json()["queues"]
    assert sum(queue["ready"] for queue in queues if queue["queue"] == "jobs") in {0, 1}


def test_a_sink_is_paused_resumed_and_rewound(api: Any, ids: dict[str, str], conn: Connection) -> None:
    client = signed_in(api, ADMIN)
    assert act(client, "/console/sinks/kafka-main/pause").headers["location"] == "/console/sinks/kafka-main"
    assert sink_cursors.statuses(conn, "kafka-main")[0].state == "paused"
    assert act(client, "/console/sinks/kafka-main/resume").status_code == 303
    assert sink_cursors.statuses(conn, "kafka-main")[0].state == "running"
    assert act(client, "/console/sinks/kafka-main/rewind", to="yesterday").status_code == 422
    assert act(client, "/console/sinks/kafka-main/rewind", to="2h").status_code == 303
    assert [row["verb"] for row in operator_actions.latest(conn, 3)] == ["sinks rewind", "sinks resume", "sinks pause"]
    assert act(client, "/console/sinks/absent/pause").status_code == 404


def test_webhooks_are_tested_and_send_again(api: Any, ids: dict[str, str]) -> None:
    client = signed_in(api, ADMIN)
    path = f"/console/webhooks/{ids['webhook']}"
    before = client.get(f"{path}?format=json").json()["deliveries"]
    assert act(client, f"{path}/test").status_code == 303
    after = client.get(f"{path}?format=json&state=pending").json()["deliveries"]
    assert [delivery["type"] for delivery in after] == ["storage:webhook:test"]
    assert act(client, f"{path}/deliveries/{before[0]['id']}/redeliver").status_code == 303
    assert client.get(f"{path}?format=json&state=failed").json()["deliveries"] == []
    assert act(client, f"{path}/enable").status_code == 303


def test_an_anomaly_is_acknowledged_with_a_reason(api: Any, ids: dict[str, str]) -> None:
    client = signed_in(api, ADMIN)
    path = f"/console/anomalies/{ids['anomaly']}"
    assert act(client, f"{path}/acknowledge", reason="a new model").status_code == 303
    found = client.get(f"{path}?format=json").json()
    assert (found["state"], found["reason"]) == ("acknowledged", "a new model")
    assert client.get("/console/anomalies?format=json&state=open").json()["anomalies"] == []
    assert client.get("/console/anomalies?kind=odd").status_code == 422


def test_a_key_is_created_shown_once_and_revoked_by_itself(api: Any, conn: Connection) -> None:
    client = signed_in(api, ADMIN)
    answer = act(client, "/console/keys", name="ops", admin="1", expires_in="30d")
    assert answer.status_code == 201, answer.text
    key = re.search("evs_[0-9a-f]+_[0-9a-f]+", answer.text)
    assert key is not None
    assert key[0] not in client.get("/console/keys").text
    assert key[0] not in client.get("/console/audit").text
    for wrong in ({"name": "x"}, {"name": " ", "read": "1"}, {"name": "x", "read": "1", "rate": "many"}):
        assert act(client, "/console/keys", **wrong).status_code == 422
    assert act(client, "/console/keys", name="x", admin="1", submitter="ann").status_code == 422
    own = signed_in(api, key[0])
    (row,) = own.get("/console/keys?format=json").json()["keys"]
    done = act(own, f"/console/keys/{row['key_id']}/revoke")
    assert (done.status_code, done.headers["location"]) == (303, "/console/login")
    assert (latest(conn)["verb"], latest(conn)["actor"]) == ("keys revoke", f"key {row['key_id']}")
    assert act(client, "/console/keys/absent/revoke").status_code == 404


def test_the_audit_says_who_did_what_when_and_why(api: Any, conn: Connection) -> None:
    for number in range(60):
        operator_actions.note(conn, operator_actions.Intent("rm" if number % 2 else "edit", "ada", f"why {number}", {}), number)
    client = signed_in(api, READ)
    first = client.get("/console/audit?format=json").json()
    second = client.get(f"/console/audit?format=json&cursor={first['next']}").json()
    assert [action["count"] for action in first["actions"] + second["actions"]] == list(range(59, -1, -1))
    chosen = client.get("/console/audit?format=json&verb=rm&actor=ada").json()["actions"]
    assert {action["verb"] for action in chosen} == {"rm"}
    assert "why 59" in client.get("/console/audit").text
