"""Whether the service lives and is ready, and what it counts. Anyone may ask."""

import redis
from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from api.rendering import json_response
from api.service import service_of
from models.errors import Outage, SchemaMismatch
from storage import migrations

router = APIRouter(tags=["health"])

_READY = {200: {"description": "It answers requests."}, 503: {"description": "It cannot, for now; `database` says why."}}


@router.get("/health/live", operation_id="live", summary="Is the process alive?")
async def live() -> Response:
    """It is, where this answers."""
    return json_response({"status": "alive"})


@router.get("/health/ready", operation_id="ready", summary="Can it answer requests?", responses=_READY)  # type: ignore[arg-type]
async def ready(request: Request) -> Response:
    """Asks PostgreSQL and Redis. Without Redis it is ready: reads are slower then, and `respond-async` is refused."""
    service = service_of(request)
    found = {"database": "ready", "redis": "ready"}
    try:
        await service.run(migrations.check)
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
    """Of this process, in Prometheus's text format."""
    return Response(service_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
