"""The application: routes, errors, limits and documentation around one Service."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Scope

from evalstore.api import (
    content_routes,
    documentation,
    event_routes,
    health_routes,
    list_routes,
    problems,
    record_routes,
    upload_routes,
)
from evalstore.api.fast_reads import FastReadMiddleware
from evalstore.api.limits import RequestLimitsMiddleware
from evalstore.api.metrics import ApiMetrics
from evalstore.api.openapi import document, methods
from evalstore.api.prefix import Prefix
from evalstore.api.rendering import json_response
from evalstore.api.service import Service
from evalstore.api.tracing import SERVICE, TracingMiddleware
from evalstore.storage import durability
from evalstore.telemetry import log_setup
from models.errors import Outage
from models.logs import EventLogger
from models.settings import settings, warn_unknown_env
from tasks import tracing

log = EventLogger("evalstore.api")

TITLE: Final = "evalstore"
DESCRIPTION: Final = (
    "Evaluations and what came of them. Every request but those for health and metrics needs a key, in `Authorization: Bearer "
    "KEY` or `X-API-Key`. Errors are `application/problem+json` (RFC 9457). What was answered with 200 or 201 is committed."
)


def build() -> ASGIApp:
    """The service as an ASGI application. Settings are read, and connections opened, when it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        log_setup.set_up("uvicorn", "uvicorn.access")
        warn_unknown_env()
        if "evalstore.api.protocol" not in sys.modules:
            log.warning("request_head_unbounded")
        traces = tracing.start(SERVICE)
        metrics.share()
        service = app.state.service = Service(settings(), metrics)
        beat = asyncio.create_task(metrics.beat(service))
        doubts = asyncio.create_task(_log_doubts(service))
        try:
            yield
        finally:
            beat.cancel()
            doubts.cancel()
            metrics.counters.disable_deadlines()
            service.close()
            tracing.flush(traces)

    app = FastAPI(
        title=TITLE,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # it sees no request that Guard or Reads answer
    )
    parts = (record_routes, list_routes, event_routes, content_routes, upload_routes, health_routes)
    for part in parts:
        app.include_router(part.router)

    routes = (route for part in parts for route in part.router.routes if isinstance(route, APIRoute))
    metrics = ApiMetrics(settings(), ((method, route.path) for route in routes for method in route.methods or ()))

    def made() -> Mapping[str, Any]:
        return document(app, title=TITLE, version=tracing.release(), description=DESCRIPTION)

    problems.install(app, lambda path: methods(made(), path))

    def served(request: Request) -> Mapping[str, Any]:
        return {**made(), "servers": [{"url": request.scope.get("root_path") or "/"}]}

    async def openapi(request: Request) -> Response:
        return json_response(served(request))

    async def docs(request: Request) -> Response:
        return HTMLResponse(documentation.page(served(request)), headers=documentation.HEADERS)

    app.add_route("/openapi.json", openapi)
    app.add_route("/docs", docs)

    def observe(scope: Scope, status: int, seconds: float) -> None:
        metrics.request(scope, status, seconds)
        state = scope.get("state", {})
        if scope["method"] not in {"GET", "HEAD"} or status in {401, 403}:
            path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:300]
            who, request_id = state.get("key_id", "nobody"), state["request_id"]
            log.info(
                "request",
                method=scope["method"],
                path=path,
                status=status,
                key_id=who,
                request_id=request_id,
                milliseconds=seconds * 1000,
            )

    guarded = RequestLimitsMiddleware(
        FastReadMiddleware(app), max_request_bytes=lambda: settings().max_request_bytes, observe=observe
    )
    return Prefix(TracingMiddleware(guarded), lambda: settings().api_root_path or "")


async def _log_doubts(service: Service) -> None:
    with contextlib.suppress(Outage, problems.Problem):
        for doubt in await service.run(durability.doubts):
            log.warning("postgresql_config_warning", doubt=doubt)
