"""Health probes and metrics. They need no key."""

import asyncio
from typing import Final

import redis
from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from evalstore.api.openapi import Responses
from evalstore.api.rendering import json_response
from evalstore.api.service import service_of
from evalstore.storage import migrations
from evalstore.telemetry.exposition import Answer
from evalstore.telemetry.exposition import live as liveness
from models.errors import DatabaseMisconfigured, Outage, SchemaMismatch

router = APIRouter(tags=["health"])

_LIVE: Final[Responses] = {
    200: {"description": "All threads make progress."},
    503: {"description": "A thread is stuck: restart the process.", "content": {"application/json": {"schema": {}}}},
}
_READY: Final[Responses] = {
    200: {"description": "It can answer requests."},
    503: {"description": "It cannot; `database` says why.", "content": {"application/json": {"schema": {}}}},
}

_METRICS: Final[Responses] = {
    200: {
        "description": "The format that the header Accept asks for.",
        "content": {"application/openmetrics-text": {"schema": {"type": "string"}}},
    }
}


@router.get("/health/live", operation_id="live", summary="Does the process make progress?", responses=_LIVE)
async def live(request: Request) -> Response:
    """200 unless a thread is stuck. Asks no server."""
    group = service_of(request).metrics.group
    answer = liveness(group) if group else Answer(200, {"status": "alive"})
    return json_response(answer.told, answer.status)


@router.get("/health/ready", operation_id="ready", summary="Can it answer requests?", responses=_READY)
async def ready(request: Request) -> Response:
    """Asks PostgreSQL and Redis. Without Redis it is ready: reads are slower, and `respond-async` is refused."""
    service = service_of(request)
    servers = {"database": "ready", "redis": "ready"}
    try:
        await service.run(lambda conn: migrations.check(conn, or_newer=service.had_schema))
        service.had_schema = True
    except DatabaseMisconfigured:
        servers["database"] = "cannot be reached: mistake in settings"
    except Outage:
        servers["database"] = "cannot be reached"
    except SchemaMismatch as error:
        servers["database"] = str(error)

    def ping() -> None:
        service.redis.ping()

    try:
        await service.thread(ping)
    except redis.RedisError:
        servers["redis"] = "cannot be reached"
    is_ready = servers["database"] == "ready"
    return json_response({"status": "ready" if is_ready else "not ready", **servers}, 200 if is_ready else 503)


@router.get(
    "/metrics", operation_id="metrics", summary="Prometheus metrics", response_class=PlainTextResponse, responses=_METRICS
)
async def metrics(request: Request) -> Response:
    """Metrics of all processes of the service on this machine that were started together, in Prometheus's text format."""
    metrics, accept = service_of(request).metrics, request.headers.get("accept", "")
    text, media_type = await asyncio.get_running_loop().run_in_executor(None, metrics.text, accept)
    return Response(text, media_type=media_type)
