"""A worker's spans, encoded by hand.

The SDK spends more on a span than storing an event costs altogether. Here what the spans of a batch have in common is encoded
once, and each adds its own ids: the encoding of a protobuf message is that of its fields, in any order, one after the other
(https://protobuf.dev/programming-guides/encoding/). What is sampled, where spans are sent, and how, is left to the SDK.

For each event there is a span in its own trace, below that of its sender. A batch has a trace of its own, with a link to each
sender's span, and a span for each of its transactions.
"""

import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

from models.record import Fact
from storage.confirmations import Line
from storage.evaluations import Outcome
from tasks.evaluations import QUEUE
from tasks.tracing import NAME, database, flush, messaging, release
from worker.batches import REDRIVEN, Batch, Delivery

# https://www.w3.org/TR/trace-context/#traceparent-header; later versions may say more after the flags.
_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
_SAMPLED, _REMOTE_PARENT = 0x01, 0x300  # https://github.com/open-telemetry/opentelemetry-proto, SpanFlags
_FLAGS: Final = (_SAMPLED | _REMOTE_PARENT).to_bytes(4, "little")
_LINK: Final = b"\x6a\x21\x0a\x10%b\x12\x08%b\x35" + _FLAGS
_IDS: Final = b"\x0a\x10%b\x12\x08%b\x22\x08%b"
# Of what is sent and fails, so much is kept for later: a few batches.
_WAITING, _TOGETHER = 32, 4
_MOST_TRIES, _MOST_FAILURES = 20, 2


class Context(NamedTuple):
    """Of a message: its trace, the span that is to be below that of its sender, and that of its sender."""

    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    is_sampled: bool
    state: bytes

    @property
    def traceparent(self) -> str:
        below = self.span_id if self.is_sampled else self.parent_id
        return f"00-{self.trace_id.hex()}-{below.hex()}-0{self.is_sampled:d}"


def _id(size: int) -> bytes:
    return random.randbytes(size)  # noqa: S311 - no secret


def context_of(carrier: Mapping[str, Any]) -> Context | None:
    """What `carrier` says; None where it says nothing, or nothing that one can go by."""
    given, state = carrier.get("traceparent"), carrier.get("tracestate")
    if not isinstance(given, str) or not _TRACEPARENT.fullmatch(given) or (given.startswith("00") and len(given) > 55):
        return None
    passed_on = state.encode() if isinstance(state, str) and state.isascii() and len(state) <= 512 else b""
    trace_id, parent_id, flags = bytes.fromhex(given[3:35]), bytes.fromhex(given[36:52]), int(given[53:55], 16)
    return Context(trace_id, _id(8), parent_id, bool(flags & _SAMPLED), passed_on)


class _Encoded(NamedTuple):
    """Spans, as the request that sends them; for a processor of the SDK, which looks whether they are sampled."""

    request: bytes
    context: SpanContext = SpanContext(1, 1, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))


class _Exporter(OTLPSpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        # There is no public way to send what is encoded already. Requests one after the other are one request.
        done = self._client.export(b"".join(one.request for one in cast("Sequence[_Encoded]", spans)))
        return SpanExportResult.SUCCESS if done.success else SpanExportResult.FAILURE


class Traces:
    """Of one process."""

    def __init__(self, provider: TracerProvider) -> None:
        self._sampler = provider.sampler
        attributes = dict(provider.resource.attributes)
        self._resource = ResourceSpans(resource=Resource(attributes=_attributes(attributes))).SerializeToString()
        self._scope = ScopeSpans(scope=InstrumentationScope(name=NAME, version=release())).SerializeToString()
        self._processor = BatchSpanProcessor(_Exporter(), max_queue_size=_WAITING, max_export_batch_size=_TOGETHER)

    def batch(self, batch: Batch) -> "BatchSpans":
        """The spans of a batch that is begun now."""
        return BatchSpans(self, batch)

    def samples(self, trace_id: bytes, name: str) -> bool:
        """Whether a trace that begins here is to be sent."""
        return self._sampler.should_sample(None, int.from_bytes(trace_id), name).decision != Decision.DROP

    def send(self, spans: Sequence[bytes]) -> None:
        """Have them sent soon. Where nobody takes them, old ones are dropped."""
        scope_spans = b"".join([self._scope, *(_field(b"\x12", span) for span in spans)])
        request = _field(b"\x0a", self._resource + _field(b"\x12", scope_spans))
        self._processor.on_end(cast("ReadableSpan", _Encoded(request)))

    @contextmanager
    def publishing(self, stream: str, lines: Sequence[Line]) -> Iterator[Sequence[Line]]:
        """Each confirmation that is traced gets a span, in which it goes on."""
        contexts = [context_of({"traceparent": line.traceparent}) if line.traceparent else None for line in lines]
        if not any(contexts):
            yield lines
            return
        began = time.time_ns()
        yield [Line(line.body, context.traceparent) if context else line for line, context in zip(lines, contexts, strict=True)]
        attributes = _attributes(messaging("redis", "send", stream))
        common = Span(
            name=f"send {stream}",
            kind=Span.SPAN_KIND_PRODUCER,
            start_time_unix_nano=began,
            end_time_unix_nano=time.time_ns(),
            attributes=attributes,
            flags=_SAMPLED | _REMOTE_PARENT,
        ).SerializeToString()
        if spans := [_below(context) + common for context in contexts if context and context.is_sampled]:
            self.send(spans)

    def flush(self) -> None:
        """Send all now."""
        flush(self._processor)


class BatchSpans:
    """Gathers what becomes of a batch, and sends its spans at the end."""

    def __init__(self, traces: Traces, batch: Batch) -> None:
        self._traces, self._batch = traces, batch
        self._trace_id, self._span_id = _id(16), _id(8)
        self._began = time.time_ns()
        self._carriers: dict[bytes, dict[str, Any]] = {}
        self._contexts: dict[bytes, Context | None] = {}
        self._noted: dict[bytes, tuple[Fact, Outcome]] = {}
        self._transactions: list[Span] = []
        self._failures: list[Span.Event] = []

    def carrier(self, redis_id: bytes) -> dict[str, Any]:
        """Where what a message says of its trace is put."""
        return self._carriers.setdefault(redis_id, {})

    def traceparent(self, redis_id: bytes) -> str | None:
        """Where the trace of a message goes on."""
        context = self._context(redis_id)
        return context and context.traceparent

    def _context(self, redis_id: bytes) -> Context | None:
        if redis_id not in self._contexts:
            carrier = self._carriers.get(redis_id)
            self._contexts[redis_id] = context_of(carrier) if carrier else None
        return self._contexts[redis_id]

    def note(self, events: Sequence[tuple[Delivery, Fact]], outcomes: Sequence[Outcome]) -> None:
        """What became of events that are committed."""
        for (delivery, fact), outcome in zip(events, outcomes, strict=True):
            self._noted[delivery.redis_id] = fact, outcome

    @contextmanager
    def transaction(self, events: int) -> Iterator[None]:
        """One try to store so many events."""
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
            if len(self._transactions) > _MOST_TRIES:  # of a long outage the beginning and the end
                del self._transactions[_MOST_TRIES // 2]

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
        """Send the batch's span, and that of each event whose trace is sampled."""
        ended = time.time_ns()
        common: dict[tuple[str, str], bytes] = {}
        links: dict[bytes, None] = {}
        spans = []
        buried = self._batch.buried
        for delivery in self._batch:
            redis_id = delivery.redis_id
            context = self._context(redis_id)
            if context is None or not context.is_sampled:
                continue
            links[_LINK % (context.trace_id, context.parent_id)] = None
            fact, outcome = self._noted.get(redis_id, (None, "later" if redis_id in self._batch.later else "returned"))
            if redis_id in buried:
                rest = self._of_event(ended, fact and fact.type, "dead", buried[redis_id])
            else:
                kind = fact.type if fact else "", outcome
                rest = common.get(kind) or common.setdefault(kind, self._of_event(ended, *kind))
            spans.append(_below(context) + rest + (_eval_id(fact.eval_id) if fact else b""))
            if redis_id.startswith(REDRIVEN):
                spans[-1] += _REDRIVEN
        if spans or self._traces.samples(self._trace_id, f"process {QUEUE}"):
            transactions = [span.SerializeToString() for span in self._transactions]
            self._traces.send([self._of_batch(ended) + b"".join(links), *transactions, *spans])

    def _of_batch(self, ended: int) -> bytes:
        count = {"messaging.batch.message_count": len(self._batch), "evalstore.dead": len(self._batch.buried)}
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

    def _of_event(self, ended: int, type_: str | None, outcome: str, cause: bytes | None = None) -> bytes:
        """What spans of events have in common, or of one that died, which has a cause of its own."""
        about = messaging("dramatiq", "process", QUEUE) | {"evalstore.outcome": outcome}
        if type_:
            about["evalstore.type"] = type_
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
            told = msgspec.json.decode(cause)
            span.events.append(_failure(told["error_class"], told["error_message"], told["traceback"]))
            span.status.CopyFrom(Status(code=Status.STATUS_CODE_ERROR, message=told["error_message"][:1000]))
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


def _below(context: Context) -> bytes:
    ids = _IDS % context[:3]
    return ids + _field(b"\x1a", context.state) if context.state else ids


def _field(tag: bytes, data: bytes) -> bytes:
    return tag + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    groups = []
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


def _head(length: int) -> bytes:
    """What comes before an eval_id of that length, in an attribute of a span."""
    value = b"\x0a" + _varint(length)
    pair = _field(b"\x0a", b"evalstore.eval_id") + b"\x12" + _varint(len(value) + length) + value
    return b"\x4a" + _varint(len(pair) + length) + pair


_HEADS: Final = [_head(length) for length in range(201)]
_REDRIVEN: Final = Span(attributes=_attributes({"evalstore.redriven": True})).SerializeToString()


def _eval_id(eval_id: str) -> bytes:
    return _HEADS[len(eval_id)] + eval_id.encode()
