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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
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
from storage.evaluations import Outcome
from tasks.evaluations import QUEUE
from tasks.tracing import NAME, database, flush, messaging, release
from worker.batches import REDRIVEN, Batch, Delivery

_SAMPLED, _REMOTE_PARENT = 0x01, 0x300  # SpanFlags of opentelemetry/proto/trace/v1/trace.proto
_FLAGS: Final = (_SAMPLED | _REMOTE_PARENT).to_bytes(4, "little")
_IDS: Final = b"\x0a\x10%b\x12\x08%b\x22\x08%b"  # the first fields of a span: trace, itself, parent
_LINK: Final = b"\x6a\x21\x0a\x10%b\x12\x08%b\x35" + _FLAGS
# https://www.w3.org/TR/trace-context/#traceparent-header; versions after the first may say more after the flags.
_LATER: Final = re.compile(r"(?!ff|00)[0-9a-f]{2}(-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})(?:-.*)?", re.DOTALL)
_NO_TRACE, _NO_SPAN = bytes(16), bytes(8)
_NO_IDS: Final = _IDS % (_NO_TRACE, _NO_SPAN, _NO_SPAN)
# Of what nobody takes, so much is kept for later: a few batches.
_WAITING, _TOGETHER = 32, 4
_MOST_TRIES, _MOST_FAILURES = 20, 2

_Pair = tuple[Delivery, Fact]


def sender(given: Any) -> bytes | None:
    """What a `traceparent` says, as the 26 bytes it writes in hexadecimal: version, trace, span and flags of the sender.

    None where that is nothing one can go by.
    """
    if not isinstance(given, str):
        return None
    if given[:2] != "00" and (later := _LATER.fullmatch(given)):
        given = "00" + later[1]
    if len(given) != 55 or given[2] != "-" or given[35] != "-" or given[52] != "-" or given != given.lower():
        return None
    try:
        found = bytes.fromhex(given.replace("-", ""))
    except ValueError:
        return None
    if len(found) != 26 or found[0] or found.startswith(_NO_TRACE, 1) or found.startswith(_NO_SPAN, 17):  # it skips spaces
        return None
    return found


def senders(given: Sequence[Any]) -> list[bytes | None]:
    """The same of many. Where all are as they should be, which is the rule, that is found out about all of them at once."""
    number = len(given)
    if set(map(type, given)) == {str} and set(map(len, given)) == {55}:
        text, hyphens = "".join(given), "-" * number
        if text[2::55] == text[35::55] == text[52::55] == hyphens and text == text.lower():
            with suppress(ValueError):
                found = bytes.fromhex(text.replace("-", ""))
                if len(found) == 26 * number and not any(found[::26]) and _NO_SPAN not in found:
                    return [found[start : start + 26] for start in range(0, len(found), 26)]
    return [sender(one) for one in given]


def below(found: bytes, span_id: bytes) -> str:
    """How a trace goes on below a span of ours, as a `traceparent`; as it came where it is not sampled, and no span is made."""
    is_sampled = found[25] & _SAMPLED
    return f"00-{found[1:17].hex()}-{(span_id if is_sampled else found[17:25]).hex()}-0{is_sampled}"


def _id(size: int) -> bytes:
    return random.getrandbits(8 * size).to_bytes(size)  # no secret


def _span_ids() -> Iterator[bytes]:
    while True:
        many = _id(8 * 256)
        yield from [many[start : start + 8] for start in range(0, len(many), 8)]


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
        """Have them sent soon, each as `_framed` gives it, or its parts. Where nobody takes them, old ones are dropped."""
        scope_spans = b"".join([self._scope, *spans])
        request = _field(b"\x0a", self._resource + _field(b"\x12", scope_spans))
        self._processor.on_end(cast("ReadableSpan", _Encoded(request)))

    @contextmanager
    def publishing(self, stream: str, traceparents: Sequence[str]) -> Iterator[Sequence[str]]:
        """Each confirmation that is traced gets a span, below which it goes on."""
        found_of, began = senders(traceparents), time.time_ns()
        ids = [*islice(_span_ids(), len(traceparents))]
        yield [below(found, span_id) if found else "" for found, span_id in zip(found_of, ids, strict=True)]
        common: bytes = Span(
            name=f"send {stream}",
            kind=Span.SPAN_KIND_PRODUCER,
            start_time_unix_nano=began,
            end_time_unix_nano=time.time_ns(),
            attributes=_attributes(messaging("redis", "send", stream)),
            flags=_SAMPLED | _REMOTE_PARENT,
        ).SerializeToString()
        before = _before(b"\x12", len(_NO_IDS) + len(common)) + _IDS[:2]
        spans: list[bytes] = []
        for found, span_id in zip(found_of, ids, strict=True):
            if found and found[25] & _SAMPLED:
                spans += (before, found[1:17], b"\x12\x08", span_id, b"\x22\x08", found[17:25], common)
        if spans:
            self.send(spans)

    def flush(self) -> None:
        """Send all now."""
        flush(self._processor)


class BatchSpans:
    """Gathers what becomes of a batch, and sends its spans at the end. `traceparents`: what messages say, by their ids."""

    def __init__(self, traces: Traces, batch: Batch) -> None:
        self._traces, self._batch = traces, batch
        self._trace_id, self._span_id = _id(16), _id(8)
        self._began = time.time_ns()
        self.traceparents: dict[bytes, Any] = {}
        self._senders: dict[bytes, bytes | None] = {}
        self._new_ids = _span_ids()
        self._ids: dict[bytes, bytes] = {}  # of spans that a confirmation names
        self._stored: list[tuple[Sequence[_Pair], Sequence[Outcome]]] = []
        self._transactions: list[Span] = []
        self._failures: list[Span.Event] = []

    def _read(self) -> dict[bytes, bytes | None]:
        """The senders of the messages that were read so far, by their ids."""
        self._senders.update(zip(self.traceparents, senders([*self.traceparents.values()]), strict=True))
        self.traceparents.clear()
        return self._senders

    def trace_of(self, events: Sequence[_Pair]) -> Callable[[int], str | None]:
        """What gives, for an event by its position, where its trace goes on."""
        sender_of = self._read().get

        def trace_of(position: int) -> str | None:
            redis_id = events[position][0].redis_id
            found = sender_of(redis_id)
            if found is None:
                return None
            span_id = self._ids[redis_id] = next(self._new_ids)
            return below(found, span_id)

        return trace_of

    def note(self, events: Sequence[_Pair], outcomes: Sequence[Outcome]) -> None:
        """What became of events that are committed."""
        self._stored.append((events, outcomes))

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
        self._read()
        links: dict[bytes, None] = {}
        spans: list[bytes] = []
        for events, outcomes in self._stored:
            self._settled(events, outcomes, ended, links, spans)
        if self._batch.buried or self._batch.later or self._batch.returned:
            self._unsettled(ended, links, spans)
        if spans or self._traces.samples(self._trace_id, f"process {QUEUE}"):
            batch = self._of_batch(ended) + b"".join([_LINK % (found[1:17], found[17:25]) for found in links])
            transactions = [_framed(span.SerializeToString()) for span in self._transactions]
            self._traces.send([_framed(batch), *transactions, *spans])

    def _settled(
        self, events: Sequence[_Pair], outcomes: Sequence[Outcome], ended: int, links: dict[bytes, None], spans: list[bytes]
    ) -> None:
        """The spans of events that went through the store. This is done for each event, so all of it is in this one loop."""
        common: dict[tuple[Any, ...], tuple[bytes, bytes]] = {}
        sender_of, id_of, new_ids = self._senders.get, self._ids.get, self._new_ids
        for (delivery, fact), outcome in zip(events, outcomes, strict=True):
            redis_id = delivery.redis_id
            found = sender_of(redis_id)
            if found is None or not found[25] & _SAMPLED or outcome == "reused":
                continue
            links[found] = None
            eval_id = fact.eval_id.encode()
            kind = fact.type, outcome, len(eval_id), redis_id.startswith(REDRIVEN)
            if kind not in common:
                common[kind] = self._around(ended, *kind)
            before, rest = common[kind]
            span_id = id_of(redis_id) or next(new_ids)
            # As _IDS has it, but joined only when all of it is.
            spans += (before, found[1:17], b"\x12\x08", span_id, b"\x22\x08", found[17:25], rest, eval_id)

    def _around(self, ended: int, type_: str, outcome: str, length: int, is_redriven: bool) -> tuple[bytes, bytes]:
        """What comes before the ids in a framed span, and what between them and an eval_id of that length, which ends it."""
        rest = self._of_event(ended, type_, outcome) + (_REDRIVEN if is_redriven else b"") + _HEADS[length]
        size = len(_NO_IDS) + len(rest) + length
        return _before(b"\x12", size) + _IDS[:2], rest

    def _unsettled(self, ended: int, links: dict[bytes, None], spans: list[bytes]) -> None:
        """The spans of those that died, or come again."""
        batch = self._batch
        facts = {
            delivery.redis_id: (fact, outcome)
            for events, outcomes in self._stored
            for (delivery, fact), outcome in zip(events, outcomes, strict=True)
        }
        for delivery in batch:
            redis_id = delivery.redis_id
            fact, outcome = facts.get(redis_id, (None, None))
            found = self._senders.get(redis_id)
            if found is None or not found[25] & _SAMPLED or outcome in {"applied", "duplicate"}:
                continue
            links[found] = None
            became = "dead" if redis_id in batch.buried else "later" if redis_id in batch.later else "returned"
            span = _IDS % (found[1:17], _id(8), found[17:25]) + self._of_event(
                ended, fact.type if fact else "", became, batch.buried.get(redis_id)
            )
            span += _REDRIVEN if delivery.is_redriven else b""
            spans.append(_framed(span + (_HEADS[len(fact.eval_id)] + fact.eval_id.encode() if fact else b"")))

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

    def _of_event(self, ended: int, type_: str, outcome: str, cause: bytes | None = None) -> bytes:
        """What spans of events have in common, or of one that died, which has a cause of its own."""
        about = messaging("dramatiq", "process", QUEUE) | {"evalstore.type": type_, "evalstore.outcome": outcome}
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


def _framed(span: bytes) -> bytes:
    """As it is among others."""
    return _field(b"\x12", span)


def _field(tag: bytes, data: bytes) -> bytes:
    return _before(tag, len(data)) + data


def _before(tag: bytes, length: int) -> bytes:
    return tag + _varint(length)


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
