"""Who may do what: every request with every kind of key."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from evalstore.storage import api_keys, database
from tests.integration.commands import python

E = "/storage/evaluations"
READS = [
    ("GET", E, None),
    ("GET", f"{E}?cursor=&status=failed", None),
    ("GET", f"{E}?format=ndjson", None),
    ("GET", f"{E}/e", None),
    ("GET", f"{E}/e/events", None),
    ("GET", f"{E}/e/code", None),
    ("GET", f"{E}/e/output", None),
    ("GET", f"{E}/e/error", None),
]
WRITES = [
    ("POST", E, {"eval_id": "new", "code": "c"}),
    ("PUT", f"{E}/e", {"status": "running"}),
    ("POST", f"{E}/e/events", {"type": "evaluation:started"}),
    ("POST", "/storage/events:batch", {"type": "evaluation:started", "eval_id": "e"}),
    ("POST", "/storage/content", {}),
]
PUBLIC = ["/health/live", "/health/ready", "/metrics", "/openapi.json", "/docs"]


@pytest.fixture
def engine(api: Any) -> Iterator[Engine]:
    made = database.engine(api.database_url)
    yield made
    made.dispose()


def test_every_request_is_answered_as_its_key_allows(start_api: Callable[..., Any], database_url: str, tmp_path: Path) -> None:
    api = start_api(EVALSTORE_OBJECT_STORE_URL=(tmp_path / "objects").as_uri())
    engine = database.engine(database_url)
    api.both.post(E, json={"eval_id": "e", "code": "c"})
    soon = datetime.now(UTC) + timedelta(hours=1)
    past = datetime.now(UTC) - timedelta(seconds=1)
    with engine.connect() as conn:
        made = {
            "table read": api_keys.create(conn, "r", ["read"], soon),
            "table write": api_keys.create(conn, "w", ["write"]),
            "table both": api_keys.create(conn, "b", ["read", "write"]),
            "revoked": api_keys.create(conn, "x", ["read", "write"]),
            "expired": api_keys.create(conn, "y", ["read", "write"], past),
        }
        api_keys.revoke(conn, [made["revoked"][1].key_id])
    given: dict[str, tuple[str | None, set[str]]] = {
        "none": (None, set()),
        "unknown": ("wrong-key", set()),
        "almost": (made["table both"][0][:-1] + "!", set()),
        "read": ("read-key-0001", {"read"}),
        "write": ("write-key-0001", {"write"}),
        "both": ("both-key-0001", {"read", "write"}),
        **{name: (key, set(kept.scopes)) for name, (key, kept) in made.items()},
        "revoked": (made["revoked"][0], set()),
        "expired": (made["expired"][0], set()),
    }
    for name, (key, scopes) in given.items():
        for needs, requests in (("read", READS), ("write", WRITES)):
            for method, path, body in requests:
                for headers in _forms(key):
                    answer = api.nobody.request(
                        method, path, headers=headers, content=None if body is None else json.dumps(body)
                    )
                    what = f"{name}: {method} {path}: {answer.status_code}"
                    if not scopes:
                        assert answer.status_code == 401, what
                        assert answer.headers["www-authenticate"].startswith("Bearer"), what
                    elif needs not in scopes:
                        assert answer.status_code == 403, what
                    else:
                        assert answer.status_code in {200, 201, 404, 409}, what
                    if answer.status_code in {401, 403}:
                        assert answer.headers["content-type"] == "application/problem+json", what
    engine.dispose()
    assert [api.nobody.get(path).status_code for path in PUBLIC] == [200] * len(PUBLIC)


def _forms(key: str | None) -> list[dict[str, str]]:
    return [{}] if key is None else [{"Authorization": f"Bearer {key}"}, {"X-API-Key": key}]


def test_without_any_key_every_request_is_answered_401(start_api: Callable[..., Any]) -> None:
    api = start_api(EVALSTORE_READ_API_KEYS="", EVALSTORE_WRITE_API_KEYS=" , ")
    for key in (None, "", "read-key-0001", "None"):
        for method, path, body in (*READS, *WRITES):
            headers = {} if key is None else {"X-API-Key": key}
            assert api.nobody.request(method, path, headers=headers, json=body).status_code == 401
    assert api.nobody.get("/health/ready").status_code == 200


def test_a_file_of_keys_is_read_again_when_it_changes(
    start_api: Callable[..., Any], tmp_path: Path, eventually: Callable[..., None]
) -> None:
    path = tmp_path / "keys"
    path.write_text("first\nsecond\n")
    api = start_api(EVALSTORE_READ_API_KEYS_FILE=str(path))

    def works(key: str) -> bool:
        return bool(api.nobody.get(E, headers={"X-API-Key": key}).status_code == 200)

    assert works("first")
    assert works("read-key-0001")
    fresh = tmp_path / "fresh"
    fresh.write_text("second, third")
    fresh.replace(path)
    eventually(lambda: works("third"))
    assert works("second")
    assert not works("first")
    path.unlink()  # As in the middle of a replacement.
    eventually(lambda: "cannot read the keys file" in api.log.read_text() or not works("third"))
    assert works("third")


def test_a_file_of_keys_may_come_from_another_editor(start_api: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"\xef\xbb\xbffirst\r\n second ,\tthird\r\n\r\n")  # A byte order mark, and Windows line ends.
    api = start_api(EVALSTORE_READ_API_KEYS_FILE=f"{path}\n")
    for key in ("first", "second", "third"):
        assert api.nobody.get(E, headers={"X-API-Key": key}).status_code == 200, key


def test_a_key_works_soon_after_it_was_made_and_no_longer_once_it_is_revoked(
    api: Any, engine: Engine, eventually: Callable[..., None]
) -> None:
    with engine.connect() as conn:
        key, kept = api_keys.create(conn, "temporary", ["read"])
        client = api.client(key)
        eventually(lambda: client.get(E).status_code == 200, within_s=2)
        api_keys.revoke(conn, [kept.key_id])
        eventually(lambda: client.get(E).status_code == 401, within_s=2)
        assert [one.name for one in api_keys.all_keys(conn)] == ["temporary"]
        assert api_keys.usable(conn) == []


def test_the_log_says_who_did_what_and_no_key(api: Any, engine: Engine, eventually: Callable[..., None]) -> None:
    with engine.connect() as conn:
        key, kept = api_keys.create(conn, "w", ["write"])
    eventually(lambda: api.nobody.get(E, headers={"X-API-Key": key}).status_code == 403, what="the key is known")
    made = api.nobody.post(E, json={"eval_id": "e", "code": "c"}, headers={"X-API-Key": key, "X-Request-ID": "from-outside"})
    api.both.put(f"{E}/e", json={"status": "running"})
    refused = api.nobody.get(f"{E}/e", headers={"X-API-Key": "guessed-secret"})
    assert made.headers["x-request-id"] == "from-outside"
    assert refused.json()["request_id"] == refused.headers["x-request-id"]
    line = rf"GET {E}/e: 401, by key nobody, request {refused.json()['request_id']}"
    eventually(lambda: re.search(line, api.said), what="the last request is logged")
    log = api.said
    assert re.search(rf"POST {E}: 201, by key {kept.key_id}, request from-outside", log)
    assert re.search(rf"PUT {E}/e: 200, by key settings-[0-9a-f]{{8}}, request [0-9a-f]{{32}}", log)
    assert [secret for secret in (key, key[20:], "both-key-0001", "guessed-secret") if secret in log] == []


def test_keys_are_made_listed_and_revoked_at_the_command_line(database_url: str, run_evalstore: Callable[..., Any]) -> None:
    made = run_evalstore("keys", "create", "ci", "--scope", "read", "--scope", "write", "--expires-in", "2h")
    key = made.stdout.strip()
    assert re.fullmatch(r"evs_[0-9a-f]{12}_[0-9a-f]{64}", key)
    assert key not in made.stderr
    (row,) = json.loads(run_evalstore("keys", "list", "-o", "json").stdout)
    assert (row["name"], row["scopes"], row["state"]) == ("ci", "read,write", "usable")
    _, line = run_evalstore("keys", "list").stdout.splitlines()  # One line for each key in 80 columns, with full times.
    assert re.search(r"usable  20\d\d-\d\d-\d\d \d\d:\d\dZ  20\d\d-\d\d-\d\d \d\d:\d\dZ", line)
    assert run_evalstore("keys", "revoke", row["key_id"], "absent", status=4).stderr.count("absent") == 1
    (row,) = json.loads(run_evalstore("keys", "list", "-o", "json").stdout)
    assert row["state"] == "revoked"
    assert run_evalstore("keys", "revoke", "absent", status=3).stdout == ""
    assert "--scope" in run_evalstore("keys", "create", "ci", status=2).stderr
    made = run_evalstore(
        "keys", "create", "t", "--scope", "read", "--submitter", "ann", "--run-prefix", "t-", "--rate", "9/m", "-o", "json"
    )
    told = {"scopes": "read", "submitter": "ann", "run_prefix": "t-", "rate": "9/m", "state": "usable"}
    assert json.loads(made.stdout).items() >= told.items()
    assert json.loads(run_evalstore("keys", "list", "-o", "json").stdout)[-1].items() >= told.items()
    table = " ".join(run_evalstore("keys", "list").stdout.split())
    assert all(part in table for part in ("(ann,", "t-*,", "9/m)", "usable"))
    for wrong in (["--run-prefix", ""], ["--run-prefix", "a/"], ["--submitter", ""], ["--rate", "9"], ["--rate", "0/s"]):
        assert wrong[0] in run_evalstore("keys", "create", "t", "--scope", "read", *wrong, status=2).stderr
    assert "admin" in run_evalstore("keys", "create", "t", "--scope", "admin", "--submitter", "ann", status=2).stderr
    assert "90d" in run_evalstore("keys", "create", "ci", "--scope", "read", "--expires-in", "soon", status=2).stderr


@pytest.fixture
def run_evalstore(database_url: str, tmp_path: Path) -> Callable[..., Any]:
    env = {**os.environ, "EVALSTORE_DATABASE_URL": database_url, "COLUMNS": "80"}

    def run(*arguments: str, status: int = 0) -> Any:
        command = [*python(), "-m", "evalstore.cli.app", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        assert done.returncode == status, done.stderr
        return done

    return run


def test_a_key_presented_in_odd_ways_is_refused_not_a_crash(api: Any) -> None:
    odd = [b"Bearer", b"bearer \xff\xfe", b"Basic cmVhZA==", b"evs__", b"Bearer evs_" + b"a" * 5000]
    for value in odd:
        answer = api.nobody.get(E, headers=[(b"Authorization", value)])
        assert answer.status_code == 401, value
    assert httpx.get(f"{api.url}{E}", headers={"authorization": "BEARER read-key-0001"}).status_code == 200
