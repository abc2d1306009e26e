"""Creating, changing and reading records over HTTP."""

import base64
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import httpx
import pytest
import redis

E = "/storage/evaluations"


def create(api: Any, eval_id: str = "e", **fields: Any) -> httpx.Response:
    answer: httpx.Response = api.both.post(E, json={"eval_id": eval_id, "code": "print(1)", **fields})
    return answer


def put(api: Any, eval_id: str = "e", headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    answer: httpx.Response = api.both.put(f"{E}/{eval_id}", json=fields, headers=headers)
    return answer


def test_what_is_created_and_changed_is_read(api: Any) -> None:
    made = create(api, submitter="anna", run_id="r", metadata={"team": "blue"})
    assert (made.status_code, made.headers["location"], made.headers["etag"]) == (201, f"{E}/e", '"1"')
    started = put(api, status="running", executor_id="x")
    ended = put(api, status="completed", exit_code=0, output="1\n", score=0.5)
    read = api.both.get(f"{E}/e")
    assert (started.json()["status"], started.status_code) == ("running", 200)
    assert (read.status_code, read.headers["etag"]) == (200, '"3"')
    assert read.json() == ended.json()
    record = read.json()
    names = ("status", "version", "code", "output", "executor_id", "submitter", "run_id", "score", "metadata")
    assert [record[name] for name in names] == [
        "completed", 3, "print(1)", "1\n", "x", "anna", "r", 0.5, {"team": "blue"},
    ]  # fmt: skip


def test_creating_again_with_the_same_key_or_event_id_gives_the_same_answer(api: Any) -> None:
    body = {"eval_id": "e", "code": "c"}
    answers = [api.both.post(E, json=body, headers={"Idempotency-Key": "one"}) for _ in range(3)]
    assert [(one.status_code, one.json()) for one in answers] == [(201, answers[0].json())] * 3
    named = {**body, "eval_id": "f", "event_id": "0190a2f5-7a4c-7000-8000-000000000000"}
    again = [api.both.post(E, json=named) for _ in range(2)]
    assert [(one.status_code, one.json()["version"]) for one in again] == [(201, 1)] * 2


def test_creating_what_another_event_created_is_a_conflict(api: Any) -> None:
    create(api)
    other = create(api)
    assert (other.status_code, other.json()["type"]) == (409, "urn:evalstore:problem:already-created")
    reused = api.both.post(E, json={"eval_id": "g", "code": "a"}, headers={"Idempotency-Key": "k"})
    different = api.both.post(E, json={"eval_id": "g", "code": "b"}, headers={"Idempotency-Key": "k"})
    assert (reused.status_code, different.status_code, different.json()["type"]) == (
        201, 409, "urn:evalstore:problem:event-id-reused",
    )  # fmt: skip
    assert api.both.get(f"{E}/g").json()["code"] == "a"


def test_of_many_who_create_the_same_at_once_one_does(api: Any, start_api: Callable[..., Any]) -> None:
    servers = {"EVALSTORE_DATABASE_URL": api.database_url, "EVALSTORE_REDIS_URL": api.redis_url}
    apis = [api, start_api(**servers)]
    together = threading.Barrier(6)

    def attempt(number: int) -> list[int]:
        client = apis[number % 2].client("both-key-0001")
        statuses = []
        for round_ in range(25):
            together.wait(60)
            body = {"eval_id": f"contended-{round_}", "code": f"of {number}"}
            statuses.append(client.post(E, json=body).status_code)
        return statuses

    with ThreadPoolExecutor(6) as pool:
        rounds = list(zip(*pool.map(attempt, range(6)), strict=True))
    assert [sorted(statuses) for statuses in rounds] == [[201, *[409] * 5]] * 25


def test_an_evaluation_known_by_later_events_alone_can_be_created(api: Any) -> None:
    early = put(api, status="completed", exit_code=3)
    assert (early.status_code, early.json()["status"], early.json()["code"]) == (201, "completed", None)
    made = create(api)
    assert (made.status_code, made.json()["code"], made.json()["exit_code"]) == (201, "print(1)", 3)


@pytest.mark.parametrize("size", [1, 100_000])
def test_telling_the_same_again_changes_nothing(api: Any, size: int) -> None:
    create(api)
    first = put(api, status="completed", exit_code=0, output="x" * size)
    again = put(api, status="completed", exit_code=0, output="x" * size)
    other = put(api, status="completed", exit_code=0, output="x" * (size - 1) + "y")
    assert [one.json()["version"] for one in (first, again, other)] == [2, 2, 3]
    assert api.read.get("/storage/evaluations/e/output").text == "x" * size  # the first result counts


def test_the_attempt_is_the_one_of_the_record(api: Any) -> None:
    create(api)
    put(api, status="running", attempt=3)
    assert put(api, status="completed", exit_code=0).json()["attempt"] == 3


def test_a_repeat_that_comes_when_another_attempt_has_begun_says_nothing_of_that(api: Any) -> None:
    key = {"Idempotency-Key": "k"}
    put(api, headers=key, status="completed", exit_code=0)
    put(api, status="running", attempt=2)
    repeated = put(api, headers=key, status="completed", exit_code=0)
    assert (repeated.status_code, repeated.json()["version"], repeated.json()["status"]) == (200, 2, "running")
    other = put(api, headers=key, status="completed", exit_code=1)
    assert other.status_code == 409


def test_a_change_with_if_match_is_refused_once_the_version_changed(api: Any) -> None:
    create(api)
    done = put(api, headers={"If-Match": '"1"'}, status="running", executor_id="x")
    repeated = put(api, headers={"If-Match": '"1"'}, status="running", executor_id="x")
    late = put(api, headers={"If-Match": '"1"'}, status="completed", exit_code=0)
    absent = put(api, "absent", headers={"If-Match": "*"}, status="running")
    assert [one.status_code for one in (done, repeated, late, absent)] == [200, 200, 412, 412]
    for none in ("2", "", '"2'):
        refused = put(api, headers={"If-Match": none}, status="completed", exit_code=0)
        assert (refused.status_code, refused.json()["faults"][0]["field"]) == (422, "If-Match"), none
    assert late.headers["content-type"] == "application/problem+json"
    assert api.both.get(f"{E}/e").json()["version"] == 2
    assert api.both.get(f"{E}/absent").status_code == 404


def test_of_many_changes_that_match_one_version_one_is_made(api: Any) -> None:
    create(api)

    def change(number: int) -> int:
        return put(api, headers={"If-Match": '"1"'}, status="running", executor_id=f"x{number}").status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(change, range(16)))
    assert (statuses.count(200), statuses.count(412)) == (1, 15)


def test_a_record_that_is_as_it_was_is_not_sent_again(api: Any) -> None:
    create(api)
    same = api.both.get(f"{E}/e", headers={"If-None-Match": '"7", W/"1"'})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", '"1"')
    put(api, status="running")
    assert api.both.get(f"{E}/e", headers={"If-None-Match": '"1"'}).status_code == 200


@pytest.mark.parametrize("text", ["", "\0", "\ud800", "é𝄞\u2028", "a" * 65536])
def test_text_comes_back_exactly(api: Any, text: str) -> None:
    body = json.dumps({"eval_id": "e", "code": text}).encode()
    assert api.both.post(E, content=body).status_code == 201
    assert json.loads(api.both.get(f"{E}/e").content)["code"] == text


def test_bytes_come_back_as_base64_and_large_content_as_a_preview(api: Any) -> None:
    create(api)
    raw = bytes(range(256))
    put(api, status="completed", exit_code=0, output_b64=base64.b64encode(raw).decode(), error="é" * 40_000)
    record = api.both.get(f"{E}/e").json()
    assert base64.b64decode(record["output_b64"]) == raw
    assert (record["output"], record["output_size"], record["error"], record["error_size"]) == (None, 256, None, 80_000)
    assert record["error_preview"] == "é" * 512
    assert api.both.get(record["error_url"]).text == "é" * 40_000


def test_bad_fields_are_all_named_and_change_nothing(api: Any) -> None:
    answer = api.both.post(E, json={"eval_id": "a b", "code": 1, "langauge": "python", "attempt": 0})
    problem = answer.json()
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert {fault["field"] for fault in problem["faults"]} == {"eval_id", "code", "langauge", "attempt"}
    for body in (b"", b"[]", b"{", b'{"eval_id": "x", "code": NaN}', b"\xff", b"[" * 100_000):
        assert api.both.post(E, content=body).status_code == 422, body[:20]
    for fields in ({}, {"status": "lost"}, {"status": ["completed"]}, {"status": "completed"},
                   {"status": "running", "type": {}},
                   {"status": "running", "evalid": "x"}, {"status": "running", "type": "evaluation:failed"},
                   {"status": "running", "exit_code": 1}):  # fmt: skip
        assert put(api, "x", **fields).status_code == 422, fields
    assert api.both.get(E).json()["evaluations"] == []


def test_what_is_sent_to_be_stored_later_is_in_the_queue(api: Any) -> None:
    headers = {"Prefer": "respond-async, wait=5", "Idempotency-Key": "k"}
    answers = [api.both.post(E, json={"eval_id": "e", "code": "c"}, headers=headers) for _ in range(2)]
    assert [(one.status_code, one.headers["preference-applied"]) for one in answers] == [(202, "respond-async")] * 2
    later = api.both.put(f"{E}/e", json={"status": "completed", "exit_code": 0}, headers={"Prefer": "respond-async"})
    assert later.status_code == 202
    with redis.Redis.from_url(api.redis_url) as client:
        sent = [json.loads(body)["args"][0] for body in client.hvals("dramatiq:evaluations.msgs")]
    queued = [event for event in sent if event["type"] == "evaluation:queued"]
    assert len(sent) == 3
    assert queued[0] == queued[1]  # a repeat is the very same event
    assert api.both.get(f"{E}/e").status_code == 404


def test_a_repeat_that_goes_through_the_queue_is_the_event_that_was_stored(api: Any) -> None:
    lines = {"Idempotency-Key": "k", "Content-Type": "application/x-ndjson"}
    for headers in ({}, {"Prefer": "respond-async"}):
        answers = [
            api.both.post(E, json={"eval_id": "e", "code": "c"}, headers={"Idempotency-Key": "k", **headers}),
            api.both.put(f"{E}/e", json={"status": "running", "executor_id": "x"}, headers=headers),
            api.both.post(f"{E}/e/events", content=b'{"type": "evaluation:started"}', headers={**lines, **headers}),
        ]
        assert all(one.status_code in {200, 201, 202} for one in answers)
    with redis.Redis.from_url(api.redis_url) as client:
        sent = [json.loads(body)["args"][0] for body in client.hvals("dramatiq:evaluations.msgs")]
    stored = {
        one["event_id"]: datetime.fromisoformat(one["occurred_at"]) for one in api.both.get(f"{E}/e/events").json()["events"]
    }
    assert {one["event_id"]: datetime.fromisoformat(one["occurred_at"]) for one in sent} == stored
    assert len(stored) == 3


def test_who_may_not_read_is_told_no_more_than_the_version(api: Any) -> None:
    made = api.write.post(E, json={"eval_id": "e", "code": "secret"})
    assert made.json() == {"eval_id": "e", "version": 1, "status": "queued"}
    assert api.write.put(f"{E}/e", json={"status": "running"}).json() == {"eval_id": "e", "version": 2, "status": "running"}


def test_a_record_is_read_whatever_form_its_address_has_and_counted_by_its_route(start_api: Callable[..., Any]) -> None:
    api = start_api()
    api.both.post(E, json={"eval_id": "a@b", "code": "c"})
    plain, encoded = api.read.get(f"{E}/a@b"), api.read.get(f"{E}/%61%40b?unknown=1")
    assert plain.status_code == encoded.status_code == 200
    assert plain.content == encoded.content
    assert plain.headers["content-type"] == encoded.headers["content-type"] == "application/json"
    assert api.read.get(f"{E}/a@b", headers={"If-None-Match": plain.headers["etag"]}).status_code == 304
    counted = api.nobody.get("/metrics").text
    series = 'evalstore_http_requests_total{method="GET",route="/storage/evaluations/{eval_id}",status="200"}'
    assert f"{series} 2.0\n" in counted
    assert "a@b" not in counted
