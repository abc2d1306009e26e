"""`/storage/evaluations/{id}/events` and `/storage/events:batch`: events as they are, one or many."""

import base64
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from evalstore.api import upload_routes, write_requests
from evalstore.api.access import Caller
from evalstore.api.openapi import answers, json_body
from evalstore.api.problems import invalid, not_found
from evalstore.api.record_routes import IDEMPOTENCY_KEY, PREFER, accepted, as_first_given, as_queued, wants_async
from evalstore.api.rendering import json_response, logged, to_json
from evalstore.api.service import Service, service_of
from evalstore.api.write_requests import Line
from evalstore.storage import conditional, records
from models.errors import EventIdReused, Fault
from models.events import decode, identity
from tasks import store_evaluations

router = APIRouter(prefix="/storage", tags=["events"])

_LINES = {
    "description": "For lines: an outcome a line. For one event: its outcome.",
    "content": {
        "application/json": {"schema": {"$ref": "#/components/schemas/Outcome"}},
        "application/x-ndjson": {"schema": {"type": "string"}},
    },
}


def _is_lines(request: Request) -> bool:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return media_type in {"application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines"}


@router.post(
    "/evaluations/{eval_id}/events",
    operation_id="send_events",
    summary="Store events of one evaluation",
    responses={**answers(408, 409, 413, 415, s202="Accepted|Outcome"), 200: _LINES},
    openapi_extra={**json_body("Event", lines=True), "parameters": [IDEMPOTENCY_KEY, PREFER]},
)
async def send(request: Request, eval_id: str) -> Response:
    """One event as JSON, or up to 10,000 as NDJSON, which are stored in one transaction: the good lines all together. They
    may leave out `eval_id`."""
    if _is_lines(request):
        return await _batch(request, eval_id)
    service = service_of(request)
    caller = await service.access.caller(request, "write")
    key = write_requests.idempotency_key(request.headers)
    async with service.body(request) as body:

        def read() -> Line:
            line = write_requests.single(body, eval_id, key, service.settings.max_content_bytes)
            return _allowed(service, caller, [line])[0]

        line = await service.thread(read)
    if line.given is None:
        raise invalid(line.faults)
    given = line.given
    if wants_async(request.headers):
        return await accepted(service, given)
    (outcome,), stored = await service.thread(
        lambda: service.write(1, lambda conn, trace: conditional.store(conn, [given], trace))
    )
    service.metrics.events(outcome)
    service.metrics.stored(stored)
    if outcome == "reused":
        raise EventIdReused(given.event.eval_id, given.event.event_id)
    return json_response(_told(line, outcome))


@router.post(
    "/events:batch",
    operation_id="send_event_batch",
    summary="Store events of many evaluations",
    responses={**answers(408, 413, 415, s202="Outcome"), 200: _LINES},
    openapi_extra={**json_body("Event", lines=True, single=False), "parameters": [IDEMPOTENCY_KEY, PREFER]},
)
async def send_batch(request: Request) -> Response:
    """Up to 10,000 events as NDJSON. The good ones are stored in one transaction; the answer has a line for each."""
    return await _batch(request, None)


async def _batch(request: Request, eval_id: str | None) -> Response:
    service = service_of(request)
    caller = await service.access.caller(request, "write")
    key = write_requests.idempotency_key(request.headers)
    is_async = wants_async(request.headers)
    async with service.body(request) as body:

        def work() -> list[dict[str, Any]]:
            lines = write_requests.lines(body, eval_id, key, service.settings.max_content_bytes, fast=not is_async)
            lines = _allowed(service, caller, lines)
            outcomes = _sent(service, lines) if is_async else _stored(service, lines)
            return [_told(line, outcome) for line, outcome in zip(lines, outcomes, strict=True)]

        told = await service.thread(work)
    for outcome in {str(one["outcome"]) for one in told}:
        service.metrics.events(outcome, sum(one["outcome"] == outcome for one in told))
    text = b"".join(to_json(one) + b"\n" for one in told)
    headers = {"Preference-Applied": "respond-async"} if is_async else {}
    return Response(text, 202 if is_async else 200, headers=headers, media_type="application/x-ndjson")


def _allowed(service: Service, caller: Caller, lines: Sequence[Line]) -> list[Line]:
    """The lines; those with a reference that the caller may not use are invalid."""
    found = upload_routes.faults(service, caller, [line.given.event if line.given else None for line in lines])
    pairs = zip(lines, found, strict=True)
    return [line._replace(given=None, faults=faults) if faults else line for line, faults in pairs]


def _stored(service: Service, lines: Sequence[Line]) -> list[str]:
    given = as_queued(service, [line.given for line in lines if line.given])
    if not given:
        return ["invalid"] * len(lines)
    found, stored = service.write(len(given), lambda conn, trace: conditional.store(conn, given, trace))
    service.metrics.stored(stored)
    outcomes = iter(found)
    return [next(outcomes) if line.given else "invalid" for line in lines]


def _sent(service: Service, lines: Sequence[Line]) -> list[str]:
    store_evaluations(as_first_given(service, [line.given for line in lines if line.given]))
    return ["accepted" if line.given else "invalid" for line in lines]


def _told(line: Line, outcome: str) -> dict[str, Any]:
    told: dict[str, Any] = {"line": line.number, "outcome": outcome}
    if line.eval_id is not None:
        told["eval_id"] = line.eval_id
    if line.event_id is not None:
        told["event_id"] = line.event_id
    if line.faults:
        told["faults"] = [fault._asdict() for fault in line.faults]
    return told


@router.get(
    "/evaluations/{eval_id}/events",
    operation_id="get_events",
    summary="Read an event log",
    responses=answers(404, s200="Log"),
)
async def read(
    request: Request,
    eval_id: str,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: Annotated[str | None, Query(description="`next` of the page before.")] = None,
) -> Response:
    """The events of an evaluation by (`occurred_at`, `event_id`); content up to 4 KiB is in them."""
    service = service_of(request)
    await service.access.caller(request, "read")
    if identity({"eval_id": eval_id})[0] is None:
        raise not_found(eval_id)
    after = _position(cursor) if cursor else None
    found = await service.run(lambda conn: records.log(conn, eval_id, limit=limit + 1, after=after))
    if not found and after is None:
        raise not_found(eval_id)
    events = [logged(eval_id, event, request.scope.get("root_path", "")) for event in found[:limit]]
    following = _cursor(found[limit - 1].fields) if len(found) > limit else None
    return json_response({"events": events, "next": following})


def _cursor(event: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(to_json([event["occurred_at"], event["event_id"]])).decode().rstrip("=")


def _position(cursor: str) -> tuple[datetime, UUID]:
    try:
        occurred_at, event_id = decode(base64.urlsafe_b64decode(cursor.encode("ascii") + b"=="))
        position = datetime.fromisoformat(occurred_at), UUID(event_id)
    except (ValueError, TypeError, AttributeError):
        position = None
    if position is None or position[0].utcoffset() is None:
        raise invalid([Fault("cursor", "expected the `next` of another page")])
    return position
