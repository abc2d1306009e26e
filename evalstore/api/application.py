"""The ASGI application: routes, errors, limits and documentation around one Service."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Scope

from evalstore import hooks
from evalstore.api import (
    anomaly_routes,
    content_routes,
    docs_page,
    event_routes,
    health_routes,
    list_routes,
    problems,
    record_routes,
    run_routes,
    stats_routes,
    stream_routes,
    upload_routes,
    webhook_routes,
)
from evalstore.api.fast_reads import FastReadMiddleware
from evalstore.api.http_metrics import ApiMetrics
from evalstore.api.openapi import DocumentedApp
from evalstore.api.path_prefix import PathPrefixMiddleware
from evalstore.api.rendering import json_response
from evalstore.api.request_limits import RequestLimitsMiddleware
from evalstore.api.request_spans import SERVICE, TracingMiddleware
from evalstore.api.service import Service
from evalstore.console import routes as console
from evalstore.storage import durability
from evalstore.telemetry import log_setup
from models.errors import Outage
from models.logs import EventLogger
from models.settings import Settings
from models.unknown_settings import warn_unknown_env
from tasks import tracing

log = EventLogger("evalstore.api")

ROUTERS: Final = tuple(
    module.router
    for module in (
        record_routes,
        list_routes,
        run_routes,
        stats_routes,
        stream_routes,
        event_routes,
        content_routes,
        upload_routes,
        webhook_routes,
        anomaly_routes,
        health_routes,
    )
)
_DESCRIPTION: Final = (
    "Evaluations and their results. Every request needs a key in `Authorization: Bearer KEY` or `X-API-Key`, except those for "
    "health and metrics. Errors are `application/problem+json` (RFC 9457)."
    " A write that is answered with 200 or 201 is committed."
)
_HEARTBEAT_S: Final = 2.0


def build(settings: Settings) -> ASGIApp:
    """Return the service as an ASGI application. It opens connections when it starts."""
    routes = (route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute))
    served = (*routes, *console.routes(settings))
    metrics = ApiMetrics(
        settings, ((method, route.path) for route in served for method in sorted({*(route.methods or ())} - {"HEAD"}))
    )

    called = hooks.load_or_exit(settings, metrics.counters)

    @asynccontextmanager
    async def lifespan(app: DocumentedApp) -> AsyncIterator[dict[str, Any]]:
        log_setup.set_up("uvicorn", "uvicorn.access")
        warn_unknown_env()
        if "evalstore.api.protocol" not in sys.modules:
            log.warning("request_head_unbounded")
        traces = tracing.start(SERVICE)
        metrics.share()
        service = app.state.service = Service(settings, metrics, called)
        background = [asyncio.create_task(_report_progress(service)), asyncio.create_task(_warn_not_durable(service))]
        try:
            yield {"stop_following": service.feed.stop}
        finally:
            for task in background:
                task.cancel()
            service.feed.stop()
            await service.feed.close()
            await service.rates.close()
            console.close(app)
            metrics.counters.disable_deadlines()
            service.close()
            tracing.flush(traces)

    app = documented_app(lifespan=lifespan)
    console.mount(app, settings)
    guarded = RequestLimitsMiddleware(
        FastReadMiddleware(app),
        max_request_bytes=settings.max_request_bytes,
        observe=lambda scope, status, seconds: _observe(metrics, scope, status, seconds),
    )
    return PathPrefixMiddleware(TracingMiddleware(guarded), settings.api_root_path or "")


def documented_app(**options: Any) -> DocumentedApp:
    """Return the FastAPI application with all routes, its document and the page of the document."""
    app = DocumentedApp(
        title="evalstore",
        version=tracing.release(),
        description=_DESCRIPTION,
        docs_url=None,  # FastAPI's page loads scripts from another host
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
        **options,
    )
    for router in ROUTERS:
        app.include_router(router)
    problems.install(app, [route for router in ROUTERS for route in router.routes])

    def document(request: Request) -> dict[str, Any]:
        return {**app.openapi(), "servers": [{"url": request.scope.get("root_path") or "/"}]}

    async def openapi(request: Request) -> Response:
        return json_response(document(request))

    async def docs(request: Request) -> Response:
        return HTMLResponse(docs_page.render(document(request)), headers=docs_page.HEADERS)

    app.add_route("/openapi.json", openapi)
    app.add_route("/docs", docs)
    return app


def _observe(metrics: ApiMetrics, scope: Scope, status: int, seconds: float) -> None:
    """Count a request, without the time for which it waited for changes. Log requests that write, and refused requests."""
    metrics.request(scope, status, seconds - scope.get("state", {}).get("waited_s", 0.0))
    if scope["method"] in {"GET", "HEAD"} and status not in {401, 403}:
        return
    state = scope.get("state", {})
    log.info(
        "request",
        method=scope["method"],
        path=scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:300],
        status=status,
        key_id=state.get("key_id", "nobody"),
        request_id=state["request_id"],
        milliseconds=seconds * 1000,
    )


async def _report_progress(service: Service) -> None:
    """Show, until cancelled, that the event loop makes progress."""
    service.metrics.counters.watch_thread("event loop")
    while True:
        service.metrics.heartbeat(service.connections, service.busy, waiting=service.feed.waiting, streams=service.feed.streams)
        await asyncio.sleep(_HEARTBEAT_S)


async def _warn_not_durable(service: Service) -> None:
    with contextlib.suppress(Outage, problems.Problem):
        for doubt in await service.run(durability.doubts):
            log.warning("postgresql_config_warning", doubt=doubt)
