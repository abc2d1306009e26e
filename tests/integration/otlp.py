"""A receiver of traces, for the tests that read them back: `POST /v1/traces`, OTLP over HTTP."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

KINDS = {number: name.removeprefix("SPAN_KIND_") for name, number in Span.SpanKind.items()}


class Read(NamedTuple):
    """A span as it was received."""

    service: str
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    links: list[tuple[str, str]]
    errors: list[str]
    is_error: bool
    ns: tuple[int, int]

    @property
    def key(self) -> tuple[str, str]:
        """What a link to it holds."""
        return self.trace_id, self.span_id


class Collector:
    """Keeps every span it is sent, in memory."""

    def __init__(self) -> None:
        self._spans: list[Read] = []
        self._lock = threading.Lock()
        keep = self._keep

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                keep(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *given: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that is to send its traces here, soon."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }

    def _keep(self, request: bytes) -> None:
        found = list(_read(ExportTraceServiceRequest.FromString(request)))
        with self._lock:
            self._spans += found

    def spans(self, name: str | None = None, *, trace_id: str | None = None) -> list[Read]:
        """Those of a name, or a trace, by their beginning."""
        with self._lock:
            wanted = [one for one in self._spans if name in {None, one.name} and trace_id in {None, one.trace_id}]
        return sorted(wanted, key=lambda one: one.ns)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _read(request: Any) -> Iterator[Read]:
    for resource in request.resource_spans:
        service = _attributes(resource.resource)["service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Read(
                    service,
                    span.name,
                    KINDS[span.kind],
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    _attributes(span),
                    [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
                    [_attributes(event)["exception.type"] for event in span.events if event.name == "exception"],
                    span.status.code == 2,
                    (span.start_time_unix_nano, span.end_time_unix_nano),
                )


def _attributes(holder: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in holder.attributes}


def a_collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()
