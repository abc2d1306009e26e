"""Spans of requests: https://opentelemetry.io/docs/specs/semconv/http/http-spans/."""

from typing import TYPE_CHECKING, Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tasks import tracing

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

SERVICE: Final = "evalstore-api"
_UNTRACED: Final = frozenset({"/health/live", "/health/ready", "/metrics"})


class TracingMiddleware:
    """Continues the trace of a request. Does nothing unless traces are on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tracer = tracing.tracer() if scope["type"] == "http" and scope["path"] not in _UNTRACED else None
        if tracer is None:
            await self._app(scope, receive, send)
        else:
            await self._trace(tracer, scope, receive, send)

    async def _trace(self, tracer: "Tracer", scope: Scope, receive: Receive, send: Send) -> None:
        from opentelemetry.trace import SpanKind, StatusCode  # noqa: PLC0415 - an optional dependency
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"] if name in _CARRIED}
        context = TraceContextTextMapPropagator().extract(carrier)
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        with tracer.start_as_current_span(
            method, context=context, kind=SpanKind.SERVER, attributes=_attributes(scope, method)
        ) as span:

            async def send_recorded(message: Message) -> None:
                if message["type"] == "http.response.start":
                    status = message["status"]
                    span.set_attribute("http.response.status_code", status)
                    if status >= 500:
                        span.set_attribute("error.type", str(status))
                        span.set_status(StatusCode.ERROR)
                await send(message)

            try:
                await self._app(scope, receive, send_recorded)
            finally:
                if path := getattr(scope.get("route"), "path", None):
                    span.update_name(f"{method} {path}")
                    span.set_attribute("http.route", path)


_CARRIED: Final = frozenset({b"traceparent", b"tracestate"})
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})


def _attributes(scope: Scope, method: str) -> dict[str, Any]:
    host, port = scope.get("server") or (None, None)
    attributes = {
        "http.request.method": method,
        "url.scheme": scope.get("scheme", "http"),
        "url.path": scope["path"],
        "network.protocol.version": scope.get("http_version"),
        "server.address": host,
        "server.port": port,
    }
    return {name: value for name, value in attributes.items() if value is not None}
