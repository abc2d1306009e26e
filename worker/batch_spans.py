"""A worker's spans, encoded by hand.

The SDK spends more on a span than storing an event costs altogether. Here what the spans of a batch have in common is encoded
once, and each adds its own ids: the encoding of a protobuf message is that of its fields, in any order, one after the other
(https://protobuf.dev/programming-guides/encoding/). What is sampled, where spans are sent, and how, is left to the SDK.

For each event there is a span in its own trace, below that of its sender. A batch has a trace of its own, with a link to each
sender's span, and a span for each of its transactions.
"""

import random
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, repeat
from struct import iter_unpack
from typing import Any, Final, NamedTuple, TypeVar, cast

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
from tasks.redrives import REDRIVEN
from tasks.tracing import NAME, database, flush, messaging, release
from worker.batches import Batch, Delivery
from worker.traceparents import LENGTH, FixedWidthColumn, below, binary, interleave, is_sampled, sampled, senders

_SAMPLED, _REMOTE_PARENT = 0x01, 0x300  # SpanFlags of opentelemetry/proto/trace/v1/trace.proto
# The first fields of a span, up to their last byte: its trace, its parent, and itself.
_IDS: Final = b"\x0a\x10%b\x22\x08%b\x12\x08%b" % (bytes(16), bytes(8), bytes(8))
_TRACE_AT, _PARENT_AT, _ITSELF_AT = 2, 20, 30
_LINK: Final = b"\x6a\x21\x0a\x10%b\x12\x08%b\x35" % (bytes(16), bytes(8)) + (_SAMPLED | _REMOTE_PARENT).to_bytes(4, "little")
_LINK_TRACE_AT, _LINK_SPAN_AT = 4, 22
# Of what nobody takes, so much is kept for later: a few batches.
_WAITING, _TOGETHER = 32, 12
_MOST_BYTES: Final = 8 * 1024 * 1024
_MOST_TRIES, _MOST_FAILURES = 20, 2

T = TypeVar("T")
_Pair = tuple[Delivery, EventRow]


def _id(size: int) -> bytes:
    return random.randbytes(size)  # noqa: S311 - no secret


def _spans(traceparents: Sequence[str], span_ids: bytes, common: bytes, eval_ids: Sequence[str] = ()) -> list[bytes]:
    """Framed spans below these, in parts: with those ids, of evaluations with ids of one length, and all else in common."""
    senders, own = binary(traceparents), _IDS
    columns = [
        FixedWidthColumn(_TRACE_AT, 16, senders, 1, 26),
        FixedWidthColumn(_PARENT_AT, 8, senders, 17, 26),
        FixedWidthColumn(_ITSELF_AT, 8, span_ids, 0, 8),
    ]
    if eval_ids:
        length = len(eval_ids[0])
        own += _HEADS[length]
        columns.append(FixedWidthColumn(len(own), length, "".join(eval_ids).encode(), 0, length))
        own += bytes(length)
    many = bytearray(own * len(traceparents))
    interleave(many, len(own), *columns)
    # Columns of what is as long as a whole span would fall out of the processor's cache.
    each, before = chain.from_iterable(iter_unpack(f"{len(own)}s", many)), _before(b"\x12", len(own) + len(common))
    return [before, (common + before).join(each), common]


def _links(traceparents: Sequence[str]) -> bytes:
    """To each of these."""
    senders = binary(traceparents)
    many = bytearray(_LINK * len(traceparents))
    interleave(
        many,
        len(_LINK),
        FixedWidthColumn(_LINK_TRACE_AT, 16, senders, 1, 26),
        FixedWidthColumn(_LINK_SPAN_AT, 8, senders, 17, 26),
    )
    return bytes(many)


class _Encoded(NamedTuple):
    """Spans, as the request that sends them; for a processor of the SDK, which looks whether they are sampled."""

    parts: Sequence[bytes]
    size: int
    context: SpanContext = SpanContext(1, 1, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))


class _Exporter(OTLPSpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        # There is no public way to send what is encoded already. Requests one after the other are one request. To send one
        # takes a millisecond, so there are few; but receivers refuse what is very large.
        left, succeeded = [*cast("Sequence[_Encoded]", spans)], True
        while left and succeeded:
            parts: list[bytes] = []
            size = 0
            while left and (not parts or size + left[0].size <= _MOST_BYTES):
                one = left.pop(0)
                parts += one.parts
                size += one.size
            succeeded = self._client.export(b"".join(parts)).success
        return SpanExportResult.SUCCESS if succeeded else SpanExportResult.FAILURE


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
        """Have them sent soon, as `_framed` and `_spans` give them. Where nobody takes them, old ones are dropped."""
        size = sum(map(len, spans))
        self._processor.on_end(cast("ReadableSpan", _Encoded([self._scope_before(size), *spans], size)))

    def _scope_before(self, size: int) -> bytes:
        """What comes before so many bytes of spans in a request. They are large, and not copied to put it there."""
        scope = _before(b"\x12", len(self._scope) + size) + self._scope
        made: bytes = _before(b"\x0a", len(self._resource) + len(scope) + size) + self._resource + scope
        return made

    @contextmanager
    def publishing(self, stream: str, traceparents: Sequence[str]) -> Iterator[str]:
        """Each confirmation that is traced gets a span, below which it goes on."""
        found, began, ids = senders(traceparents), time.time_ns(), _id(8 * len(traceparents))
        yield below(found, ids)
        common: bytes = Span(
            name=f"send {stream}",
            kind=Span.SPAN_KIND_PRODUCER,
            start_time_unix_nano=began,
            end_time_unix_nano=time.time_ns(),
            attributes=_attributes(messaging("redis", "send", stream)),
            flags=_SAMPLED | _REMOTE_PARENT,
        ).SerializeToString()
        if len(kept := sampled(found)) < len(found):
            found, ids = _at(kept, found), _ids_at(kept, ids)
        if found:
            self.send(_spans(found, ids, common))

    def flush(self) -> None:
        """Send all now."""
        flush(self._processor)


class _Stored(NamedTuple):
    """Events that are stored together: what became of each, what it says of its trace; and the ids of their spans."""

    events: Sequence[_Pair]
    outcomes: Sequence[Outcome]
    found: Sequence[str]
    ids: bytes

    def sampled(self) -> "_Stored":
        """Those that get a span now: a reused one is a dead letter, and gets it as such."""
        kept = sampled(self.found)
        if "reused" in self.outcomes:
            kept = [at for at in kept if self.outcomes[at] != "reused"]
        if len(kept) == len(self.found):
            return self
        return _Stored(_at(kept, self.events), _at(kept, self.outcomes), _at(kept, self.found), _ids_at(kept, self.ids))


class BatchSpans:
    """Gathers what becomes of a batch, and sends its spans at the end. `traceparents`: what messages say, by their ids."""

    def __init__(self, traces: Traces, batch: Batch) -> None:
        self._traces, self._batch = traces, batch
        self._trace_id, self._span_id = _id(16), _id(8)
        self._began = time.time_ns()
        self.traceparents: dict[bytes, Any] = {}
        self._senders: dict[bytes, str] = {}
        self._tried: _Stored | None = None
        self._stored: list[_Stored] = []
        self._transactions: list[Span] = []
        self._failures: list[Span.Event] = []

    def _read(self) -> dict[bytes, str]:
        """The senders of the messages that were read so far, by their ids."""
        self._senders.update(zip(self.traceparents, senders([*self.traceparents.values()]), strict=True))
        self.traceparents.clear()
        return self._senders

    def traces_of(self, events: Sequence[_Pair]) -> Callable[[Sequence[int]], list[str]] | None:
        """What gives, for events by their positions, where their traces go on; None where no event has one."""
        if not self.traceparents and not self._senders:
            self._tried = None
            return None
        if len(self.traceparents) == len(events) == len(self._batch):
            found = senders([*self.traceparents.values()])  # all of the batch, in its order
        else:
            sender_of = self._read()
            found = [sender_of.get(delivery.redis_id, "") for delivery, _ in events]
        ids = _id(8 * len(events))
        self._tried = _Stored(events, [], found, ids)
        goes_on = below(found, ids)
        return lambda positions: [goes_on[LENGTH * at : LENGTH * at + LENGTH].strip() for at in positions]

    def note(self, events: Sequence[_Pair], outcomes: Sequence[Outcome]) -> None:
        """What became of events that are committed. Asked for before that was where their traces go on."""
        if self._tried is not None and self._tried.events is events:
            self._stored.append(self._tried._replace(outcomes=outcomes))

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
        links: dict[str, None] = {}
        spans: list[bytes] = []
        for stored in self._stored:
            self._settled(stored, ended, links, spans)
        if self._batch.buried or self._batch.later or self._batch.returned:
            self._unsettled(ended, links, spans)
        if spans or self._traces.samples(self._trace_id, f"process {QUEUE}"):
            transactions = [_framed(span.SerializeToString()) for span in self._transactions]
            self._traces.send([_framed(self._of_batch(ended) + _links([*links])), *transactions, *spans])

    def _settled(self, stored: "_Stored", ended: int, links: dict[str, None], spans: list[bytes]) -> None:
        """The spans of events that went through the store: most of all there are, so each step is for all of a kind at once."""
        events, outcomes, found, ids = stored.sampled()
        links |= dict.fromkeys(found)
        redis_ids = [delivery.redis_id for delivery, _ in events]
        redriven = [one.startswith(REDRIVEN) for one in redis_ids] if REDRIVEN in b" ".join(redis_ids) else repeat(False)
        eval_ids, types = [fact.eval_id for _, fact in events], [fact.type for _, fact in events]
        kinds = defaultdict[tuple[str, Outcome, bool, int], list[int]](list)
        for at, kind in enumerate(zip(types, outcomes, redriven, map(len, eval_ids), strict=False)):
            kinds[kind].append(at)
        for (type_, outcome, is_redriven, _), kept in kinds.items():
            common = self._of_event(ended, type_, outcome) + (_REDRIVEN if is_redriven else b"")
            spans += _spans(_at(kept, found), _ids_at(kept, ids), common, _at(kept, eval_ids))

    def _unsettled(self, ended: int, links: dict[str, None], spans: list[bytes]) -> None:
        """The spans of those that died, or come again."""
        batch, sender_of = self._batch, self._read()
        facts = {
            delivery.redis_id: (fact, outcome)
            for stored in self._stored
            for (delivery, fact), outcome in zip(stored.events, stored.outcomes, strict=True)
        }
        for delivery in batch:
            redis_id = delivery.redis_id
            fact, outcome = facts.get(redis_id, (None, None))
            found = sender_of.get(redis_id, "")
            if not is_sampled(found) or outcome in {"applied", "duplicate"}:
                continue
            links[found] = None
            became = "dead" if redis_id in batch.buried else "later" if redis_id in batch.later else "returned"
            common = self._of_event(ended, fact.type if fact else "", became, batch.buried.get(redis_id))
            common += _REDRIVEN if delivery.is_redriven else b""
            spans += _spans([found], _id(8), common, [fact.eval_id] if fact else [])

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


def _at(positions: Sequence[int], many: Sequence[T]) -> list[T]:
    return [many[position] for position in positions]


def _ids_at(positions: Sequence[int], ids: bytes) -> bytes:
    return array("Q", _at(positions, array("Q", ids))).tobytes()


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
