"""Traces with OpenTelemetry, which its environment variables turn on. Otherwise OpenTelemetry is not imported.

https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/

The options `traceparent` and `tracestate` of a message carry the context (https://www.w3.org/TR/trace-context/). Stock clients
ignore them.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final, Literal

from dramatiq import Message

from models import threads
from models.errors import SendRefused
from models.logs import EventLogger
from tasks.keys import QUEUE

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

log = EventLogger("evalstore")

NAME: Final = "evalstore"
_OFF: Final = nullcontext()
_SPAN: Final = "make a span"


def is_asked_for(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment turns traces on, with a supported exporter."""
    return _asked(environment) == "otlp"


def _asked(environment: Mapping[str, str]) -> Literal["nothing", "otlp", "unsupported"]:
    def read(*names: str) -> str:
        return next((value.lower() for name in names if (value := environment.get(name, "").strip())), "")

    exporter = read("OTEL_TRACES_EXPORTER")
    endpoint = read("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    if read("OTEL_SDK_DISABLED") == "true" or exporter == "none" or not (exporter or endpoint):
        return "nothing"
    protocol = read("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    return "otlp" if exporter in {"", "otlp"} and protocol in {"", "http/protobuf"} else "unsupported"


@cache
def provider(service: str | None = None) -> "TracerProvider | None":
    """Return the provider of this process's spans, or None if traces are off. `service` is the default service name."""
    if threads.is_within(_SPAN):  # a signal handler interrupted the work below
        return None
    asked = _asked(os.environ)
    if asked == "unsupported":
        log.warning("traces_unsupported")
    if asked != "otlp":
        return None
    try:
        with threads.once_at_a_time(_SPAN):
            return _provider(service)
    except (SendRefused, RuntimeError) as error:  # the interpreter ends
        log.warning("traces_not_started", error=error)
        return None


def _provider(service: str | None) -> "TracerProvider | None":
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning("traces_not_installed", error=error)
        return None
    resource = Resource.create()
    if service and str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: service}))
    made = TracerProvider(resource=resource)
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return made


def start(service: str) -> "TracerProvider | None":
    """Make `provider(service)` the process-wide provider, unless the process has one."""
    made = provider(service)
    if made is not None:
        from opentelemetry import trace

        if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            trace.set_tracer_provider(made)
    return made


def flush(what: Any, within_s: float = 2.0) -> None:
    """Send waiting spans before the process ends. Gives up after `within_s`."""
    if what is not None:
        flushing = threads.start(what.force_flush)
        if flushing is not None:
            flushing.join(within_s)


def tracer() -> "Tracer | None":
    """Return a tracer of the process-wide provider, or of our own; None with traces off."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is not None and not isinstance(found := trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return _tracer_of(found)
    own = provider()
    return None if own is None else _tracer_of(own)


@cache
def _tracer_of(made: Any) -> "Tracer":
    found: Tracer = made.get_tracer(NAME, release())
    return found


@cache
def release() -> str:
    """Return the version of evalstore."""
    return metadata.version("evalstore")


def sending(queue: str, messages: Sequence[Message[Any]]) -> AbstractContextManager[None]:
    """Trace the sending of messages. They carry the span's context within the block."""
    found = tracer()
    if found is None or queue != QUEUE or threads.is_within(_SPAN):  # a signal handler must not wait for the SDK's locks
        return _OFF
    return _sending(found, queue, messages)


@contextmanager
def _sending(found: "Tracer", queue: str, messages: Sequence[Message[Any]]) -> Iterator[None]:
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    attributes = messaging("dramatiq", "send", queue)
    if len(messages) == 1:
        attributes |= {"messaging.message.id": messages[0].message_id} | _named(*messages[0].args[:1])
    else:
        attributes["messaging.batch.message_count"] = len(messages)
    with (
        threads.once_at_a_time(_SPAN),
        found.start_as_current_span(f"send {queue}", kind=SpanKind.PRODUCER, attributes=attributes),
    ):
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier)
        for message in messages:
            message.options.update(carrier)
        yield


def receiving(
    stream: str, group: str, fields: Mapping[bytes, bytes], confirmation: Mapping[str, Any]
) -> AbstractContextManager[None]:
    """Trace the handling of a confirmation, in the trace of its event. The span is current in the block."""
    found = tracer()
    return _OFF if found is None else _receiving(found, stream, group, fields, confirmation)


@contextmanager
def _receiving(
    found: "Tracer", stream: str, group: str, fields: Mapping[bytes, bytes], confirmation: Mapping[str, Any]
) -> Iterator[None]:
    from opentelemetry.trace import Link, SpanKind, get_current_span
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {"traceparent": fields.get(b"traceparent", b"").decode(errors="replace")}
    context = TraceContextTextMapPropagator().extract(carrier)
    sender = get_current_span(context).get_span_context()
    with found.start_as_current_span(
        f"process {stream}",
        context=context,
        kind=SpanKind.CONSUMER,
        links=[Link(sender)] if sender.is_valid else [],
        attributes=messaging("redis", "process", stream) | {"messaging.consumer.group.name": group} | _named(confirmation),
    ):
        yield


@contextmanager
def transaction(events: int) -> Iterator[str | None]:
    """Trace a transaction that stores events. Gives its `traceparent`; None with traces off."""
    found = tracer()
    if found is None:
        yield None
        return
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    with found.start_as_current_span("transaction evaluations", kind=SpanKind.CLIENT, attributes=database(events)):
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier)
        yield carrier.get("traceparent")


def database(events: int) -> dict[str, str | int]:
    """Return the attributes of a transaction's span: https://opentelemetry.io/docs/specs/semconv/database/database-spans/."""
    return {
        "db.system.name": "postgresql",
        "db.operation.name": "transaction",
        "db.collection.name": "evaluations",
        "db.operation.batch.size": events,
    }


def messaging(system: str, operation: str, destination: str) -> dict[str, str | int]:
    """Return the attributes of a span about messages."""
    return {
        "messaging.system": system,
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": destination,
    }


def _named(fields: Any = None) -> dict[str, str | int]:
    names = {"eval_id": "evalstore.eval_id", "type": "evalstore.type", "version": "evalstore.version"}
    return {names[name]: fields[name] for name in names if isinstance(fields, Mapping) and name in fields}
