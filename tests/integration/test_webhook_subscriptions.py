"""Subscriptions over HTTP and at the command line."""

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection
from standardwebhooks import Webhook

from evalstore.storage import event_store
from models.events import parse
from tests.integration.shell import Operator
from tests.receivers import Receiver
from tests.sinks import Runner

Eventually = Callable[..., None]
HOOKS = "/storage/webhooks"
LOCAL = {"EVALSTORE_WEBHOOK_ALLOW": "127.0.0.0/8"}
SINKS = '[hooks]\ntype = "webhook"\nfirst_retry_s = 0.05\nrequest_timeout_s = 2\n'
GOOD = "https://hooks.example.com/evalstore"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def runner(tmp_path: Path, database_url: str, redis_url: str) -> Iterator[Runner]:
    folder = tmp_path / "runner"
    folder.mkdir()
    servers = {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url}
    made = Runner(folder, servers | LOCAL, SINKS)
    made.start()
    yield made
    made.kill()
    print(f"--- {made.log}\n{made.log.read_text()[-4000:]}")


@pytest.fixture
def shell(operator: Operator) -> Operator:
    operator.env |= LOCAL
    return operator


def store(conn: Connection, eval_id: str, *names: str) -> None:
    """Store events of an evaluation, each in a commit of its own."""
    for name in names:
        fields: dict[str, object] = {"exit_code": 0} if name == "completed" else {}
        given = {"type": f"evaluation:{name}", "eval_id": eval_id, "event_id": uuid4(), "occurred_at": "2026-01-01T00:00:00Z"}
        event_store.store(conn, [parse(given | fields)])


def test_a_subscription_is_made_shown_and_removed(api: Any) -> None:
    made = api.admin.post(HOOKS, json={"url": GOOD, "statuses": ["failed"], "run_id": "run-1"})
    assert made.status_code == 201, made.text
    assert made.headers["cache-control"] == "no-store"
    secret = made.json()["secret"]
    assert secret.startswith("whsec_")
    (found,) = api.admin.get(HOOKS).json()["webhooks"]
    assert {**found, "secret": secret} == made.json()
    assert (found["url"], found["statuses"], found["run_id"], found["state"]) == (GOOD, ["failed"], "run-1", "active")
    assert secret not in api.admin.get(HOOKS).text
    one = f"{HOOKS}/{found['id']}"
    assert api.admin.get(one).json() == found
    assert api.admin.get(f"{one}/deliveries").json() == {"deliveries": []}
    rotated = api.admin.post(f"{one}/rotate")
    assert rotated.status_code == 200
    assert rotated.json()["secret"] != secret
    tested = api.admin.post(f"{one}/test")
    assert tested.status_code == 202
    assert api.admin.get(f"{one}/deliveries").json()["deliveries"] == [tested.json()]
    assert api.admin.post(f"{one}/deliveries/{tested.json()['id']}/redeliver").status_code == 202
    assert api.admin.post(f"{one}/deliveries/{uuid4()}/redeliver").status_code == 404
    assert api.admin.post(f"{one}/enable").json()["state"] == "active"
    assert api.admin.delete(one).status_code == 204
    for method, path in (
        ("GET", one),
        ("DELETE", one),
        ("POST", f"{one}/test"),
        ("POST", f"{one}/rotate"),
        ("POST", f"{one}/enable"),
    ):
        assert api.admin.request(method, path).status_code == 404, path


def test_a_key_that_may_not_manage_webhooks_is_refused(api: Any) -> None:
    one = f"{HOOKS}/{uuid4()}"
    for method, path in (("GET", HOOKS), ("POST", HOOKS), ("GET", one), ("DELETE", one), ("POST", f"{one}/test")):
        assert api.nobody.request(method, path).status_code == 401
        assert (api.read.request(method, path).status_code, api.both.request(method, path).status_code) == (403, 403)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("url", url)
            for url in (
                None,
                7,
                "",
                "hooks.example.com",
                "ftp://hooks.example.com/",
                "http://hooks.example.com/",
                "https://user:secret@hooks.example.com/",
                "https://hooks.example.com/#part",
                "https://hooks.example.com:99999/",
                "https://exa mple.com/",
                "https://例え.jp/",
                "https://127.0.0.1/",
                "https://127.1/",
                "https://2130706433/",
                "https://0x7f000001/",
                "https://localhost/",
                "https://169.254.169.254/latest",
                "https://10.1.2.3/",
                "https://[::1]/",
                "https://[fe80::1]/",
                "https://[::ffff:8.8.8.8]/",
                "https://[64:ff9b::808:808]/",
                "https://[2002:808:808::1]/",
                "https://224.0.0.1/",
                "https://0.0.0.0/",
                "https://" + "a" * 2000,
            )
        ),
        ("event_types", ["evaluation:gone"]),
        ("event_types", "evaluation:completed"),
        ("statuses", ["done"]),
        ("statuses", [["failed"]]),
        ("run_id", "a b"),
        ("run_id", 7),
        ("submitter", 7),
        ("submitter", "\0"),
        ("secret", "whsec_c2hvcnQ="),
        ("secret", "plain"),
        ("secret", 7),
        ("events", []),
    ],
)
def test_a_wrong_field_is_answered_422_with_its_name(api: Any, field: str, value: object) -> None:
    answer = api.admin.post(HOOKS, json={"url": GOOD, field: value})
    assert answer.status_code == 422, answer.text
    assert [fault["field"] for fault in answer.json()["faults"]] == [field]
    assert api.admin.get(HOOKS).json() == {"webhooks": []}


def test_a_secret_of_the_users_own_is_taken_and_a_wrong_rotation_refused(api: Any) -> None:
    secret = "whsec_" + base64.b64encode(b"x" * 24).decode()
    made = api.admin.post(HOOKS, json={"url": GOOD, "secret": secret})
    assert made.json()["secret"] == secret
    for body, field in (
        ({"secret": "x"}, "secret"),
        ({"overlap_s": -1}, "overlap_s"),
        ({"overlap_s": True}, "overlap_s"),
        ([], "body"),
    ):
        answer = api.admin.post(f"{HOOKS}/{made.json()['id']}/rotate", json=body)
        assert (answer.status_code, answer.json()["faults"][0]["field"]) == (422, field)
    assert api.admin.get(f"{HOOKS}/seven").status_code == 422


def test_the_networks_that_are_allowed_may_be_named(start_api: Callable[..., Any]) -> None:
    api = start_api(**LOCAL)
    assert api.admin.post(HOOKS, json={"url": "http://127.0.0.1:8000/"}).status_code == 201
    assert api.admin.post(HOOKS, json={"url": "http://10.0.0.1/"}).status_code == 422


def test_what_is_stored_reaches_a_subscriber_through_the_runner(
    runner: Runner, shell: Operator, conn: Connection, receiver: Receiver, eventually: Eventually
) -> None:
    made = shell.evalstore("webhooks", "create", receiver.url, "--status", "completed", "-o", "json").json
    done = shell.evalstore("webhooks", "test", made["id"][:8], "-o", "json")
    assert (done.status, done.json[0]["state"], done.json[0]["status_code"]) == (0, "delivered", 204)
    assert json.loads(receiver.requests[0].body)["type"] == "storage:webhook:test"
    store(conn, "e-1", "started", "completed")
    eventually(lambda: len(receiver.requests) == 2)
    Webhook(made["secret"]).verify(receiver.requests[1].body, receiver.requests[1].headers)
    data = receiver.requests[1].data
    assert (data["eval_id"], data["status"], data["version"], data["type"]) == (
        "e-1",
        "completed",
        2,
        "storage:evaluation:updated",
    )
    found = shell.evalstore("webhooks", "deliveries", made["id"], "--state", "delivered", "-o", "json").json
    assert [one["eval_id"] for one in found] == ["e-1", None]
    receiver.status = 500
    failed = shell.evalstore("webhooks", "test", made["id"], "-o", "json")
    assert (failed.status, failed.json[0]["status_code"]) == (1, 500)
    receiver.status = 200
    assert shell.evalstore("webhooks", "redeliver", made["id"], found[0]["id"]).status == 0
    eventually(lambda: receiver.requests[-1].headers["webhook-id"] == found[0]["id"])
    assert shell.evalstore("webhooks", "rotate", made["id"], "-o", "json").json["secret"] != made["secret"]
    (listed,) = shell.evalstore("webhooks", "ls", "-o", "json").json
    assert (listed["id"], listed["state"]) == (made["id"], "active")
    assert shell.evalstore("webhooks", "rm", made["id"], "--yes").status == 0
    assert shell.evalstore("webhooks", "ls", "-o", "json").json == []
    assert shell.evalstore("webhooks", "rm", made["id"], "--yes").status == 3
    assert shell.evalstore("webhooks", "create", "http://8.8.8.8/").status == 2


def test_deliveries_survive_a_crash_between_persisting_and_sending(
    runner: Runner, shell: Operator, conn: Connection, receiver: Receiver, eventually: Eventually
) -> None:
    shell.evalstore("webhooks", "create", receiver.url)
    receiver.answer = receiver.hang
    for number in range(5):
        store(conn, f"e-{number}", "started", "completed")
    eventually(lambda: conn.exec_driver_sql("SELECT count(*) FROM webhook_deliveries").scalar() == 10)
    conn.rollback()
    eventually(lambda: conn.exec_driver_sql("SELECT delivered FROM sinks").scalar() == 10)
    conn.rollback()
    runner.kill()
    receiver.released.set()
    receiver.answer, lost = None, len(receiver.requests)
    runner.start()
    eventually(lambda: len({(one.data["eval_id"], one.data["version"]) for one in receiver.requests[lost:]}) == 10, within_s=40)
    for number in range(5):
        assert [one.data["version"] for one in receiver.requests[lost:] if one.data["eval_id"] == f"e-{number}"] == [1, 2]
