"""The console: signing in, roles, and what protects its pages."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psycopg
import pytest
from sqlalchemy import Engine

from evalstore.storage import api_keys, console_sessions, database
from tests.integration.conftest import ADMIN, READ, WRITE
from tests.polling import looks

Start = Callable[..., Any]


@pytest.fixture
def engine(api: Any) -> Iterator[Engine]:
    made = database.engine(api.database_url)
    yield made
    made.dispose()


def signed_in(api: Any, key: str) -> httpx.Client:
    client: httpx.Client = api.client(None)
    answer = client.post("/console/login", data={"key": key})
    assert answer.status_code == 303, answer.text
    return client


def test_a_page_without_a_session_leads_to_the_sign_in_and_back(api: Any) -> None:
    client = api.client(None)
    answer = client.get("/console?x=1")
    assert (answer.status_code, answer.headers["location"]) == (303, "/console/login")
    form = client.get("/console/login")
    assert form.status_code == 200
    assert len(re.findall("<input", form.text)) == 1
    done = client.post("/console/login?next=/console/evaluations%3Fstatus%3Dfailed", data={"key": READ})
    assert (done.status_code, done.headers["location"]) == (303, "/console/evaluations?status=failed")
    cookie = done.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Path=/console" in cookie
    assert "Secure" not in cookie
    assert client.get("/console").status_code == 200
    assert api.client(None).get("/console", headers={"Accept": "application/json"}).status_code == 401


@pytest.mark.parametrize("elsewhere", ["https://evil.example", "//evil.example", "/console/..//evil.example", "/storage"])
def test_the_sign_in_leads_nowhere_else(api: Any, elsewhere: str) -> None:
    done = api.client(None).post("/console/login", params={"next": elsewhere}, data={"key": READ})
    assert done.headers["location"].startswith("/console")
    assert "evil" not in done.headers["location"]


def test_the_cookie_is_for_tls_alone_behind_tls(api: Any) -> None:
    answer = api.client(None).post("/console/login", data={"key": READ}, headers={"X-Forwarded-Proto": "https"})
    assert "Secure" in answer.headers["set-cookie"]


def test_a_session_ends_when_its_key_is_revoked(api: Any, engine: Engine) -> None:
    with engine.connect() as conn:
        key, stored = api_keys.create(conn, "operator", ["read"])
    client = signed_in(api, key)
    assert client.get("/console").status_code == 200
    with engine.connect() as conn:
        api_keys.revoke(conn, [stored.key_id])
    assert any(client.get("/console").status_code == 303 for _ in looks(5))


@pytest.mark.parametrize("column", ["used_at", "created_at"])
def test_a_session_ends_by_time(api: Any, column: str) -> None:
    client = signed_in(api, READ)
    with psycopg.connect(api.database_url, autocommit=True) as conn:
        conn.execute(f"UPDATE console_sessions SET {column} = now() - interval '13 hours'")
    assert client.get("/console").status_code == 303


def test_signing_out_ends_the_session(api: Any) -> None:
    client = signed_in(api, READ)
    assert client.post("/console/logout", data={"csrf": "x"}).status_code == 403
    cookies = dict(client.cookies)
    csrf = re.search('name="csrf" value="([0-9a-f]+)"', client.get("/console").text)
    assert csrf is not None
    assert client.post("/console/logout", data={"csrf": csrf[1]}).status_code == 303
    assert api.client(None, cookies=cookies).get("/console").status_code == 303


def test_failed_sign_ins_are_limited(api: Any) -> None:
    client = api.client(None)
    answers = [client.post("/console/login", data={"key": f"guess-{at}"}).status_code for at in range(10)]
    assert answers == [403] * 10
    assert client.post("/console/login", data={"key": READ}).status_code == 429


def test_a_key_that_may_not_read_cannot_sign_in(api: Any) -> None:
    assert api.client(None).post("/console/login", data={"key": WRITE}).status_code == 403


def test_a_link_signs_in_once(api: Any, engine: Engine) -> None:
    with engine.connect() as conn:
        token = console_sessions.create_link(conn, api_keys.settings_key_id(api_keys.digest(ADMIN)))
    client = api.client(None)
    answer = client.get("/console/login", params={"link": token})
    assert (answer.status_code, answer.headers["location"]) == (303, "/console")
    assert client.get("/console").status_code == 200
    assert api.client(None).get("/console/login", params={"link": token}).status_code == 403


def test_other_sites_cannot_post(api: Any) -> None:
    client = api.client(None)
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "https://evil.example"}):
        assert client.post("/console/login", data={"key": READ}, headers=headers).status_code == 403


def test_a_trusted_proxy_names_the_user(start_api: Start) -> None:
    api = start_api(EVALSTORE_CONSOLE_PROXY_HEADER="X-User", EVALSTORE_CONSOLE_PROXY_NETWORKS="127.0.0.0/8")
    page = api.client(None).get("/console", headers={"X-User": "ann@example.org", "X-Forwarded-For": "203.0.113.9"})
    assert page.status_code == 200
    assert "user ann@example.org" in page.text
    assert api.client(None).get("/console").status_code == 303


def test_a_stranger_cannot_name_the_user(start_api: Start) -> None:
    api = start_api(
        EVALSTORE_CONSOLE_PROXY_HEADER="X-User", EVALSTORE_CONSOLE_PROXY_NETWORKS="10.0.0.0/8", FORWARDED_ALLOW_IPS="*"
    )
    headers = {"X-User": "ann", "X-Forwarded-For": "10.0.0.1"}
    assert api.client(None).get("/console", headers=headers).status_code == 303


def test_pages_run_no_code_of_their_own(api: Any) -> None:
    client = signed_in(api, READ)
    page = client.get("/console")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["cache-control"] == "no-store"
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", page.text)
    for name in re.findall(r'(?:src|href)="(/console/static/[^"]+)"', page.text):
        file = api.client(None).get(name)
        assert file.status_code == 200
        assert "immutable" in file.headers["cache-control"]
    assert api.client(None).get("/favicon.ico").headers["content-type"] == "image/svg+xml"


def test_the_console_can_be_off(start_api: Start) -> None:
    assert start_api(EVALSTORE_CONSOLE="off").client(READ).get("/console").status_code == 404


def test_a_page_has_a_twin_of_json(api: Any) -> None:
    client = signed_in(api, READ)
    for answer in (client.get("/console?format=json"), client.get("/console", headers={"Accept": "application/json"})):
        assert answer.headers["content-type"] == "application/json"
        assert isinstance(answer.json(), dict)


def test_the_console_works_below_a_path(start_api: Start) -> None:
    api = start_api(EVALSTORE_API_ROOT_PATH="/tools/evalstore")
    client = api.client(None)
    assert client.get("/tools/evalstore/console").headers["location"] == "/tools/evalstore/console/login"
    done = client.post("/tools/evalstore/console/login", data={"key": READ})
    assert done.headers["location"] == "/tools/evalstore/console"
    assert "Path=/tools/evalstore/console" in done.headers["set-cookie"]
    page = client.get("/tools/evalstore/console").text
    assert re.findall('href="(/console[^"]*)"', page) == []


def test_the_overview_says_each_problem_with_its_repair_and_its_runbook(api: Any) -> None:
    client = signed_in(api, READ)
    page, data = client.get("/console"), client.get("/console?format=json").json()
    assert page.status_code == 200
    texts = [problem["text"] for problem in data["problems"]]
    assert any("No worker consumes the queue evaluations" in text for text in texts)
    sections = {section["anchor"] for section in client.get("/console/runbook?format=json").json()["sections"]}
    assert {problem["runbook"] for problem in data["problems"]} <= sections
    for problem in data["problems"]:
        assert f"/console/runbook#{problem['runbook']}" in page.text
    assert 'id="evalstoreoutage"' in client.get("/console/runbook").text


def streamed(client: httpx.Client) -> str:
    """The first state that the overview streams."""
    with client.stream("GET", "/console/live") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                return line
    pytest.fail("the stream ended")


def test_the_overview_is_live(api: Any) -> None:
    assert "data: " in streamed(signed_in(api, READ))
