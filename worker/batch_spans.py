"""A worker's spans, in OTLP's encoding.

OpenTelemetry's SDK takes three times as long for these spans; docs/decisions/0013 has the figures. The generated classes encode
the fields that many spans share, once. Each event then adds its ids: the fields of a protobuf message may come in any order
(https://protobuf.dev/programming-guides/encoding/). The SDK samples, reads the environment and sends.

Each event has a span in the trace of its sender, below the sender's span. A batch has a trace of its own, with a link to each
sender's span, and a span for each of its transactions.
"""

import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Final, NamedTuple, cast

import msgspec
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import SpanContext, TraceFlags

from evalstore.storage.event_store import Outcome
from models.record import EventRow
from tasks.keys import QUEUE
from tasks.tracing import NAME, database, flush, messaging, release
from worker.batches import Batch, BatchOutcome, Delivery

_ODD: Final = frozenset("13579bdf")
_SAMPLED, _REMOTE_PARENT = 0x01, 0x300  # SpanFlags of opentelemetry/proto/trace/v1/trace.proto
# The limit of waiting requests is low: the spans of a full batch take about 1 MB.
_MOST_WAITING, _MOST_TOGETHER = 32, 12
_MOST_REQUEST_BYTES: Final = 8 * 1024 * 1024
_MOST_TRANSACTIONS, _MOST_FAILURES = 20, 2

_USUAL: Final = re.compile("00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-0[01]")
_TRACEPARENT: Final = re.compile(
    r"([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]([0-9a-f])(-.*)?", re.DOTALL
)

_Pair = tuple[Delivery, EventRow]


def parse_traceparent(given: Any) -> str:
    """Return a `traceparent` in the form of version 00, with no flag but "sampled"; "" for an invalid one.

    https://www.w3.org/TR/trace-context/#traceparent-header
    """
    if not isinstance(given, str):
        return ""
    if _USUAL.fullmatch(given):
        return given
    found = _TRACEPARENT.fullmatch(given)
    if found is None or found[1] == "ff" or (found[1] == "00" and found[3]):
        return ""
    return f"00{given[2:53]}0{int(found[2] in _ODD)}"


def is_sampled(traceparent: str) -> bool:
    """Whether the sender keeps this trace."""
    return traceparent.endswith("1")


def below(traceparent: str, span_id: bytes) -> str:
    """Return the `traceparent` of our child span. If the trace is not sampled, there is no child: return the sender's."""
    return f"00-{traceparent[3:35]}-{span_id.hex()}-01" if is_sampled(traceparent) else traceparent


def _id(size: int) -> bytes:
    return random.randbytes(size)  # noqa: S311 - no secret


def _span(sender: bytes, span_id: bytes, fields: bytes) -> bytes:
    """Return a child span of a sender's span, encoded as a field of ScopeSpans."""
    return b"\x12%b\x0a\x10%b\x22\x08%b\x12\x08%b%b" % (
        _varint(len(fields) + 38),
        sender[1:17],
        sender[17:25],
        span_id,
        fields,
    )


def _link(sender: bytes) -> bytes:
    """Return a link to the span of a sender, as a field of Span."""
    return b"\x6a\x21\x0a\x10%b\x12\x08%b\x35\x01\x03\x00\x00" % (sender[1:17], sender[17:25])  # flags 0x301


class _Encoded(NamedTuple):
    """An encoded request. The SDK's processor reads `context`, and sends only sampled spans."""

    parts: Sequence[bytes]
    size: int
    context: SpanContext = SpanContext(1, 1, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))


class _Exporter(OTLPSpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        # The exporter has no public way to send encoded spans. Concatenated protobuf messages merge into one, so
        # few requests suffice, at a millisecond each. Receivers refuse very large ones.
        left, succeeded = [*cast("Sequence[_Encoded]", spans)], True
        while left and succeeded:
            parts: list[bytes] = []
            size = 0
            while left and (not parts or size + left[0].size <= _MOST_REQUEST_BYTES):
                one = left.pop(0)
                parts += one.parts
                size += one.size
            succeeded = self._client.export(b"".join(parts)).success
        return SpanExportResult.SUCCESS if succeeded else SpanExportResult.FAILURE


class Traces:
    """The sender of spans of one process."""

    def __init__(self, provider: TracerProvider) -> None:
        self._sampler = provider.sampler
        attributes = dict(provider.resource.attributes)
        self._resource = ResourceSpans(resource=Resource(attributes=_attributes(attributes))).SerializeToString()
        self._scope = ScopeSpans(scope=InstrumentationScope(name=NAME, version=release())).SerializeToString()
        self._processor = BatchSpanProcessor(_Exporter(), max_queue_size=_MOST_WAITING, max_export_batch_size=_MOST_TOGETHER)

    def batch(self, batch: Batch, outcome: BatchOutcome) -> "BatchSpans":
        """Begin the spans of a batch. `outcome` is read at their end."""
        return BatchSpans(self, batch, outcome)

    def samples(self, trace_id: bytes, name: str) -> bool:
        """Whether the sampler keeps a trace that begins here."""
        return self._sampler.should_sample(None, int.from_bytes(trace_id), name).decision != Decision.DROP

    def send(self, spans: Sequence[bytes]) -> None:
        """Queue encoded spans. If the receiver is unavailable, the oldest spans are dropped."""
        size = sum(map(len, spans))
        self._processor.on_end(cast("ReadableSpan", _Encoded([self._scope_before(size), *spans], size)))

    def _scope_before(self, size: int) -> bytes:
        """Return the head of a request whose spans have this many bytes."""
        scope = _before(b"\x12", len(self._scope) + size) + self._scope
        made: bytes = _before(b"\x0a", len(self._resource) + len(scope) + size) + self._resource + scope
        return made

    def flush(self) -> None:
        """Send all waiting spans now."""
        flush(self._processor)


class _Stored(NamedTuple):
    """Events that are stored together, their outcomes, their senders' `traceparent`s, and the ids of their spans."""

    events: Sequence[_Pair]
    outcomes: Sequence[Outcome]
    senders: Sequence[str]
    ids: Sequence[bytes]


class BatchSpans:
    """Collects the outcomes of a batch, and sends its spans at the end.

    `traceparents` has the unchecked option `traceparent` of each message read, by its id in Redis.
    """

    def __init__(self, traces: Traces, batch: Batch, outcome: BatchOutcome) -> None:
        self._traces, self._batch, self._outcome = traces, batch, outcome
        self._trace_id, self._span_id = _id(16), _id(8)
        self._began = time.time_ns()
        self.traceparents: dict[bytes, Any] = {}
        self._senders: dict[bytes, str] = {}
        self._tried: _Stored | None = None
        self._stored: list[_Stored] = []
        self._transactions: list[Span] = []
        self._failures: list[Span.Event] = []

    def _parsed(self) -> dict[bytes, str]:
        """Return the valid `traceparent`s of the messages read until now, by message id."""
        self._senders |= {redis_id: parse_traceparent(given) for redis_id, given in self.traceparents.items()}
        self.traceparents.clear()
        return self._senders

    def traces_of(self, events: Sequence[_Pair]) -> Callable[[Sequence[int]], list[str]] | None:
        """Return a function from positions in `events` to the `traceparent`s of their spans; None if no event has one."""
        self._tried = None
        if not (sender_of := self._parsed()):
            return None
        senders = [sender_of.get(delivery.redis_id, "") for delivery, _ in events]
        many = _id(8 * len(events))
        ids = [many[at : at + 8] for at in range(0, len(many), 8)]
        self._tried = _Stored(events, [], senders, ids)
        return lambda positions: [below(senders[at], ids[at]) for at in positions]

    def note(self, events: Sequence[_Pair], outcomes: Sequence[Outcome]) -> None:
        """Record the outcomes of committed events, for which `traces_of` was called before."""
        if self._tried is not None and self._tried.events is events:
            self._stored.append(self._tried._replace(outcomes=outcomes))

    @contextmanager
    def transaction(self, events: int) -> Iterator[None]:
        """Trace one attempt to store this number of events."""
        span = self._below("transaction evaluations", database(events))
        try:
            yield
        except Exception as error:
            failure = _failure(type(error).__name__, str(error))
            span.events.append(failure)
            span.status.CopyFrom(Status(code=Status.STATUS_CODE_ERROR, message=str(error)[:1000]))
            if len(self._failures) < _MOST_FAILURES:
                self._failures.append(failure)
            raise
        finally:
            span.end_time_unix_nano = time.time_ns()
            self._transactions.append(span)
            if len(self._transactions) > _MOST_TRANSACTIONS:  # Keep the first and the last transactions of a long outage.
                del self._transactions[_MOST_TRANSACTIONS // 2]

    def _below(self, name: str, attributes: Mapping[str, Any]) -> Span:
        return Span(
            trace_id=self._trace_id,
            span_id=_id(8),
            parent_span_id=self._span_id,
            name=name,
            kind=Span.SPAN_KIND_CLIENT,
            start_time_unix_nano=time.time_ns(),
            attributes=_attributes(attributes),
            flags=_SAMPLED,
        )

    def end(self) -> None:
        """Send the batch's span and the spans of events whose trace is sampled."""
        ended = time.time_ns()
        links: dict[bytes, None] = {}
        spans: list[bytes] = []
        for stored in self._stored:
            self._add_stored(stored, ended, links, spans)
        if self._outcome.dead or self._outcome.retry_ms or self._outcome.requeue:
            self._add_others(ended, links, spans)
        if spans or self._traces.samples(self._trace_id, f"process {QUEUE}"):
            transactions = [_framed(span.SerializeToString()) for span in self._transactions]
            batch = _framed(self._of_batch(ended) + b"".join(map(_link, links)))
            self._traces.send([batch, *transactions, *spans])

    def _add_stored(self, stored: _Stored, ended: int, links: dict[bytes, None], spans: list[bytes]) -> None:
        shared: dict[tuple[str, str, bool], bytes] = {}
        for (delivery, fact), outcome, sender, span_id in zip(*stored, strict=True):
            if sender[-1:] != "1" or outcome == "reused":  # a reused event_id is a dead letter
                continue
            kind = fact.type, outcome, delivery.is_redriven
            if (fields := shared.get(kind)) is None:
                fields = shared[kind] = self._of_event(ended, *kind)
            ids = _binary(sender)
            links[ids] = None
            eval_id = fact.eval_id.encode()
            spans.append(_span(ids, span_id, b"%b%b%b" % (_before_eval_id(len(eval_id)), eval_id, fields)))

    def _add_others(self, ended: int, links: dict[bytes, None], spans: list[bytes]) -> None:
        """Add the spans of dead letters and of repeated events."""
        outcome_of, sender_of = self._outcome, self._parsed()
        known = {pair[0].redis_id: (pair[1], outcome) for one in self._stored for pair, outcome in zip(*one[:2], strict=True)}
        for delivery in self._batch:
            redis_id = delivery.redis_id
            fact, outcome = known.get(redis_id, (None, None))
            sender = sender_of.get(redis_id, "")
            if not is_sampled(sender) or outcome in {"applied", "duplicate"}:
                continue
            why = outcome_of.dead.get(redis_id)
            became = "dead" if why is not None else "later" if redis_id in outcome_of.retry_ms else "returned"
            fields = self._of_event(ended, fact.type if fact else "", became, delivery.is_redriven, why)
            eval_id = fact.eval_id.encode() if fact else b""
            links[_binary(sender)] = None
            spans.append(_span(_binary(sender), _id(8), _before_eval_id(len(eval_id)) + eval_id + fields))

    def _of_batch(self, ended: int) -> bytes:
        count = {"messaging.batch.message_count": len(self._batch), "evalstore.dead": len(self._outcome.dead)}
        encoded: bytes = Span(
            trace_id=self._trace_id,
            span_id=self._span_id,
            name=f"process {QUEUE}",
            kind=Span.SPAN_KIND_CONSUMER,
            start_time_unix_nano=self._began,
            end_time_unix_nano=ended,
            attributes=_attributes(messaging("dramatiq", "process", QUEUE) | count),
            flags=_SAMPLED,
        ).SerializeToString()
        return encoded

    def _of_event(self, ended: int, type_: str, outcome: str, is_redriven: bool, cause: bytes | None = None) -> bytes:
        """Return the fields shared by all spans with this outcome. `cause` is the cause of a dead letter."""
        about = messaging("dramatiq", "process", QUEUE) | {"evalstore.type": type_, "evalstore.outcome": outcome}
        about |= {"evalstore.redriven": True} if is_redriven else {}
        span = Span(
            name="store evaluation",
            kind=Span.SPAN_KIND_CONSUMER,
            start_time_unix_nano=self._began,
            end_time_unix_nano=ended,
            attributes=_attributes(about),
            events=self._failures,
            links=[Span.Link(trace_id=self._trace_id, span_id=self._span_id, flags=_SAMPLED)],
            flags=_SAMPLED | _REMOTE_PARENT,
        )
        if cause is not None:
            details = msgspec.json.decode(cause)
            span.events.append(_failure(details["error_class"], details["error_message"], details["traceback"]))
            span.status.CopyFrom(Status(code=Status.STATUS_CODE_ERROR, message=details["error_message"][:1000]))
        encoded: bytes = span.SerializeToString()
        return encoded


def _failure(class_: str, message: str, traceback: str = "") -> Span.Event:
    said = {"exception.type": class_, "exception.message": message[:1000], "exception.stacktrace": traceback}
    return Span.Event(name="exception", time_unix_nano=time.time_ns(), attributes=_attributes(said))


def _attributes(given: Mapping[str, Any]) -> list[KeyValue]:
    return [KeyValue(key=name, value=_value(value)) for name, value in given.items() if value != ""]


def _value(value: Any) -> AnyValue:
    match value:
        case bool():
            return AnyValue(bool_value=value)
        case int():
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
    return AnyValue(string_value=str(value).encode(errors="backslashreplace").decode())


def _framed(span: bytes) -> bytes:
    """Return an encoded span as a field of ScopeSpans."""
    return _before(b"\x12", len(span)) + span


def _before(tag: bytes, length: int) -> bytes:
    return tag + _varint(length)


@cache
def _varint(number: int) -> bytes:
    groups = []
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


@cache
def _before_eval_id(length: int) -> bytes:
    """Return the encoded start of an attribute whose eval_id has this many bytes, as a field of Span. For 0 return nothing."""
    if not length:
        return b""
    value = b"\x0a" + _varint(length)
    pair = b"\x0a\x11evalstore.eval_id" + b"\x12" + _varint(len(value) + length) + value
    return b"\x4a" + _varint(len(pair) + length) + pair


def _binary(traceparent: str) -> bytes:
    """Return the 26 bytes that a valid `traceparent` holds: version, trace, span and flags."""
    return bytes.fromhex(traceparent.replace("-", ""))
