"""`/storage/evaluations`: creating, changing and reading records."""

from datetime import datetime
from typing import Annotated, Final

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from evalstore.api import async_writes, following, openapi, references, write_requests
from evalstore.api.access import Caller
from evalstore.api.callers import Admin, Reader, Writer
from evalstore.api.openapi import EvalId, IdempotencyKey, IfNoneMatch, Prefer, json_body, success
from evalstore.api.parameters import Time
from evalstore.api.preconditions import allowed_versions, matches_etag
from evalstore.api.problems import invalid, not_found
from evalstore.api.record_cache import Rendered
from evalstore.api.rendering import json_response, path_of, render, render_past, with_prefix
from evalstore.api.service import Service, service_of
from evalstore.storage import conditional
from evalstore.storage.conditional import EvaluationErased, WriteRequest
from evalstore.storage.event_store import Outcome, Stored
from models.errors import EventIdReused, Fault, InvalidEvent
from models.events import Event, identity
from models.record import EventRow

router = APIRouter(prefix="/storage", tags=["evaluations"], responses=openapi.ALWAYS)

_HEADERS: Final = ((b"cache-control", b"private, no-cache"), (b"vary", b"Authorization, X-API-Key"))
_STORED: Final = success("Record", "Written", headers=("ETag", "Location"))
_ACCEPTED: Final = success("Accepted", headers=("Location", "Preference-Applied"))


@router.get(
    "/evaluations/{eval_id}",
    operation_id="get_evaluation",
    summary="Read a record",
    responses={200: success("Record", headers=("ETag",)), **openapi.problems(304, 404)},
)
async def read(
    request: Request,
    caller: Reader,
    eval_id: EvalId,
    if_none_match: IfNoneMatch = None,
    as_of: Annotated[Time | None, Query(description="The record as it was then, by when events were stored.")] = None,
    wait: Annotated[
        float | None,
        Query(
            ge=0,
            le=60,
            allow_inf_nan=False,
            description="Seconds to wait until the evaluation is finished or, with If-None-Match, until it changes.",
        ),
    ] = None,
) -> Response:
    """The record as it is now. Content up to 64 KiB is in it; of larger content its size, beginning and address.

    With `as_of` it is the record as it was: `provisional: true` says that a commit under way may still change the answer.

    With `wait` the answer comes after that time at the latest: the record as it is then, or 304. An evaluation may be created
    in that time."""
    if as_of is None:
        return await answer(request, caller, eval_id, if_none_match, wait)
    if wait is not None:
        raise invalid([Fault("wait", "cannot be combined with as_of")])
    return await _answer_past(request, caller, eval_id, as_of)


async def _answer_past(request: Request, caller: Caller, eval_id: str, at: datetime) -> Response:
    service = service_of(request)
    past = None
    if identity({"eval_id": eval_id})[0] and await following.can_see(service, caller, eval_id):
        past = await service.thread(lambda: service.load_past(eval_id, at))
    if past is None:
        raise not_found(eval_id)
    response = Response(with_prefix(request.scope.get("root_path", ""), render_past(past)), media_type="application/json")
    response.raw_headers += _HEADERS
    return response


async def answer(
    request: Request, caller: Caller, eval_id: str, if_none_match: str | None, wait_s: float | None = None
) -> Response:
    """Return the record, or 304, to an authorized caller, after `wait_s` at the latest. Raises Problem, Outage."""
    service = service_of(request)

    def is_done(record: Rendered | None) -> bool:
        if record is None or not following.is_visible(caller, record):
            return False
        return following.is_finished(record) if if_none_match is None else not matches_etag(if_none_match, _etag(record))

    if identity({"eval_id": eval_id})[0] is None:
        raise not_found(eval_id)
    if wait_s:
        record = await following.until(request, service, eval_id, is_done, wait_s)
        caller = await service.access.authorize_again(request, "read")
    else:
        record = await service.records.get(eval_id)
    if record is None or not following.is_visible(caller, record):
        raise not_found(eval_id)
    etag = _etag(record)
    is_same = matches_etag(if_none_match, etag)
    response = Response(status_code=304 if is_same else 200)
    response.raw_headers = [(b"etag", etag.encode()), *_HEADERS]
    if not is_same:
        response.body = body = with_prefix(request.scope.get("root_path", ""), record.body)
        response.raw_headers += [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
    return response


@router.post(
    "/evaluations",
    operation_id="create_evaluation",
    summary="Create an evaluation",
    responses={201: _STORED, 202: _ACCEPTED, **openapi.problems(408, 409, 410, 413, 415)},
    openapi_extra=json_body("NewEvaluation"),
    status_code=201,
)
async def create(request: Request, caller: Writer, idempotency_key: IdempotencyKey = None, prefer: Prefer = None) -> Response:
    """Stores a queued event. The same event again, by `event_id` or `Idempotency-Key`, gets the same answer. 409 if another
    event created the evaluation. Later events of the evaluation may be stored before."""
    service = service_of(request)
    write_requests.check_idempotency_key(idempotency_key)
    async with service.body(request) as body:

        def parse() -> WriteRequest:
            write = write_requests.created(body, idempotency_key, service.settings.max_content_bytes)
            _check_references(service, caller, write.event)
            return write

        if async_writes.is_preferred(prefer, caller):
            return await async_writes.send(service, await service.thread(parse))

        def store() -> tuple[Event | EventRow, Outcome]:
            write = _seen_by_hooks(service, parse())
            (write,) = service.event_times.for_database([write])
            return write.event, service.write(1, lambda conn, trace: conditional.create(conn, write, trace, caller.visibility))

        event, outcome = await service.thread(store)
    return await _written(request, caller, event, outcome, 201)


@router.put(
    "/evaluations/{eval_id}",
    operation_id="update_evaluation",
    summary="Change an evaluation",
    responses={
        200: _STORED,
        201: {**_STORED, "description": "This event is the first of the evaluation."},
        202: _ACCEPTED,
        **openapi.problems(408, 409, 410, 412, 413, 415),
    },
    openapi_extra=json_body("Change"),
)
async def update(
    request: Request,
    caller: Writer,
    eval_id: EvalId,
    if_match: Annotated[
        str | None, Header(alias="If-Match", description="Store only at this version; `*`: only if the record exists.")
    ] = None,
    idempotency_key: IdempotencyKey = None,
    prefer: Prefer = None,
) -> Response:
    """Stores an event: `status` and its fields. `attempt` is the record's by default. The same change again stores nothing.
    Without a record this is the first event of the evaluation, and the answer is 201."""
    service = service_of(request)
    write_requests.check_idempotency_key(idempotency_key)
    versions = allowed_versions(if_match)
    async with service.body(request) as body:

        def parse() -> write_requests.Change:
            change = write_requests.changed(body, eval_id, idempotency_key, service.settings.max_content_bytes)
            _check_references(service, caller, change.event)
            return change

        change = await service.thread(parse)
        if async_writes.is_preferred(prefer, caller) and versions is None:
            attempt = change.attempt or await _attempt(service, eval_id)
            return await async_writes.send(service, await service.thread(lambda: change.make(attempt)))

        def store() -> tuple[WriteRequest, Outcome, Stored]:
            # Before the transaction, in which the record is locked. There the attempt may become that of the record.
            enrichment = _seen_by_hooks(service, change.make(change.attempt or 1)).enrichment if service.hooks else None

            def make(attempt: int) -> WriteRequest:
                return service.event_times.for_database([change.make(attempt)])[0]._replace(enrichment=enrichment)

            return service.write(
                1, lambda conn, trace: conditional.update(conn, eval_id, make, versions, trace, caller.visibility)
            )

        write, outcome, stored = await service.thread(store)
        service.metrics.stored(stored)
        is_new = any(confirmation.type == "storage:evaluation:created" for confirmation in stored.confirmations)
    return await _written(request, caller, write.event, outcome, 201 if is_new else 200)


@router.delete(
    "/evaluations/{eval_id}",
    operation_id="erase_evaluation",
    summary="Erase an evaluation",
    responses={200: success("Erased"), **openapi.problems(404, 409)},
)
async def erase(
    request: Request,
    caller: Admin,
    eval_id: EvalId,
    reason: Annotated[str | None, Query(max_length=1000, pattern="^[^\\x00]*$")] = None,
) -> Response:
    """Erases it everywhere, for good: record, events, content, dead letters and objects. Later events of it are answered 410.
    May be repeated. 409 while a worker of an older release runs. An object that something else may name goes with the sweep."""
    service = service_of(request)
    if identity({"eval_id": eval_id})[0] is None:
        raise not_found(eval_id)
    done = await service.thread(lambda: service.erase(eval_id, f"key {caller.key_id}", reason))
    if done is None:
        raise not_found(eval_id)
    return json_response(
        {"eval_id": eval_id, "events": done.events, "objects": done.objects, "objects_left": done.objects_left}
    )


def _check_references(service: Service, caller: Caller, event: Event | EventRow) -> None:
    if faults := references.faults(service, caller, [event])[0]:
        raise InvalidEvent(faults)


def _seen_by_hooks(service: Service, write: WriteRequest) -> WriteRequest:
    """Return the request with what enrichers give. Raises InvalidEvent if a validator refuses the event."""
    return write._replace(enrichment=service.hooks.check(write.event)) if service.hooks else write


async def _attempt(service: Service, eval_id: str) -> int:
    record = await service.records.get(eval_id)
    return 1 if record is None else record.head.attempt


async def _written(request: Request, caller: Caller, event: Event | EventRow, outcome: Outcome, status: int) -> Response:
    service = service_of(request)
    service.metrics.events(outcome)
    if outcome == "reused":
        raise EventIdReused(event.eval_id, event.event_id)
    if outcome == "erased":
        raise EvaluationErased(event.eval_id)
    record = await service.thread(lambda: service.load(event.eval_id))
    if record is None:
        raise not_found(event.eval_id)
    rendered = render(record)
    headers = {"ETag": _etag(rendered), "Location": path_of(event.eval_id)}
    if "read" in caller.scopes:
        body = with_prefix(request.scope.get("root_path", ""), rendered.body)
        return Response(body, status, headers=headers, media_type="application/json")
    return json_response({name: record.fields[name] for name in ("eval_id", "version", "status")}, status, headers)


def _etag(record: Rendered) -> str:
    return f'"{record.tag}"'
