"""Each subscription receives what it asked for, signed and in order, and no receiver holds up another."""

import asyncio
import base64
import contextlib
import json
import ssl
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import pytest
import trustme
from sqlalchemy import Connection, Engine
from standardwebhooks import Webhook, WebhookVerificationError

from evalstore.sinks.protocol import Batch, SinkEvent
from evalstore.sinks.webhook_options import WebhookOptions
from evalstore.sinks.webhook_sink import WebhookSink
from evalstore.storage import database, webhook_deliveries, webhooks
from evalstore.storage.operator_actions import Intent
from evalstore.storage.webhook_deliveries import Delivery
from models.networks import parse_networks
from models.webhooks import parse_subscription
from tests.receivers import Received, Receiver, respond

Eventually = Callable[..., None]
LOCAL = parse_networks("127.0.0.0/8")
INTENT = Intent("webhooks create", "tester", None, {})
DAY = timedelta(days=1)


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


class Subscribed(NamedTuple):
    id: UUID
    secret: str


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def other() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def start(database_url: str, clock: Clock) -> Iterator[Callable[..., WebhookSink]]:
    made: list[WebhookSink] = []

    def begin(resolve: Any = None, networks: str = "127.0.0.0/8", **options: Any) -> WebhookSink:
        given = WebhookOptions(type="webhook", **{"first_retry_s": 0.05, "request_timeout_s": 2} | options)
        engine = database.engine(database_url, pool_size=2)
        made.append(WebhookSink("hooks", given, engine, parse_networks(networks), clock, resolve))
        return made[-1]

    yield begin
    for sink in made:
        sink.close()


def subscribe(conn: Connection, url: str, **filters: Any) -> Subscribed:
    subscription, secret = parse_subscription({"url": url, **filters}, LOCAL)
    return Subscribed(webhooks.create(conn, subscription, secret, INTENT), secret)


def event(eval_id: str, version: int = 1, type_: str = "evaluation:started", status: str = "running") -> SinkEvent:
    at = f"2026-01-01T00:00:{version:02}Z"
    fields = {"type": type_, "eval_id": eval_id, "version": version, "recorded_at": at}
    return SinkEvent(eval_id, str(uuid4()), type_, fields, status)


def write(sink: WebhookSink, *events: SinkEvent) -> None:
    sink.write(Batch(events))


def history(engine: Engine, subscribed: Subscribed) -> list[Delivery]:
    with engine.connect() as conn:
        return webhook_deliveries.history(conn, subscribed.id)


def kept(engine: Engine, subscribed: Subscribed) -> webhooks.Webhook:
    with engine.connect() as conn:
        found = webhooks.get(conn, subscribed.id)
    assert found is not None
    return found


def versions(requests: Sequence[Received], eval_id: str) -> list[int]:
    return [one.data["version"] for one in requests if one.data["eval_id"] == eval_id]


def test_a_delivery_is_a_signed_confirmation(
    start: Callable[..., WebhookSink], conn: Connection, receiver: Receiver, eventually: Eventually
) -> None:
    subscribed = subscribe(conn, receiver.url)
    write(start(), event("e-1"))
    eventually(lambda: receiver.requests)
    (received,) = receiver.requests
    body = Webhook(subscribed.secret).verify(received.body, received.headers)
    assert body == json.loads(received.body)
    assert body["type"] == body["data"]["type"] == "storage:evaluation:created"
    assert body["timestamp"] == "2026-01-01T00:00:01Z"
    assert body["data"]["eval_id"] == "e-1"
    assert (body["data"]["version"], body["data"]["status"]) == (1, "running")
    assert len(body["data"]["event_ids"]) == 1
    assert received.path == "/hook"
    assert received.headers["content-type"] == "application/json"
    with pytest.raises(WebhookVerificationError):
        Webhook(subscribed.secret).verify(received.body + b" ", received.headers)


def test_after_a_rotation_both_secrets_verify_until_the_old_one_ends(
    start: Callable[..., WebhookSink], conn: Connection, receiver: Receiver, eventually: Eventually, clock: Clock
) -> None:
    subscribed = subscribe(conn, receiver.url)
    new = "whsec_" + base64.b64encode(bytes(range(32))).decode()
    assert webhooks.rotate(conn, subscribed.id, new, 3600, INTENT) is not None
    sink = start()
    write(sink, event("e-1"))
    eventually(lambda: len(receiver.requests) == 1)
    for secret in (subscribed.secret, new):
        Webhook(secret).verify(receiver.requests[0].body, receiver.requests[0].headers)
    webhooks.rotate(conn, subscribed.id, subscribed.secret, 0, INTENT)
    write(sink, event("e-2"))
    eventually(lambda: len(receiver.requests) == 2)
    Webhook(subscribed.secret).verify(receiver.requests[1].body, receiver.requests[1].headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(new).verify(receiver.requests[1].body, receiver.requests[1].headers)


def test_a_subscription_gets_what_its_filters_match(
    start: Callable[..., WebhookSink], conn: Connection, receiver: Receiver, eventually: Eventually
) -> None:
    conn.exec_driver_sql(
        "INSERT INTO evaluations (eval_id, status, attempt, version, run_id, submitter, metadata)"
        " VALUES ('e-1', 'completed', 1, 2, 'run-1', 'ann', '{}'), ('e-2', 'completed', 1, 2, 'run-2', 'ben', '{}')"
    )
    conn.commit()
    base = receiver.url.removesuffix("hook")
    subscribe(conn, base + "run", run_id="run-1")
    subscribe(conn, base + "submitter", submitter="ben")
    subscribe(conn, base + "type", event_types=["evaluation:completed"])
    subscribe(conn, base + "status", statuses=["failed"])
    subscribe(conn, base + "none", statuses=["lost"])
    write(
        start(),
        event("e-1"),
        event("e-2", 2, "evaluation:completed", "completed"),
        event("e-3", 2, "evaluation:failed", "failed"),
    )
    eventually(lambda: len(receiver.requests) == 4)
    found = {(one.path, one.data["eval_id"]) for one in receiver.requests}
    assert found == {("/run", "e-1"), ("/submitter", "e-2"), ("/type", "e-2"), ("/status", "e-3")}
    assert next(one for one in receiver.requests if one.path == "/run").data["run_id"] == "run-1"


def test_deliveries_of_an_evaluation_come_in_order_although_some_fail(
    start: Callable[..., WebhookSink], conn: Connection, receiver: Receiver, eventually: Eventually, engine: Engine
) -> None:
    subscribed = subscribe(conn, receiver.url)
    taken: list[Received] = []

    def fail_each_second(received: Received, handler: Any) -> None:
        if len(receiver.requests) % 2:
            respond(handler, 500)
        else:
            taken.append(received)
            respond(handler, 200)

    receiver.answer = fail_each_second
    sink = start()
    for number in range(1, 6):
        write(sink, event("e-1", number), event("e-2", number))
    eventually(lambda: len(taken) == 10)
    assert versions(taken, "e-1") == versions(taken, "e-2") == [1, 2, 3, 4, 5]
    eventually(lambda: all(one.state == "delivered" for one in history(engine, subscribed)))
    assert kept(engine, subscribed).failing_since is None


def test_a_delivery_that_is_refused_holds_up_no_other_evaluation(
    start: Callable[..., WebhookSink],
    conn: Connection,
    receiver: Receiver,
    eventually: Eventually,
    engine: Engine,
    clock: Clock,
) -> None:
    subscribed = subscribe(conn, receiver.url)
    receiver.answer = lambda received, handler: respond(handler, 500 if received.data["eval_id"] == "bad" else 200)
    sink = start()
    write(sink, event("bad"), *(event(f"e-{number}") for number in range(20)))
    eventually(lambda: sum(one.state == "delivered" for one in history(engine, subscribed)) == 20)
    clock.ahead = 3 * DAY + timedelta(minutes=1)
    eventually(lambda: [one for one in history(engine, subscribed) if one.state == "failed"])
    (failed,) = [one for one in history(engine, subscribed) if one.state == "failed"]
    assert (failed.eval_id, failed.status_code) == ("bad", 500)


def test_a_receiver_that_fails_for_three_days_is_disabled(
    start: Callable[..., WebhookSink],
    conn: Connection,
    receiver: Receiver,
    eventually: Eventually,
    engine: Engine,
    clock: Clock,
) -> None:
    subscribed = subscribe(conn, receiver.url)
    receiver.status = 500
    write(start(), event("e-1"))
    eventually(lambda: kept(engine, subscribed).failing_since)
    clock.ahead = 3 * DAY - timedelta(minutes=10)
    before = len(receiver.requests)
    eventually(lambda: len(receiver.requests) > before + 1)
    assert kept(engine, subscribed).state == "active"
    clock.ahead = 3 * DAY + timedelta(hours=7)
    eventually(lambda: kept(engine, subscribed).state == "disabled")
    assert kept(engine, subscribed).disabled_at is not None


def test_a_receiver_that_answers_410_is_disabled_at_once_and_can_be_enabled(
    start: Callable[..., WebhookSink], conn: Connection, receiver: Receiver, eventually: Eventually, engine: Engine
) -> None:
    subscribed = subscribe(conn, receiver.url)
    receiver.status = 410
    sink = start()
    write(sink, event("e-1"))
    eventually(lambda: kept(engine, subscribed).state == "disabled")
    write(sink, event("e-2"))
    assert [one.eval_id for one in history(engine, subscribed)] == ["e-1"]
    receiver.status = 200
    assert webhooks.enable(conn, subscribed.id, INTENT)
    eventually(lambda: [one.state for one in history(engine, subscribed)] == ["delivered"])


def test_receivers_that_hang_delay_no_other(
    start: Callable[..., WebhookSink],
    conn: Connection,
    receiver: Receiver,
    other: Receiver,
    eventually: Eventually,
    engine: Engine,
) -> None:
    hanging = [subscribe(conn, f"{receiver.url}/{number}") for number in range(30)]
    good = subscribe(conn, other.url)
    receiver.answer = receiver.hang
    sink = start()
    for number in range(1, 6):
        write(sink, *(event(f"e-{which}", number) for which in range(10)))
    eventually(lambda: len(other.requests) == 50, within_s=5)
    assert max(len([one for one in receiver.requests if one.path.endswith(f"/{number}")]) for number in range(30)) <= 2
    eventually(lambda: (kept(engine, hanging[0]).last_error or "").startswith("no answer within"))
    assert kept(engine, good).delivered == 50


def test_a_redirect_is_not_followed(
    start: Callable[..., WebhookSink],
    conn: Connection,
    receiver: Receiver,
    other: Receiver,
    eventually: Eventually,
    engine: Engine,
) -> None:
    subscribed = subscribe(conn, receiver.url)
    targets = iter(["http://169.254.169.254/latest/meta-data", other.url] * 100)
    receiver.answer = lambda _, handler: respond(handler, 307, location=next(targets))
    write(start(), event("e-1"))
    eventually(lambda: len(receiver.requests) > 2)
    assert not other.requests
    assert "redirects are not followed" in (kept(engine, subscribed).last_error or "")


def test_a_name_is_resolved_once_for_each_request_and_a_private_address_refused(
    start: Callable[..., WebhookSink], conn: Connection, receiver: Receiver, eventually: Eventually, engine: Engine
) -> None:
    """The second answer of the resolver is another one, as of a name that is rebound between check and connection."""
    answers = iter(["127.0.0.1"])
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        await asyncio.sleep(0)
        return [next(answers, "169.254.169.254")]

    subscribed = subscribe(conn, f"http://hooks.example.com:{receiver.port}/hook")
    sink = start(resolve)
    write(sink, event("e-1"))
    eventually(lambda: [one.state for one in history(engine, subscribed)] == ["delivered"])
    assert asked == ["hooks.example.com"]
    assert receiver.requests[0].headers["host"] == f"hooks.example.com:{receiver.port}"
    write(sink, event("e-2"))
    eventually(lambda: kept(engine, subscribed).last_error)
    assert "address refused: 169.254.169.254" in (kept(engine, subscribed).last_error or "")
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.1", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::1", "ff02::1"]
)
def test_an_address_that_is_not_public_is_refused(
    start: Callable[..., WebhookSink], conn: Connection, eventually: Eventually, engine: Engine, address: str
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        await asyncio.sleep(0)
        return [address]

    subscribed = subscribe(conn, "https://hooks.example.com/hook")
    write(start(resolve, networks=""), event("e-1"))
    eventually(lambda: (kept(engine, subscribed).last_error or "").startswith("address refused"))


def test_https_checks_the_name_of_the_url_at_the_address_that_was_resolved(
    start: Callable[..., WebhookSink], conn: Connection, eventually: Eventually, engine: Engine, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("hooks.example.com").configure_cert(tls)
    names: list[str | None] = []
    tls.sni_callback = lambda _, name, __: names.append(name)

    async def resolve(host: str, port: int) -> list[str]:
        await asyncio.sleep(0)
        return ["127.0.0.1"]

    secure = Receiver(tls=tls)
    good = subscribe(conn, f"https://hooks.example.com:{secure.port}/good")
    bad = subscribe(conn, f"https://other.example.com:{secure.port}/bad")
    write(start(resolve, ca_file=tmp_path / "ca.pem"), event("e-1"))
    eventually(lambda: [one.state for one in history(engine, good)] == ["delivered"])
    eventually(lambda: "CERTIFICATE_VERIFY_FAILED" in (kept(engine, bad).last_error or ""))
    secure.close()
    assert {one.path for one in secure.requests} == {"/good"}
    assert set(names) == {"hooks.example.com", "other.example.com"}


def test_an_answer_that_does_not_end_is_left(
    start: Callable[..., WebhookSink], conn: Connection, receiver: Receiver, eventually: Eventually, engine: Engine
) -> None:
    """The first subscription's body has no end; the head of the second one's comes a byte at a time."""

    def trickle(received: Received, handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if received.path == "/body" else b"x: "))
        with contextlib.suppress(OSError):
            while not receiver.released.wait(0.1):
                handler.wfile.write(b"x")
        handler.close_connection = True

    receiver.answer = trickle
    base = receiver.url.removesuffix("hook")
    body, head = subscribe(conn, base + "body"), subscribe(conn, base + "head")
    write(start(), event("e-1"))
    eventually(lambda: [one.state for one in history(engine, body)] == ["delivered"])
    eventually(lambda: (kept(engine, head).last_error or "").startswith("no answer within 2 s"))


def test_an_erased_evaluation_is_forgotten_and_confirmed(
    start: Callable[..., WebhookSink], conn: Connection, receiver: Receiver, eventually: Eventually, engine: Engine
) -> None:
    everything = subscribe(conn, receiver.url)
    other = subscribe(conn, receiver.url, statuses=["failed"])
    sink = start()
    write(sink, event("e-1"))
    eventually(lambda: [one.state for one in history(engine, everything)] == ["delivered"])
    sink.erase("e-1")
    eventually(lambda: [one.type for one in history(engine, everything)] == ["storage:evaluation:erased"])
    eventually(lambda: len(receiver.requests) == 2)
    assert receiver.requests[1].data["eval_id"] == "e-1"
    assert not history(engine, other)


def test_a_batch_that_comes_again_is_delivered_once(
    start: Callable[..., WebhookSink], conn: Connection, receiver: Receiver, eventually: Eventually, engine: Engine
) -> None:
    subscribed = subscribe(conn, receiver.url)
    sink = start()
    events = [event("e-1"), event("e-1", 2)]
    write(sink, *events)
    eventually(lambda: len(receiver.requests) == 2)
    write(sink, *events, event("e-1", 3))
    eventually(lambda: [one.state for one in history(engine, subscribed)] == ["delivered"] * 3)
    assert versions(receiver.requests, "e-1") == [1, 2, 3]


def test_an_operator_has_a_delivery_sent_once_more(
    start: Callable[..., WebhookSink], conn: Connection, receiver: Receiver, eventually: Eventually, engine: Engine
) -> None:
    subscribed = subscribe(conn, receiver.url)
    write(start(), event("e-1"))
    eventually(lambda: [one.state for one in history(engine, subscribed)] == ["delivered"])
    (delivery,) = history(engine, subscribed)
    assert webhook_deliveries.redeliver(conn, subscribed.id, delivery.id, INTENT, datetime.now(UTC))
    eventually(lambda: len(receiver.requests) == 2)
    assert receiver.requests[0].headers["webhook-id"] == receiver.requests[1].headers["webhook-id"]
    assert receiver.requests[0].body == receiver.requests[1].body


def test_what_is_settled_goes_with_its_age(
    conn: Connection, start: Callable[..., WebhookSink], receiver: Receiver, eventually: Eventually, engine: Engine
) -> None:
    subscribed = subscribe(conn, receiver.url)
    write(start(), event("e-1"))
    eventually(lambda: [one.state for one in history(engine, subscribed)] == ["delivered"])
    assert webhook_deliveries.prune(conn, datetime.now(UTC) - DAY) == 0
    assert webhook_deliveries.prune(conn, datetime.now(UTC) + DAY) == 1
