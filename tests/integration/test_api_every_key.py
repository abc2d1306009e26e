"""Every route of the OpenAPI document with every kind of key. A route that is not in ROUTES fails the test."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import httpx
import pytest

from evalstore.storage import api_keys, database
from evalstore.storage.api_keys import Rate
from evalstore.storage.visibility import Visibility

E = "/storage/evaluations"
ABSENT = UUID(int=1)
ID = "{eval_id}"


class Route(NamedTuple):
    """A request. `{eval_id}` in the path or body is that of an evaluation. `told`: how evaluations show in the answer.

    Sums are tested in test_api_runs.py and test_anomalies.py.
    """

    scope: str | None
    body: Any = None
    told: str = "answer"


_STARTED = {"type": "evaluation:started", "eval_id": ID}
_WEBHOOK = "/storage/webhooks"
ROUTES: dict[tuple[str, str], Route] = {
    ("GET", f"{E}/{ID}"): Route("read"),
    ("POST", E): Route("write", {"eval_id": ID, "code": "d", "submitter": "ann", "run_id": "team-1"}),
    ("PUT", f"{E}/{ID}"): Route("write", {"status": "running"}),
    ("DELETE", f"{E}/{ID}"): Route("admin"),
    ("GET", E): Route("read", told="list"),
    ("GET", "/storage/stream"): Route("read", told="stream"),
    ("POST", f"{E}/{ID}/events"): Route("write", _STARTED),
    ("POST", "/storage/events:batch"): Route("write", _STARTED, told="lines"),
    ("GET", f"{E}/{ID}/events"): Route("read"),
    ("GET", f"{E}/{ID}/code"): Route("read"),
    ("GET", f"{E}/{ID}/output"): Route("read"),
    ("GET", f"{E}/{ID}/error"): Route("read"),
    ("POST", "/storage/content"): Route("write", {}, told="nothing"),
    ("POST", _WEBHOOK): Route("admin", {"url": "https://example.com"}),
    ("GET", _WEBHOOK): Route("admin"),
    ("GET", f"{_WEBHOOK}/{{webhook_id}}"): Route("admin"),
    ("DELETE", f"{_WEBHOOK}/{{webhook_id}}"): Route("admin"),
    ("POST", f"{_WEBHOOK}/{{webhook_id}}/enable"): Route("admin"),
    ("POST", f"{_WEBHOOK}/{{webhook_id}}/rotate"): Route("admin"),
    ("POST", f"{_WEBHOOK}/{{webhook_id}}/test"): Route("admin"),
    ("GET", f"{_WEBHOOK}/{{webhook_id}}/deliveries"): Route("admin"),
    ("POST", f"{_WEBHOOK}/{{webhook_id}}/deliveries/{{delivery_id}}/redeliver"): Route("admin"),
    ("GET", "/storage/runs"): Route("read", told="sums"),
    ("GET", "/storage/runs/{run_id}"): Route("read", told="sums"),
    ("PUT", "/storage/runs/{run_id}"): Route("write", {"closed": False}, told="sums"),
    ("GET", "/storage/stats"): Route("read", told="sums"),
    ("GET", "/storage/anomalies"): Route("read", told="sums"),
    ("GET", "/storage/anomalies/{anomaly_id}"): Route("read", told="sums"),
    ("POST", "/storage/anomalies/{anomaly_id}/acknowledge"): Route("admin"),
    ("GET", "/health/live"): Route(None),
    ("GET", "/health/ready"): Route(None),
    ("GET", "/metrics"): Route(None),
}
# Other forms of a route, which must be as closed.
FORMS = ["?wait=1", "?wait=0.5", "?as_of=2200-01-01T00:00:00Z", "?wait=1&x="]
RESTRICTIONS = {
    "submitter": Visibility(submitter="ann"),
    "run prefix": Visibility(run_prefix="team-"),
    "both": Visibility("ann", "team-"),
}
# The evaluations that a key with each restriction may see, among those of `prepare`.
OWN = {"submitter": {"own", "ann-alone"}, "run prefix": {"own", "run-alone"}, "both": {"own"}}
ALL = {"own", "ann-alone", "run-alone", "foreign", "nobody"}


@pytest.fixture
def service(start_api: Callable[..., Any], tmp_path: Path) -> Any:
    return start_api(EVALSTORE_OBJECT_STORE_URL=(tmp_path / "objects").as_uri())


@pytest.fixture
def make(service: Any, eventually: Callable[..., None]) -> Iterator[Callable[..., httpx.Client]]:
    """`make(scopes, visibility=…, rate=…)`: a client with a new key; with `revoked=True` one whose key is no more."""
    engine = database.engine(service.database_url)

    def new(scopes: list[str], *, revoked: bool = False, **options: Any) -> httpx.Client:
        with engine.connect() as conn:
            key, kept = api_keys.create(conn, "test", scopes, **options)
            if revoked:
                api_keys.revoke(conn, [kept.key_id])
        made: httpx.Client = service.client(key)
        if not revoked and "rate" not in options:
            eventually(lambda: made.get(f"{E}/absent").status_code != 401)
        return made

    yield new
    engine.dispose()


def prepare(api: Any) -> None:
    owners = {
        "own": {"submitter": "ann", "run_id": "team-1"},
        "ann-alone": {"submitter": "ann", "run_id": "x"},
        "run-alone": {"submitter": "bob", "run_id": "team-2"},
        "foreign": {"submitter": "bob", "run_id": "x"},
        "nobody": {},
    }
    for eval_id, owner in owners.items():
        api.both.post(E, json={"eval_id": eval_id, "code": "c", **owner}).raise_for_status()
        ended = {"status": "failed", "error": "e", "output": "o"}
        api.both.put(f"{E}/{eval_id}", json=ended).raise_for_status()


def send(client: httpx.Client, method: str, path: str, route: Route, eval_id: str = "own") -> httpx.Response:
    """Send a request. Of a stream read only the beginning: it has no end."""
    path = path.replace(ID, eval_id).replace("{webhook_id}", str(ABSENT)).replace("{delivery_id}", str(ABSENT))
    path = path.replace("{anomaly_id}", str(ABSENT)).replace("{run_id}", "team-1")
    content = None if route.body is None else json.dumps(route.body).replace(ID, eval_id)
    with client.stream(method, path, content=content) as answer:
        if route.told != "stream" or answer.status_code != 200:
            answer.read()
    return answer


def test_each_route_of_the_document_is_driven(api: Any) -> None:
    paths = api.nobody.get("/openapi.json").json()["paths"]
    documented = {(method.upper(), path) for path, operations in paths.items() for method in operations}
    assert documented == set(ROUTES)


def test_each_route_is_answered_as_the_scopes_of_a_key_allow(service: Any, make: Callable[..., httpx.Client]) -> None:
    prepare(service)
    given: dict[str, tuple[httpx.Client, set[str]]] = {
        "none": (service.nobody, set()),
        "wrong": (service.client("evs_000000000000_guessed"), set()),
        "revoked": (make(["admin"], revoked=True), set()),
        "read": (make(["read"]), {"read"}),
        "write": (make(["write"]), {"write"}),
        "admin": (make(["admin"]), {"read", "write", "admin"}),
        **{name: (make(["read", "write"], visibility=each), {"read", "write"}) for name, each in RESTRICTIONS.items()},
    }
    for name, (client, scopes) in given.items():
        for (method, path), route in ROUTES.items():
            if (method, path) == ("DELETE", f"{E}/{ID}") and name == "admin":
                continue  # Erases what the others need.
            status = send(client, method, path, route).status_code
            what = f"{name}: {method} {path}: {status}"
            if route.scope is None:
                assert status in {200, 503}, what
            elif not scopes:
                assert status == 401, what
            elif route.scope not in scopes:
                assert status == 403, what
            else:
                assert status in {200, 201, 404, 409}, what
                assert status != 404 or any(part in path for part in ("webhook", "anomal", "/runs/")), what
    for form in FORMS:
        assert [service.nobody.get(f"{E}/own{form}").status_code, given["write"][0].get(f"{E}/own{form}").status_code] == [
            401,
            403,
        ]


@pytest.mark.parametrize("restriction", RESTRICTIONS)
def test_what_a_key_may_not_see_does_not_exist_on_any_route(
    restriction: str, service: Any, make: Callable[..., httpx.Client]
) -> None:
    prepare(service)
    client, own = make(["read", "write"], visibility=RESTRICTIONS[restriction]), OWN[restriction]
    for (method, path), route in ROUTES.items():
        if route.scope in {None, "admin"}:
            continue
        if ID in path or route.told == "answer":
            _check_of_one(client, method, path, route, own)
        elif route.told == "list":
            for form in ("", "?cursor=", "?format=ndjson", "?total=true", "?order=oldest&cursor="):
                text = client.get(f"{path}{form}").text
                assert {eval_id for eval_id in ALL if f'"{eval_id}"' in text} == own, form
            listed = client.get(f"{path}?total=true").json()
            assert listed["total"] == len(listed["evaluations"])
        elif route.told == "lines":
            lines = "\n".join(json.dumps({**_STARTED, "eval_id": eval_id}) for eval_id in sorted(ALL))
            outcomes = {line["eval_id"]: line["outcome"] for line in service.lines(client.post(path, content=lines))}
            assert {eval_id for eval_id, outcome in outcomes.items() if outcome == "applied"} == own
        else:
            assert route.told in {"nothing", "stream", "sums"}, f"say how {method} {path} tells of evaluations"
    for form in FORMS[:3]:
        for eval_id in ALL:
            assert client.get(f"{E}/{eval_id}{form}").status_code == (200 if eval_id in own else 404), f"{eval_id}{form}"


def _check_of_one(client: httpx.Client, method: str, path: str, route: Route, own: set[str]) -> None:
    """A hidden evaluation is answered as an absent one is."""
    for eval_id in sorted(ALL - own):
        answer = send(client, method, path, route, eval_id)
        assert answer.status_code == 404, f"{method} {path} of {eval_id}: {answer.status_code} {answer.text}"
        if path != E:
            absent = send(client, method, path, route, "absent")
            assert _comparable(answer, eval_id) == _comparable(absent, "absent"), f"{method} {path} of {eval_id}"
    for eval_id in own:
        assert send(client, method, path, route, eval_id).status_code in {200, 201, 409}, f"{method} {path}"


def _comparable(answer: httpx.Response, eval_id: str) -> Any:
    return {name: value for name, value in answer.json().items() if name != "request_id"} | {
        "detail": answer.json()["detail"].replace(eval_id, "ID")
    }


def test_a_restricted_key_stores_only_what_it_may_see(service: Any, make: Callable[..., httpx.Client]) -> None:
    client = make(["read", "write"], visibility=Visibility("ann", "team-"))
    own = {"code": "c", "submitter": "ann", "run_id": "team-1"}
    for wrong in ({"submitter": "bob"}, {"run_id": "other"}, {"submitter": None}, {"run_id": None}):
        for prefer in ({}, {"Prefer": "respond-async"}):
            answer = client.post(E, json={"eval_id": "new", **own, **wrong}, headers=prefer)
            assert (answer.status_code, answer.json()["type"]) == (403, "urn:evalstore:problem:forbidden"), wrong
    for prefer in ({}, {"Prefer": "respond-async"}):  # An event without a queued one would make an evaluation of nobody.
        assert client.put(f"{E}/new", json={"status": "running"}, headers=prefer).status_code == 404
        assert client.post(f"{E}/new/events", json={"type": "evaluation:started"}, headers=prefer).status_code == 404
    assert service.read.get(f"{E}/new").status_code == 404
    answer = client.post(E, json={"eval_id": "new", **own}, headers={"Prefer": "respond-async"})
    assert answer.status_code == 201  # Stored at once, so that it is checked.
    assert client.put(f"{E}/new", json={"status": "running"}).json()["status"] == "running"
    moved = {"type": "evaluation:queued", "attempt": 2, "code": "c", "submitter": "bob", "run_id": "team-1"}
    assert client.post(f"{E}/new/events", json=moved).status_code == 403
    lines = [
        {"eval_id": "new", **moved},
        {"eval_id": "other", "type": "evaluation:queued", **own},
        {"eval_id": "x", "type": "evaluation:started"},
    ]
    answer = client.post("/storage/events:batch", content="\n".join(map(json.dumps, lines)))
    outcomes = [(line["outcome"], [fault["field"] for fault in line.get("faults", ())]) for line in service.lines(answer)]
    assert outcomes == [("invalid", ["submitter"]), ("applied", []), ("invalid", ["eval_id"])]
    assert service.read.get(f"{E}/new").json()["version"] == 2
    service.admin.delete(f"{E}/other").raise_for_status()
    assert client.post(E, json={"eval_id": "other", **own}).status_code == 404


def test_a_record_with_any_content_is_read_with_a_restricted_key(service: Any, make: Callable[..., httpx.Client]) -> None:
    client = make(["read"], visibility=Visibility(submitter="ann"))
    body = json.dumps({"eval_id": "e", "code": "\ud800\0 lone", "submitter": "ann"})
    service.both.post(E, content=body).raise_for_status()
    for form in ("", "?wait=1", "?wait=0.1"):
        assert client.get(f"{E}/e{form}").content == service.read.get(f"{E}/e").content


def test_an_old_release_refuses_a_restricted_key(service: Any, make: Callable[..., httpx.Client]) -> None:
    make(["read"], visibility=Visibility(submitter="ann"))
    engine = database.engine(service.database_url)
    with engine.connect() as conn, conn.begin():
        ((scopes,),) = database.driver(conn).execute("SELECT scopes FROM api_keys").fetchall()
        assert scopes == []
    with engine.connect() as conn, pytest.raises(ValueError, match="cannot be restricted"):
        api_keys.create(conn, "x", ["admin"], visibility=Visibility(submitter="ann"))
    engine.dispose()


def test_a_rate_holds_on_every_route_and_for_all_processes_together(
    service: Any, start_api: Callable[..., Any], make: Callable[..., httpx.Client]
) -> None:
    other = start_api(EVALSTORE_DATABASE_URL=service.database_url, EVALSTORE_REDIS_URL=service.redis_url)
    client = make(["admin"], rate=Rate(3, 3600))
    headers = dict(client.headers)
    first = client.get(E)
    assert first.headers["ratelimit-policy"] == '"key";q=3;w=3600'
    assert first.headers["ratelimit"].startswith('"key";r=2;t=')
    elsewhere = httpx.get(f"{other.url}{E}", headers={"Authorization": headers["authorization"]})
    assert elsewhere.headers["ratelimit"].startswith('"key";r=1;t=')
    assert client.get(f"{E}/absent").status_code == 404
    for (method, path), route in ROUTES.items():
        answer = send(client, method, path, route)
        if route.scope is None:
            assert answer.status_code == 200
            continue
        assert answer.status_code == 429, f"{method} {path}"
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["ratelimit"].startswith('"key";r=0;t=')
        assert 1 <= int(answer.headers["retry-after"]) <= 3600
    assert client.get(f"{E}/own?wait=1").status_code == 429
    assert 'evalstore_http_rate_checks_total{outcome="refused"}' in service.nobody.get("/metrics").text


def test_without_redis_requests_are_answered_without_a_rate(
    start_api: Callable[..., Any], valkey_server: Any, database_url: str
) -> None:
    api = start_api(EVALSTORE_REDIS_URL=valkey_server.url())
    engine = database.engine(database_url)
    with engine.connect() as conn:
        key, _ = api_keys.create(conn, "rated", ["read"], rate=Rate(1, 3600))
    engine.dispose()
    client = api.client(key)
    assert [client.get(E).status_code for _ in range(2)] == [200, 429]
    valkey_server.kill()
    began = time.monotonic()
    assert [client.get(E).status_code for _ in range(20)] == [200] * 20
    assert time.monotonic() - began < 5
    unchecked = [
        line for line in api.nobody.get("/metrics").text.splitlines() if 'outcome="unchecked"' in line and "rate_checks" in line
    ]
    assert float(unchecked[0].rpartition(" ")[2]) == 20
