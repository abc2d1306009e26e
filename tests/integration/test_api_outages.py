"""What the service does while a server it needs is away, and that what it answers is never old."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psycopg
import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from evalstore.local.servers import Postgres, Valkey
from evalstore.storage import database, event_store, records
from evalstore.storage.migrations import upgrade
from models.events import parse

E = "/storage/evaluations"


def test_while_postgresql_is_away_requests_are_told_to_come_again(
    start_api: Callable[..., Any], postgres_server: Postgres, eventually: Callable[..., None]
) -> None:
    upgrade(postgres_server.url())
    api = start_api(EVALSTORE_DATABASE_URL=postgres_server.url())
    assert api.both.post(E, json={"eval_id": "e", "code": "c"}).status_code == 201
    assert api.both.get(f"{E}/e").status_code == 200
    postgres_server.kill()
    body = b'{"type": "evaluation:started", "eval_id": "e"}'
    answers = [
        api.both.get(f"{E}/e"),
        api.both.get(E),
        api.both.get(f"{E}?format=ndjson"),
        api.both.get(f"{E}/e/code"),
        api.both.get(f"{E}/e/events"),
        api.both.post(E, json={"eval_id": "f", "code": "c"}),
        api.both.put(f"{E}/e", json={"status": "running"}),
        api.both.post("/storage/events:batch", content=body, headers={"Content-Type": "application/x-ndjson"}),
        api.both.get(E, headers={"Authorization": "Bearer evs_0123_4567"}),
    ]
    assert [(one.status_code, one.headers.get("retry-after"), one.headers["content-type"]) for one in answers] == [
        (503, "2", "application/problem+json")
    ] * len(answers)
    assert api.nobody.get("/health/ready").status_code == 503
    assert api.nobody.get("/health/live").status_code == 200
    later = api.both.post(E, json={"eval_id": "g", "code": "c"}, headers={"Prefer": "respond-async", "Idempotency-Key": "k"})
    assert later.status_code == 202  # The queue accepts the event.
    postgres_server.start()
    eventually(lambda: api.both.get(f"{E}/e").status_code == 200, within_s=30)
    assert api.both.put(f"{E}/e", json={"status": "running"}).json()["version"] == 2
    assert "Traceback" not in api.log.read_text()


def test_a_service_stays_ready_when_the_next_release_migrates_and_one_that_starts_later_is_not(
    start_api: Callable[..., Any], database_url: str
) -> None:
    """Else nobody would answer between the migration and the new release's first process."""
    old = start_api()
    assert old.nobody.get("/health/ready").status_code == 200
    with psycopg.connect(database_url) as conn:
        conn.execute("UPDATE evalstore_schema_version SET version_num = 'next'")
    assert old.nobody.get("/health/ready").json()["status"] == "ready"
    late = start_api().nobody.get("/health/ready")
    assert (late.status_code, "deploy a newer one" in late.json()["database"]) == (503, True)


def test_a_postgresql_that_is_frozen_keeps_nobody_waiting_for_long(
    start_api: Callable[..., Any], postgres_server: Postgres, eventually: Callable[..., None]
) -> None:
    upgrade(postgres_server.url())
    api = start_api(EVALSTORE_DATABASE_URL=postgres_server.url())
    api.both.post(E, json={"eval_id": "e", "code": "c"})
    api.both.get(f"{E}/e")
    later = {"Prefer": "respond-async", "Idempotency-Key": "k"}
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", f"{E}/e", {}),
        ("GET", E, {}),
        ("GET", f"{E}?format=ndjson", {}),
        ("PUT", f"{E}/e", {"json": {"status": "running"}}),
        ("POST", E, {"json": {"eval_id": "f", "code": "c"}, "headers": later}),
    ]
    postgres_server.freeze()
    try:
        with ThreadPoolExecutor(len(requests)) as pool:
            asked = [pool.submit(api.both.request, method, path, timeout=30, **more) for method, path, more in requests]
        assert [one.result().status_code for one in asked] == [503, 503, 503, 503, 202]
    finally:
        postgres_server.thaw()
    eventually(lambda: api.both.get(f"{E}/e").status_code == 200, within_s=30)
    assert "Traceback" not in api.log.read_text()


def test_while_redis_is_away_reads_and_writes_go_on(start_api: Callable[..., Any], valkey_server: Valkey) -> None:
    api = start_api(EVALSTORE_REDIS_URL=valkey_server.url())
    api.both.post(E, json={"eval_id": "e", "code": "c"})
    api.both.get(f"{E}/e")
    for go_away in (valkey_server.freeze, valkey_server.thaw, valkey_server.kill):
        go_away()
        version = api.both.put(f"{E}/e", json={"status": "running", "reason": None, "metadata": {"at": time.time()}}).json()
        started = time.monotonic()
        reads = [api.both.get(f"{E}/e") for _ in range(20)]
        assert time.monotonic() - started < 5
        assert [(one.status_code, one.json()["version"]) for one in reads] == [(200, version["version"])] * 20
    later = api.both.post(E, json={"eval_id": "g", "code": "c"}, headers={"Prefer": "respond-async"})
    assert (later.status_code, later.headers["retry-after"]) == (503, "2")
    assert api.nobody.get("/health/ready").json() == {"status": "ready", "database": "ready", "redis": "cannot be reached"}


def test_what_was_committed_is_what_is_read_next_also_while_redis_dies_and_comes_back(
    start_api: Callable[..., Any], database_url: str, valkey_server: Valkey
) -> None:
    """Readers of two services and of three caches; one writer speaks to a service, the other to the database alone."""
    apis = [start_api(EVALSTORE_REDIS_URL=valkey_server.url()) for _ in range(2)]
    engine = database.engine(database_url)
    committed = {"a": 0, "b": 0}
    done = threading.Event()
    old: list[tuple[str, int, int]] = []

    def write_to_the_database() -> None:
        with engine.connect() as conn:
            for number in range(1, 121):
                event = {"type": "evaluation:started", "eval_id": "a", "event_id": f"00000000-0000-4000-8000-{number:012}"}
                event_store.store(conn, [parse({**event, "occurred_at": "2026-01-01T00:00:00Z"})])
                committed["a"] = number
                if number in {40, 100}:
                    valkey_server.kill()
                elif number == 70:
                    valkey_server.start()

    def write_to_a_service() -> None:
        with httpx.Client(base_url=apis[0].url, headers={"X-API-Key": "both-key-0001"}, timeout=60) as client:
            for number in range(1, 121):
                answer = client.put(f"{E}/b", json={"status": "running", "metadata": {"number": number}})
                assert answer.json()["version"] == number
                committed["b"] = number

    with ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(_read_until, done, apis[number % 2].url, committed, old) for number in range(6)]
        try:
            for writer in [pool.submit(write_to_the_database), pool.submit(write_to_a_service)]:
                writer.result()
        finally:
            done.set()
        assert sum(reader.result() for reader in readers) > 100
    engine.dispose()
    assert old == []
    sources = "".join(api.nobody.get("/metrics").text for api in apis)
    assert all(f'source="{source}"' in sources for source in ("memory", "redis", "database"))
    assert any("the cache is not used" in api.log.read_text() for api in apis)


def _read_until(done: threading.Event, url: str, committed: dict[str, int], old: list[tuple[str, int, int]]) -> int:
    """Read; note down what is older than what was known to be committed before. Returns how many reads there were."""
    reads = 0
    with httpx.Client(base_url=url, headers={"X-API-Key": "read-key-0001"}, timeout=60) as client:
        while not done.is_set():
            for eval_id, at_least in list(committed.items()):
                answer = client.get(f"{E}/{eval_id}")
                version = answer.json()["version"] if answer.status_code == 200 else 0
                reads += 1
                if version < at_least:
                    old.append((eval_id, version, at_least))
    return reads


def test_a_record_that_another_release_cached_with_other_fields_is_not_answered(api: Any) -> None:
    api.both.post(E, json={"eval_id": "e", "code": "c"})
    engine = database.engine(api.database_url)
    with engine.connect() as conn, redis.Redis.from_url(api.redis_url) as cache:
        row_version = records.row_versions(conn, ["e"])["e"]
        cache.set("evalstore:record:e", f'{row_version}\n{{"eval_id": "e"}}', ex=60)
    engine.dispose()
    assert api.read.get(f"{E}/e").json()["status"] == "queued"


class Reads(RuleBasedStateMachine):
    """Any order of writes, deletions, reads and tampering with the cache: a read gives what is stored."""

    api: Any
    engine: Any
    redis: Any
    numbers = iter(range(1, 10**9))

    @initialize()
    def begin(self) -> None:
        self.run = next(self.numbers)
        self.versions: dict[str, int] = {}

    @rule(name=st.sampled_from("ab"))
    def write(self, name: str) -> None:
        event = {"type": "evaluation:started", "event_id": f"00000000-0000-4000-8000-{next(self.numbers):012}"}
        with self.engine.connect() as conn:
            fields = {**event, "eval_id": f"{self.run}-{name}", "occurred_at": "2026-01-01T00:00:00Z"}
            event_store.store(conn, [parse({**fields, "executor_id": str(next(self.numbers))})])
        self.versions[name] = self.versions.get(name, 0) + 1

    @rule(name=st.sampled_from("ab"))
    def delete(self, name: str) -> None:
        with self.engine.connect() as conn, conn.begin():
            for table in ("evaluation_events", "evaluations"):
                conn.exec_driver_sql(f"DELETE FROM {table} WHERE eval_id = %s", (f"{self.run}-{name}",))
        self.versions.pop(name, None)

    @rule(name=st.sampled_from("ab"))
    def put_back_what_was_cached_before(self, name: str) -> None:
        """As a reader does that was held up between reading the row and filling the cache."""
        key = f"evalstore:record:{self.run}-{name}"
        held: dict[str, bytes] = self.__dict__.setdefault("held", {})
        current = self.redis.get(key)
        if key in held:
            self.redis.set(key, held[key], ex=60)
        if current is not None:
            held[key] = current

    @invariant()
    def every_read_is_current(self) -> None:
        for name in "ab":
            for api in self.api:
                answer = api.read.get(f"{E}/{self.run}-{name}")
                found = answer.json()["version"] if answer.status_code == 200 else None
                assert found == self.versions.get(name)


def test_in_any_order_of_writes_and_reads_a_read_is_never_old(
    start_api: Callable[..., Any], database_url: str, redis_url: str
) -> None:
    Reads.api = [start_api(), start_api()]
    Reads.engine = database.engine(database_url)
    with redis.Redis.from_url(redis_url) as Reads.redis:
        budget = settings(max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck))
        run_state_machine_as_test(Reads, settings=budget)
    Reads.engine.dispose()


def test_what_is_being_answered_is_finished_before_the_service_stops(
    start_api: Callable[..., Any], eventually: Callable[..., None]
) -> None:
    api = start_api()
    lines = [json.dumps({"type": "evaluation:started", "eval_id": f"e{number}"}) for number in range(3000)]

    def slowly() -> Any:
        yield b"\n".join(line.encode() for line in lines[:1500]) + b"\n"
        begun.set()
        time.sleep(1)  # Meanwhile the service is asked to stop.
        yield b"\n".join(line.encode() for line in lines[1500:])

    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        headers = {"Content-Type": "application/x-ndjson"}
        answer = pool.submit(api.both.post, "/storage/events:batch", content=slowly(), headers=headers)
        assert begun.wait(10)
        api.terminate()
        assert answer.result().status_code == 200
        assert len(answer.result().text.splitlines()) == 3000
    eventually(lambda: not api.lives(), what="the end of the service")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", f"{E}/", 404), ("DELETE", E, 405), ("PATCH", f"{E}/e", 405), ("GET", f"{E}/a%00b", 404),
     ("GET", f"{E}/..%2fetc", 404), ("GET", f"{E}/%ff%fe", 404), ("GET", f"{E}/{'x' * 201}", 404), ("PUT", f"{E}/a%20b", 422)],
)  # fmt: skip
def test_every_error_is_a_problem_with_the_id_of_its_request(api: Any, method: str, path: str, status: int) -> None:
    answer = api.both.request(method, path, json={"status": "running"} if method == "PUT" else None)
    problem = answer.json()
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert (problem["status"], problem["request_id"]) == (status, answer.headers["x-request-id"])
    assert set(problem) >= {"type", "title", "detail"}
    assert status != 405 or answer.headers["allow"] == ("GET, HEAD, POST" if path == E else "DELETE, GET, HEAD, PUT")
