"""Kafka: each event a message under its `eval_id`, as a CloudEvent in binary mode.

confluent-kafka is imported when a sink is made: only the runner needs it. A failure other than that of an event, also what
librdkafka calls fatal, ends the producer; the next write makes a new one.
"""

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import Field, model_validator

from evalstore.sinks.options import Options, secret
from evalstore.sinks.protocol import Batch, SinkEvent
from models.errors import BadMessage, Outage
from models.settings import Settings

if TYPE_CHECKING:
    from confluent_kafka import Consumer, KafkaError, Producer

_TIMEOUT_S: Final = 30.0
# The same event would fail the same way.
_BAD: Final = ("MSG_SIZE_TOO_LARGE", "INVALID_RECORD", "INVALID_MSG")
# By default a topic takes 1,048,588 bytes. Above this an event is tried alone, so that it costs others no transaction.
_ALONE_BYTES: Final = 900_000
_CURSOR: Final = ".cursor"


class KafkaOptions(Options):
    """The keys of a table with `type = "kafka"`."""

    bootstrap_servers: str = Field(min_length=1)
    topic: str = Field(pattern=r"^[A-Za-z0-9._-]{1,240}$")
    transactional: bool = False
    create_topics: bool = False
    partitions: int = Field(default=12, ge=1, le=10_000)
    replication_factor: int = Field(default=-1, ge=-1, le=100)
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = "lz4"
    security_protocol: Literal["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"] = "plaintext"
    ssl_ca_file: Path | None = None
    ssl_certificate_file: Path | None = None
    ssl_key_file: Path | None = None
    ssl_key_password_env: str | None = None
    ssl_key_password_file: Path | None = None
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    sasl_username: str | None = None
    sasl_password_env: str | None = None
    sasl_password_file: Path | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "KafkaOptions":
        is_sasl = self.security_protocol.startswith("sasl")
        if is_sasl and (self.sasl_mechanism is None or self.sasl_username is None):
            raise ValueError("security_protocol: needs sasl_mechanism and sasl_username")
        password = secret(self.sasl_password_env, self.sasl_password_file, os.environ)
        if is_sasl and password is None:
            raise ValueError("security_protocol: needs sasl_password_env or sasl_password_file")
        secret(self.ssl_key_password_env, self.ssl_key_password_file, os.environ)
        return self

    def client(self) -> dict[str, Any]:
        """Return librdkafka's settings for the brokers."""
        password = secret(self.sasl_password_env, self.sasl_password_file, os.environ)
        key_password = secret(self.ssl_key_password_env, self.ssl_key_password_file, os.environ)
        given = {
            "bootstrap.servers": self.bootstrap_servers,
            "security.protocol": self.security_protocol,
            "ssl.ca.location": self.ssl_ca_file and str(self.ssl_ca_file),
            "ssl.certificate.location": self.ssl_certificate_file and str(self.ssl_certificate_file),
            "ssl.key.location": self.ssl_key_file and str(self.ssl_key_file),
            "ssl.key.password": key_password and key_password.get_secret_value(),
            "sasl.mechanism": self.sasl_mechanism,
            "sasl.username": self.sasl_username,
            "sasl.password": password and password.get_secret_value(),
            "client.id": "evalstore",
            "allow.auto.create.topics": False,
            "topic.metadata.refresh.interval.ms": 10_000,
        }
        return {name: value for name, value in given.items() if value is not None}


class KafkaSink:
    """See `Sink`. A message is confirmed when all in-sync replicas have it."""

    def __init__(self, name: str, options: KafkaOptions) -> None:
        self._name, self._options = name, options
        self._producer: Producer | None = None
        self._said = ""
        self._errors: list[KafkaError] = []

    def write(self, batch: Batch) -> None:
        """Raises Outage, BadMessage."""
        if self._options.transactional and len(batch) > 1 and any(len(event.json) > _ALONE_BYTES for event in batch):
            raise BadMessage("a message may be too large: it is sent alone")
        self._in_transaction([(event.eval_id, event.json, _headers(event)) for event in batch], batch.cursor)

    def erase(self, eval_id: str) -> None:
        """Send a tombstone: a compacted topic then forgets the evaluation. Raises Outage."""
        self._in_transaction([(eval_id, None, None)], None)

    def close(self) -> None:
        """Drop the producer, with what it has not sent: it comes again."""
        if self._producer is not None:
            self._producer.purge()
            self._producer = None

    def _in_transaction(self, messages: list[tuple[str, bytes | None, Any]], cursor: dict[str, Any] | None) -> None:
        producer = self._open()
        is_transactional = self._options.transactional
        try:
            if is_transactional:
                producer.begin_transaction()
            self._produce(producer, messages)
            if is_transactional and cursor is not None:
                self._send(producer, self._options.topic + _CURSOR, self._name, json.dumps(cursor).encode(), None)
            self._flush(producer)
            if is_transactional:
                producer.commit_transaction(_TIMEOUT_S)
        except BadMessage:
            if is_transactional:
                self._abort(producer)
                self.close()  # librdkafka 2.16 fails what the next transaction sends
            raise
        except Outage:
            self.close()
            raise
        except _errors() as error:
            self.close()
            raise self._outage(error.args[0]) from error

    def _produce(self, producer: "Producer", messages: list[tuple[str, bytes | None, Any]]) -> None:
        self._errors.clear()
        topic, produce = self._options.topic, producer.produce
        for key, value, headers in messages:
            try:
                produce(topic, value, key, headers=headers)
            except BufferError:  # the queue is full
                self._send(producer, topic, key, value, headers)

    def _send(self, producer: "Producer", topic: str, key: str, value: bytes | None, headers: Any) -> None:
        give_up = time.monotonic() + _TIMEOUT_S
        while True:
            try:
                producer.produce(topic, value, key, headers=headers)
            except BufferError:  # the queue is full
                if time.monotonic() > give_up:
                    raise Outage(f"Kafka takes nothing: {self._said or 'no reason was given'}") from None
                producer.poll(0.1)
            else:
                return

    def _on_delivery(self, error: "KafkaError | None", _message: object) -> None:
        if error is not None:
            self._errors.append(error)

    def _flush(self, producer: "Producer") -> None:
        left = producer.flush(_TIMEOUT_S)
        if self._errors:
            failures = [self._failure(error) for error in self._errors]
            raise next((one for one in failures if isinstance(one, BadMessage)), failures[0])
        if left:
            raise Outage(
                f"Kafka did not confirm {left} messages within {_TIMEOUT_S:.0f} s: {self._said or 'no reason was given'}"
            )

    def _abort(self, producer: "Producer") -> None:
        """Leave nothing of a transaction that failed, or do without the producer: the next one ends what is left."""
        try:
            producer.abort_transaction(_TIMEOUT_S)
        except _errors():
            self.close()

    def _failure(self, error: "KafkaError") -> Outage | BadMessage:
        if error.name().lstrip("_") in _BAD:
            return BadMessage(f"{error.str()}: raise the topic's max.message.bytes, or leave the event a dead letter")
        return self._outage(error)

    def _outage(self, error: "KafkaError") -> Outage:
        what = {
            "_UNKNOWN_TOPIC": f"there is no topic {self._options.topic}: create it, or set create_topics = true",
            "UNKNOWN_TOPIC_OR_PART": f"there is no topic {self._options.topic}: create it, or set create_topics = true",
            "TOPIC_AUTHORIZATION_FAILED": f"the user may not write to the topic {self._options.topic}",
        }.get(error.name(), error.str())
        return Outage(f"{error.name()}: {what}" + (f" ({self._said})" if self._said and self._said != error.str() else ""))

    def _open(self) -> "Producer":
        if self._producer is None:
            self._producer = self._create()
        return self._producer

    def _create(self) -> "Producer":
        from confluent_kafka import Producer  # noqa: PLC0415 - see above

        if self._options.create_topics:
            self._create_topics()
        given = self._client() | {
            "enable.idempotence": True,
            "acks": "all",
            "compression.type": self._options.compression,
            "linger.ms": 5,
            "delivery.report.only.error": True,
            "on_delivery": self._on_delivery,
            "delivery.timeout.ms": int(_TIMEOUT_S * 1000),
            "queue.buffering.max.messages": 200_000,
            "message.max.bytes": 100_000_000,  # the topic's limit decides
        }
        if self._options.transactional:
            given |= {"transactional.id": f"evalstore-{self._name}", "transaction.timeout.ms": 60_000}
        producer = Producer(given)
        try:
            self._look_for_topics(producer)
            if self._options.transactional:
                producer.init_transactions(_TIMEOUT_S)
        except _errors() as error:
            producer.poll(0.1)  # for the reason
            raise self._outage(error.args[0]) from error
        return producer

    def _client(self) -> dict[str, Any]:
        # librdkafka also reports each important log line as an error.
        silent = {"log_level": 0, "error_cb": self._note, "reconnect.backoff.ms": 500}
        return self._options.client() | silent

    def _note(self, error: "KafkaError") -> None:
        if error.name() != "_ALL_BROKERS_DOWN":  # which says no reason
            self._said = error.str()

    def _topics(self) -> list[str]:
        topic = self._options.topic
        return [topic, topic + _CURSOR] if self._options.transactional else [topic]

    def _look_for_topics(self, producer: "Producer") -> None:
        for topic in self._topics():
            found = producer.list_topics(topic, timeout=10).topics[topic]
            if found.error is not None:
                raise Outage(f"{found.error.name()}: there is no topic {topic}: create it, or set create_topics = true")

    def _create_topics(self) -> None:
        from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]  # noqa: PLC0415

        options, topics = self._options, self._topics()
        wanted = [
            NewTopic(
                topic,
                num_partitions=options.partitions if topic == options.topic else 1,
                replication_factor=options.replication_factor,
                config={"cleanup.policy": "compact"},
            )
            for topic in topics
        ]
        admin = AdminClient(self._client())  # until the answers are there
        try:
            for topic, created in admin.create_topics(wanted, request_timeout=15).items():
                if (error := created.exception()) is not None and error.args[0].name() != "TOPIC_ALREADY_EXISTS":
                    admin.poll(0.1)  # for the reason
                    raise Outage(f"the topic {topic} cannot be created: {self._outage(error.args[0])}")
        except _errors() as error:
            raise self._outage(error.args[0]) from error


def create(name: str, options: KafkaOptions, _settings: Settings) -> KafkaSink:
    """Return the sink. Connects to nothing yet."""
    return (TransactionalKafkaSink if options.transactional else KafkaSink)(name, options)


class TransactionalKafkaSink(KafkaSink):
    """A sink that keeps the cursor: a record in TOPIC.cursor, under the sink's name, in the transaction of the events."""

    def cursor(self) -> dict[str, Any] | None:
        """Return the cursor of the last committed transaction. Raises Outage."""
        self._open()  # fences a producer that another process left behind: its transaction ends before this reads
        try:
            return self._last_cursor()
        except _errors() as error:
            raise self._outage(error.args[0]) from error

    def _last_cursor(self) -> dict[str, Any] | None:
        from confluent_kafka import Consumer, TopicPartition  # noqa: PLC0415

        given = {"group.id": f"evalstore-{self._name}", "isolation.level": "read_committed", "enable.auto.commit": False}
        consumer = Consumer(self._client() | given | {"enable.partition.eof": True})
        try:
            topic = self._options.topic + _CURSOR
            low, high = consumer.get_watermark_offsets(TopicPartition(topic, 0), timeout=_TIMEOUT_S)
            return _read_last(consumer, topic, low, high, self._name)
        finally:
            consumer.close()


def _read_last(consumer: "Consumer", topic: str, low: int, high: int, key: str) -> dict[str, Any] | None:
    """The last record of a key, looked for from the end: the last offsets are often those of transaction marks."""
    from confluent_kafka import TopicPartition  # noqa: PLC0415

    found, start = None, high
    while found is None and start > low:
        stop, start = start, max(low, start - 1000)
        consumer.assign([TopicPartition(topic, 0, start)])
        give_up = time.monotonic() + _TIMEOUT_S
        while (message := consumer.poll(1.0)) is None or message.error() is None:
            if time.monotonic() > give_up:
                raise Outage(f"the cursor cannot be read from {topic} within {_TIMEOUT_S:.0f} s")
            if message is None:
                continue
            if (message.offset() or 0) >= stop:
                break
            if message.key() == key.encode() and message.value():
                found = json.loads(message.value() or b"null")
    return found


def _headers(event: SinkEvent) -> list[tuple[str, bytes]]:
    """CloudEvents 1.0, Kafka protocol binding, binary content mode."""
    return [
        _VERSION,
        ("ce_id", event.event_id.encode()),
        _SOURCE,
        ("ce_type", event.type.encode()),
        ("ce_subject", event.eval_id.encode()),
        ("ce_time", str(event.fields["occurred_at"]).encode()),
        _CONTENT_TYPE,
    ]


_VERSION: Final = ("ce_specversion", b"1.0")
_SOURCE: Final = ("ce_source", b"evalstore")
_CONTENT_TYPE: Final = ("content-type", b"application/json")


def _errors() -> type[Exception]:
    from confluent_kafka import KafkaException  # noqa: PLC0415

    found: type[Exception] = KafkaException
    return found
