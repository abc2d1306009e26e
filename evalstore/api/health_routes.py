"""Whether the service lives and is ready, and what it counts. Anyone may ask."""

import asyncio

import redis
from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from evalstore.api.rendering import json_response
from evalstore.api.service import service_of
from evalstore.storage import migrations
from evalstore.telemetry.exposition import Answer
from evalstore.telemetry.exposition import live as liveness
from models.errors import DatabaseMisconfigured, Outage, SchemaMismatch

router = APIRouter(tags=["health"])

_LIVE = {200: {"description": "It does."}, 503: {"description": "It does not: start it again."}}
_READY = {200: {"description": "It answers requests."}, 503: {"description": "It cannot, for now; `database` says why."}}


@router.get("/health/live", operation_id="live", summary="Does the process make progress?", responses=_LIVE)  # type: ignore[arg-type]
async def live(request: Request) -> Response:
    """It does where this answers, unless one of its threads is stuck. Asks no server."""
    group = service_of(request).metrics.group
    answer = liveness(group) if group else Answer(200, {"status": "alive"})
    return json_response(answer.told, answer.status)


@router.get("/health/ready", operation_id="ready", summary="Can it answer requests?", responses=_READY)  # type: ignore[arg-type]
async def ready(request: Request) -> Response:
    """Asks PostgreSQL and Redis. Without Redis it is ready: reads are slower then, and `respond-async` is refused."""
    service = service_of(request)
    found = {"database": "ready", "redis": "ready"}
    try:
        await service.run(lambda conn: migrations.check(conn, or_newer=service.had_schema))
        service.had_schema = True
    except DatabaseMisconfigured:
        found["database"] = "cannot be reached: mistake in settings"
    except Outage:
        found["database"] = "cannot be reached"
    except SchemaMismatch as error:
        found["database"] = str(error)

    def ping() -> None:
        service.redis.ping()

    try:
        await service.thread(ping)
    except redis.RedisError:
        found["redis"] = "cannot be reached"
    is_ready = found["database"] == "ready"
    return json_response({"status": "ready" if is_ready else "not ready", **found}, 200 if is_ready else 503)


@router.get("/metrics", operation_id="metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Of all processes of the service on this machine that were started together, in Prometheus's text format."""
    metrics, accept = service_of(request).metrics, request.headers.get("accept", "")
    text, media_type = await asyncio.get_running_loop().run_in_executor(None, metrics.text, accept)
    return Response(text, media_type=media_type)
