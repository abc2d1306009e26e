"""Events in Kafka: what a consumer sees, and that it sees each, whatever dies."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from confluent_kafka import Consumer, TopicPartition
from sqlalchemy import Connection

from evalstore.local.servers import free_port
from tests.integration.shell import Operator
from tests.integration.test_sinks import AT, sinks, store
from tests.kafka import Kafka, SecureKafka, Tansu, broker, described
from tests.sinks import Runner, installed

Eventually = Callable[..., None]
Message = tuple[str, dict[str, Any] | None, dict[str, str]]


def consumed(server: Kafka, topic: str, partitions: int = 3) -> list[Message]:
    """Key, value and headers of all committed messages, by partition and offset."""
    given = {"bootstrap.servers": server.address, "group.id": str(uuid4()), "isolation.level": "read_committed"}
    consumer = Consumer(given | {"enable.auto.commit": False, "enable.partition.eof": True})
    found: list[Message] = []
    try:
        for partition in range(partitions):
            _, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
            consumer.assign([TopicPartition(topic, partition, 0)])
            give_up = time.monotonic() + 20
            while high and time.monotonic() < give_up:
                message = consumer.poll(0.5)
                if message is None:
                    continue
                if message.error():
                    break
                key, value = message.key(), message.value()
                given_headers: Any = message.headers() or []
                headers = {name: text.decode() for name, text in given_headers}
                found.append(((key or b"").decode(), json.loads(value) if value else None, headers))
    finally:
        consumer.close()
    return found


@pytest.fixture
def topic() -> str:
    return f"events-{uuid4().hex[:8]}"


@pytest.fixture
def start(
    tmp_path: Path, database_url: str, redis_url: str, kafka_server: Kafka, topic: str
) -> Iterator[Callable[..., Runner]]:
    """`start(transactional="true")`: a runner of the sink `main`, with these keys."""
    made: list[Runner] = []

    def begin(**keys: str) -> Runner:
        folder = tmp_path / f"runner-{len(made)}"
        folder.mkdir()
        given = {"type": '"kafka"', "bootstrap_servers": f'"{kafka_server.address}"', "topic": f'"{topic}"', "partitions": "3"}
        given |= {"create_topics": "true", "replication_factor": "1"} | keys
        table = "[main]\n" + "".join(f"{name} = {value}\n" for name, value in given.items())
        made.append(Runner(folder, {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url}, table))
        made[-1].start()
        return made[-1]

    yield begin
    for runner in made:
        runner.kill()
        print(f"--- {runner.log}\n{runner.log.read_text()[-4000:]}")


@pytest.fixture
def shell(operator: Operator) -> Operator:
    operator.env |= installed(operator.folder)
    return operator


def test_a_message_is_a_cloud_event_and_an_erasure_a_tombstone(
    start: Callable[..., Runner], conn: Connection, kafka_server: Kafka, topic: str, eventually: Eventually, shell: Operator
) -> None:
    start()
    (event_id,) = store(conn, "e", metadata={"a": 1})
    with conn.begin():
        body = (
            '{"type":"storage:evaluation:erased","eval_id":"e","version":1,"status":"erased","event_ids":[],"recorded_at":""}'
        )
        conn.exec_driver_sql("INSERT INTO confirmations (count, body) VALUES (1, %s)", (body,))
    eventually(lambda: sinks(shell)["main"]["lag_events"] == 0 and sinks(shell)["main"]["delivered"] == 1, within_s=30)
    (key, value, headers), tombstone = consumed(kafka_server, topic)
    assert (key, headers) == (
        "e",
        {
            "ce_specversion": "1.0",
            "ce_id": event_id,
            "ce_source": "evalstore",
            "ce_type": "evaluation:started",
            "ce_subject": "e",
            "ce_time": AT,
            "content-type": "application/json",
        },
    )
    assert value is not None
    assert (value["event_id"], value["version"], value["metadata"]) == (event_id, 1, {"a": 1})
    assert tombstone == ("e", None, {})


@pytest.mark.parametrize("transactional", ["false", "true"])
def test_each_event_is_there_in_order_though_runners_are_killed(
    start: Callable[..., Runner],
    conn: Connection,
    kafka_server: Kafka,
    topic: str,
    transactional: str,
    eventually: Eventually,
    shell: Operator,
) -> None:
    if transactional == "true" and isinstance(kafka_server, Tansu):
        pytest.skip("Tansu shows aborted transactions")
    runners = [start(transactional=transactional, batch_events="50") for _ in range(2)]
    stored: list[str] = []
    for turn in range(4):
        for _ in range(100):
            stored += store(conn, *(f"e-{number}" for number in range(10)))
        runners[turn % 2].kill()
        runners[turn % 2].start()
    eventually(lambda: sinks(shell)["main"]["lag_events"] == 0, within_s=90)
    messages = consumed(kafka_server, topic)
    versions: dict[str, list[int]] = {}
    seen = set()
    for key, value, _ in messages:
        assert value is not None
        if value["event_id"] not in seen:
            versions.setdefault(key, []).append(value["version"])
        seen.add(value["event_id"])
    assert seen == set(stored)
    assert all(found == list(range(1, 401)) for found in versions.values())
    if transactional == "true":
        assert len(messages) == len(stored)


def test_a_message_that_is_too_large_is_a_dead_letter_and_holds_up_nothing(
    start: Callable[..., Runner], conn: Connection, kafka_server: Kafka, topic: str, eventually: Eventually, shell: Operator
) -> None:
    start(transactional="true" if not isinstance(kafka_server, Tansu) else "false", compression='"none"')
    store(conn, "before")
    content = "\x00" * 65_000  # which JSON writes as six characters each
    with conn.begin():
        conn.exec_driver_sql("SELECT 1")
    large = {"type": "evaluation:failed", "output": content, "error": content, "metadata": {"a": content[:0] + "x" * 60_000}}
    store(conn, "large", **large)
    store(conn, "after", **large, code_is="unknown" * 40_000)
    store(conn, "last")
    eventually(lambda: sinks(shell)["main"]["lag_events"] == 0 and sinks(shell)["main"]["delivered"] != "", within_s=40)
    eventually(lambda: sinks(shell)["main"]["dead"] == 1, within_s=30)
    (letter,) = shell.letters()
    assert (letter["queue"], letter["eval_id"], letter["error_class"]) == ("sink:main", "after", "BadMessage")
    assert "max.message.bytes" in letter["error_message"]
    assert sorted(key for key, _, _ in consumed(kafka_server, topic)) == ["before", "large", "last"]


def test_a_missing_topic_and_an_absent_broker_say_what_to_do(
    start: Callable[..., Runner], conn: Connection, kafka_server: Kafka, topic: str, eventually: Eventually, shell: Operator
) -> None:
    if isinstance(kafka_server, Tansu):
        pytest.skip("Tansu makes topics as they are asked for")
    runner = start(create_topics="false")
    store(conn, "e")
    eventually(lambda: f"there is no topic {topic}: create it" in str(sinks(shell)["main"]["last_error"]), within_s=30)
    runner.stop()
    start(bootstrap_servers=f'"127.0.0.1:{free_port()}"')
    eventually(lambda: "Connection refused" in str(sinks(shell)["main"]["last_error"]), within_s=40)
    assert sinks(shell)["main"]["lag_events"] == 1


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureKafka]:
    if type(broker(tmp_path_factory.mktemp("probe"))) is not Kafka:
        pytest.skip(f"TLS needs Apache Kafka: {described()}")
    with SecureKafka(tmp_path_factory.mktemp("secure")) as server:
        yield server


def test_events_pass_over_tls_alone_to_a_broker_whose_certificate_is_known(
    start: Callable[..., Runner], conn: Connection, secure: SecureKafka, topic: str, eventually: Eventually, shell: Operator
) -> None:
    keys = {"bootstrap_servers": f'"127.0.0.1:{secure.tls_port}"', "security_protocol": '"ssl"'}
    unknown = start(**keys)
    store(conn, "e")
    eventually(lambda: "certificate verify failed" in str(sinks(shell)["main"]["last_error"]), within_s=60)
    assert sinks(shell)["main"]["delivered"] == 0
    unknown.kill()

    start(**keys, ssl_ca_file=f'"{secure.certificate}"')
    eventually(lambda: sinks(shell)["main"]["delivered"] == 1, within_s=60)
    assert [key for key, _, _ in consumed(secure, topic)] == ["e"]


def test_events_pass_with_a_password_and_a_wrong_one_is_told(
    start: Callable[..., Runner],
    conn: Connection,
    secure: SecureKafka,
    topic: str,
    eventually: Eventually,
    shell: Operator,
    tmp_path: Path,
) -> None:
    secret = tmp_path / "password"
    keys = {
        "bootstrap_servers": f'"127.0.0.1:{secure.sasl_port}"',
        "security_protocol": '"sasl_ssl"',
        "sasl_mechanism": '"PLAIN"',
        "sasl_username": f'"{secure.sasl_user}"',
        "sasl_password_file": f'"{secret}"',
        "ssl_ca_file": f'"{secure.certificate}"',
        "transactional": "true",
    }
    secret.write_text("wrong-password\n")
    refused = start(**keys)
    store(conn, "e")
    eventually(lambda: "uthentication" in str(sinks(shell)["main"]["last_error"]), within_s=60)
    refused.kill()
    assert "wrong-password" not in refused.log.read_text() + str(sinks(shell)["main"])

    secret.write_text(f"{secure.sasl_password}\n")
    start(**keys)
    eventually(lambda: sinks(shell)["main"]["delivered"] == 1, within_s=60)
    assert [key for key, _, _ in consumed(secure, topic)] == ["e"]
