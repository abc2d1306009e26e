"""`/storage/evaluations`: creating, changing and reading records."""

import re
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from evalstore.api import upload_routes, write_requests
from evalstore.api.access import Caller
from evalstore.api.cache import Rendered
from evalstore.api.openapi import EVAL_ID_PARAMETER, answers, header, json_body
from evalstore.api.problems import not_found
from evalstore.api.rendering import below, json_response, rendered, url
from evalstore.api.service import Service, service_of
from evalstore.storage import conditional
from evalstore.storage.conditional import WriteRequest
from evalstore.storage.event_store import Outcome, Stored
from models.errors import EventIdReused, Fault, InvalidEvent
from models.events import Event, identity
from models.record import EventRow
from tasks import store_evaluation

router = APIRouter(prefix="/storage", tags=["evaluations"])

PREFER: Final = header("Prefer", "`respond-async`: answer 202 at once, store through the queue.")
IDEMPOTENCY_KEY: Final = header("Idempotency-Key", "The same request with the same key is one event.", "^[!-~]{1,255}$")
_IF_MATCH: Final = header("If-Match", "Change it only if it is at this version; `*`: only if it exists.")
_IF_NONE_MATCH: Final = header("If-None-Match", "Answer 304 where it still is at this version.")
_TAG: Final = re.compile(r'(W/)?"([^"]*)"')
_ANY: Final = range(1, 2**31)
_HEADERS: Final = ((b"cache-control", b"private, no-cache"), (b"vary", b"Authorization, X-API-Key"))


@router.get(
    "/evaluations/{eval_id}",
    operation_id="get_evaluation",
    summary="Read a record",
    responses=answers(304, 404, s200="Record"),
    openapi_extra={"parameters": [EVAL_ID_PARAMETER, _IF_NONE_MATCH]},
)
async def read(request: Request) -> Response:
    """The record as it is now. Content up to 64 KiB is in it; of the rest its size, its beginning and where to read it."""
    return await record(request, request.path_params["eval_id"])


async def record(request: Request, eval_id: str) -> Response:
    """What `read` answers. Raises Problem, Outage."""
    service = service_of(request)
    await service.access.caller(request, "read")
    found = await service.records.get(eval_id) if identity({"eval_id": eval_id})[0] else None
    if found is None:
        raise not_found(eval_id)
    etag = _etag(found)
    is_same = is_match(request.headers.get("if-none-match"), etag)
    answer = Response(status_code=304 if is_same else 200)
    answer.raw_headers = [(b"etag", etag.encode()), *_HEADERS]  # as they are: to look at each again takes longer than to read
    if not is_same:
        answer.body = body = below(request.scope.get("root_path", ""), found.body)
        answer.raw_headers += [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
    return answer


@router.post(
    "/evaluations",
    operation_id="create_evaluation",
    summary="Create an evaluation",
    responses=answers(408, 409, 413, 415, s201="Record|Written", s202="Accepted"),
    openapi_extra={**json_body("NewEvaluation"), "parameters": [IDEMPOTENCY_KEY, PREFER]},
    status_code=201,
)
async def create(request: Request) -> Response:
    """Stores a queued event. The same again, by `event_id` or `Idempotency-Key`, gets the same answer; 409 where the evaluation
    was created by another event. An evaluation of which only later events are stored is completed by this."""
    service = service_of(request)
    caller = await service.access.caller(request, "write")
    key = write_requests.idempotency_key(request.headers)
    async with service.body(request) as body:

        def read() -> WriteRequest:
            given = write_requests.created(body, key, service.settings.max_content_bytes)
            _check_references(service, caller, given.event)
            return given

        if wants_async(request.headers):
            return await accepted(service, await service.thread(read))

        def work() -> tuple[Event | EventRow, Outcome]:
            (given,) = as_queued(service, [read()])
            return given.event, service.write(1, lambda conn, trace: conditional.create(conn, given, trace))

        event, outcome = await service.thread(work)
    return await _written(request, caller, event, outcome, 201)


@router.put(
    "/evaluations/{eval_id}",
    operation_id="update_evaluation",
    summary="Tell what happened next",
    responses=answers(408, 409, 412, 413, 415, s200="Record|Written", s201="Record|Written", s202="Accepted"),
    openapi_extra={**json_body("Change"), "parameters": [_IF_MATCH, IDEMPOTENCY_KEY, PREFER]},
)
async def update(request: Request, eval_id: str) -> Response:
    """Stores an event: `status` and its fields. `attempt` is the record's, where it is missing. Saying the same again changes
    nothing. Where nothing is stored of the evaluation yet, this is its first event, and the answer 201."""
    service = service_of(request)
    caller = await service.access.caller(request, "write")
    key, versions = write_requests.idempotency_key(request.headers), _versions(request.headers.get("if-match"))
    async with service.body(request) as body:

        def read() -> write_requests.Change:
            change = write_requests.changed(body, eval_id, key, service.settings.max_content_bytes)
            _check_references(service, caller, change.event)
            return change

        change = await service.thread(read)
        if wants_async(request.headers) and versions is None:
            attempt = change.attempt or await _attempt(service, eval_id)
            given = await service.thread(lambda: change.make(attempt))
            return await accepted(service, given)

        def make(attempt: int) -> WriteRequest:
            return as_queued(service, [change.make(attempt)])[0]

        def work() -> tuple[WriteRequest, Outcome, Stored]:
            return service.write(1, lambda conn, trace: conditional.update(conn, eval_id, make, versions, trace))

        given, outcome, stored = await service.thread(work)
        service.metrics.stored(stored)
        is_new = any(one.type == "storage:evaluation:created" for one in stored.confirmations)
    return await _written(request, caller, given.event, outcome, 201 if is_new else 200)


def _check_references(service: Service, caller: Caller, event: Event | EventRow) -> None:
    if faults := upload_routes.faults(service, caller, [event])[0]:
        raise InvalidEvent(faults)


async def _attempt(service: Service, eval_id: str) -> int:
    record = await service.records.get(eval_id)
    return 1 if record is None else int(msgspec.json.decode(record.body)["attempt"])


async def _written(request: Request, caller: Caller, event: Event | EventRow, outcome: Outcome, status: int) -> Response:
    service = service_of(request)
    service.metrics.events(outcome)
    if outcome == "reused":
        raise EventIdReused(event.eval_id, event.event_id)
    record = await service.thread(lambda: service.load(event.eval_id))
    if record is None:
        raise not_found(event.eval_id)
    made = rendered(record)
    headers = {"ETag": _etag(made), "Location": url(event.eval_id)}
    if "read" in caller.scopes:
        body = below(request.scope.get("root_path", ""), made.body)
        return Response(body, status, headers=headers, media_type="application/json")
    return json_response({name: record.fields[name] for name in ("eval_id", "version", "status")}, status, headers)


def _etag(record: Rendered) -> str:
    return f'"{record.version}"'


def is_match(if_none_match: str | None, etag: str) -> bool:
    """Whether an If-None-Match names `etag` (RFC 9110, 13.1.2)."""
    if if_none_match is None:
        return False
    return if_none_match.strip() == "*" or any(f'"{tag}"' == etag for _, tag in _TAG.findall(if_none_match))


def _versions(if_match: str | None) -> range | list[int] | None:
    """The versions an If-Match allows (RFC 9110, 13.1.1); None: any, or none at all. Raises InvalidEvent where it is none."""
    if if_match is None:
        return None
    if if_match.strip() == "*":
        return _ANY
    tags = _TAG.findall(if_match)
    if not tags:
        raise InvalidEvent([Fault("If-Match", 'expected versions in quotes, like "3", or *')])
    return [int(tag) for weak, tag in tags if not weak and re.fullmatch(r"[1-9]\d{0,9}", tag, re.ASCII)]


def wants_async(headers: Mapping[str, str]) -> bool:
    """RFC 7240: `Prefer: respond-async`."""
    preferences = headers.get("prefer", "").split(",")
    return any(one.partition(";")[0].strip().lower() == "respond-async" for one in preferences)


async def accepted(service: Service, given: WriteRequest) -> Response:
    """Send the event to the queue, and say so. Raises RedisOutage."""
    (event,) = await service.thread(lambda: as_first_given(service, [given]))
    await service.thread(lambda: store_evaluation.send(event))
    service.metrics.events("accepted")
    told = {"eval_id": event.eval_id, "event_id": event.event_id, "status": "accepted"}
    return json_response(told, 202, {"Location": url(event.eval_id), "Preference-Applied": "respond-async"})


def as_first_given(service: Service, given: Sequence[WriteRequest]) -> list[Event]:
    """Events that do not say when they occurred get the time at which they were first given: a repeat must be the same.

    What was stored has it in the event log; what went through the queue may not be there yet. Raises RedisOutage.
    """
    stored = service.stored_times([one.event for one in given if not one.has_explicit_time])

    def as_first(one: WriteRequest) -> Event:
        event = one.event
        if isinstance(event, EventRow):
            raise TypeError("what goes through the queue is an event")
        if one.has_explicit_time or event.occurred_at is None:
            return event
        first = stored.get((event.eval_id, event.event_id))
        first = first or service.remembered_time(event.eval_id, str(event.event_id), event.occurred_at)
        return event.model_copy(update={"occurred_at": first})

    return [as_first(one) for one in given]


def as_queued(service: Service, given: Sequence[WriteRequest]) -> list[WriteRequest]:
    """The same for what is stored at once: what still waits in the queue must be the very event, or becomes a dead letter."""
    times = service.queued_times([one.event for one in given if not one.has_explicit_time])
    first = [None if one.has_explicit_time else times.get((one.event.eval_id, one.event.event_id)) for one in given]
    return [one._replace(event=conditional.at_time(one.event, time)) for one, time in zip(given, first, strict=True)]
