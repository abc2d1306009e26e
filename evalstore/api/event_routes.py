"""`/storage/evaluations/{id}/events` and `/storage/events:batch`: events, one or many."""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from evalstore.api import async_writes, cursors, following, openapi, references, write_requests
from evalstore.api.access import Caller
from evalstore.api.callers import Reader, Writer
from evalstore.api.openapi import EvalId, IdempotencyKey, Prefer, json_body, success
from evalstore.api.problems import FOREIGN, invalid, not_found
from evalstore.api.rendering import event_fields, json_response, to_json
from evalstore.api.schemas import ref
from evalstore.api.service import Service, service_of
from evalstore.api.write_requests import Line
from evalstore.storage import conditional, records
from evalstore.storage.conditional import EvaluationErased
from evalstore.storage.event_store import Outcome, Stored
from evalstore.storage.visibility import Hidden
from models.errors import EventIdReused, Fault
from models.events import identity
from tasks import store_evaluations

router = APIRouter(prefix="/storage", tags=["events"], responses=openapi.ALWAYS)

_LINES: Final = {"application/x-ndjson": {"schema": {"type": "string", "description": "An Outcome a line."}}}
_OUTCOME: Final = {"application/json": {"schema": ref("Outcome")}}
_ACCEPTED: Final = {"application/json": {"schema": ref("Accepted")}}
_LINE_TYPES: Final = {"application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines"}


def _is_lines(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() in _LINE_TYPES


@router.post(
    "/evaluations/{eval_id}/events",
    operation_id="send_events",
    summary="Store events of one evaluation",
    responses={
        200: openapi.response("The outcome of an event, or of each line.", {**_OUTCOME, **_LINES}),
        202: openapi.response("The events are queued.", {**_ACCEPTED, **_LINES}, ("Location", "Preference-Applied")),
        **openapi.problems(408, 409, 410, 413, 415),
    },
    openapi_extra=openapi.body({**json_body("Event")["requestBody"]["content"], **openapi.LINES}),
)
async def send(
    request: Request, caller: Writer, eval_id: EvalId, idempotency_key: IdempotencyKey = None, prefer: Prefer = None
) -> Response:
    """One event as JSON, or up to 10,000 as NDJSON. The valid lines are stored in one transaction. Events may leave out
    `eval_id`."""
    if _is_lines(request):
        return await _batch(request, caller, eval_id, idempotency_key, prefer)
    service = service_of(request)
    write_requests.check_idempotency_key(idempotency_key)
    async with service.body(request) as body:

        def parse() -> Line:
            line = write_requests.single(body, eval_id, idempotency_key, service.settings.max_content_bytes)
            return _check_references(service, caller, [line])[0]

        line = await service.thread(parse)
    write = line.request
    if write is None:
        raise invalid(line.faults)
    if async_writes.is_preferred(prefer, caller):
        return await async_writes.send(service, write)

    def store() -> tuple[list[Outcome], Stored]:
        seen = write._replace(enrichment=service.hooks.check(write.event)) if service.hooks else write
        return service.write(1, lambda conn, trace: conditional.store(conn, [seen], trace, caller.visibility))

    (outcome,), stored = await service.thread(store)
    service.metrics.events(outcome)
    service.metrics.stored(stored)
    if outcome == "reused":
        raise EventIdReused(write.event.eval_id, write.event.event_id)
    if outcome == "erased":
        raise EvaluationErased(write.event.eval_id)
    return json_response(_describe(line, outcome))


@router.post(
    "/events:batch",
    operation_id="send_event_batch",
    summary="Store events of many evaluations",
    responses={
        200: openapi.response("The outcome of each line.", _LINES),
        202: openapi.response("The valid events are queued.", _LINES, ("Preference-Applied",)),
        **openapi.problems(408, 413, 415),
    },
    openapi_extra=openapi.body(openapi.LINES),
)
async def send_batch(
    request: Request, caller: Writer, idempotency_key: IdempotencyKey = None, prefer: Prefer = None
) -> Response:
    """Up to 10,000 events as NDJSON. The valid lines are stored in one transaction. The answer has a line for each."""
    return await _batch(request, caller, None, idempotency_key, prefer)


async def _batch(request: Request, caller: Caller, eval_id: str | None, key: str | None, prefer: str | None) -> Response:
    service = service_of(request)
    write_requests.check_idempotency_key(key)
    is_async = async_writes.is_preferred(prefer, caller)
    async with service.body(request) as body:

        def work() -> list[dict[str, Any]]:
            lines = write_requests.lines(body, eval_id, key, service.settings.max_content_bytes, fast=not is_async)
            lines = _check_references(service, caller, lines)
            if service.hooks and not is_async:
                lines = _seen_by_hooks(service, lines)
            if not is_async:
                lines, outcomes = _store(service, caller, lines)
            else:
                outcomes = _queue(service, lines)
            return [_describe(line, outcome) for line, outcome in zip(lines, outcomes, strict=True)]

        described = await service.thread(work)
    for outcome, count in Counter(str(line["outcome"]) for line in described).items():
        service.metrics.events(outcome, count)
    text = b"".join(to_json(line) + b"\n" for line in described)
    headers = async_writes.APPLIED if is_async else {}
    return Response(text, 202 if is_async else 200, headers=headers, media_type="application/x-ndjson")


def _check_references(service: Service, caller: Caller, lines: Sequence[Line]) -> list[Line]:
    """Return the lines; those with a reference that the caller may not use become invalid."""
    faults = references.faults(service, caller, [line.request.event if line.request else None for line in lines])
    pairs = zip(lines, faults, strict=True)
    return [line._replace(request=None, faults=wrong) if wrong else line for line, wrong in pairs]


def _seen_by_hooks(service: Service, lines: Sequence[Line]) -> list[Line]:
    """Return the lines with what enrichers give; those that a validator refuses become invalid."""
    valid = [at for at, line in enumerate(lines) if line.request]
    refused, enrichments = service.hooks.run([line.request.event for line in lines if line.request])
    seen = [*lines]
    for number, at in enumerate(valid):
        request = seen[at].request
        if error := refused.get(number):
            seen[at] = seen[at]._replace(request=None, faults=error.faults)
        elif request and number in enrichments:
            seen[at] = seen[at]._replace(request=request._replace(enrichment=enrichments[number]))
    return seen


def _store(service: Service, caller: Caller, lines: list[Line]) -> tuple[list[Line], list[str]]:
    """Store the valid lines. Return the lines and their outcomes; those that the caller may not write become invalid."""
    writes = service.event_times.for_database([line.request for line in lines if line.request])
    if not writes:
        return lines, ["invalid"] * len(lines)
    try:
        stored_outcomes, stored = service.write(
            len(writes), lambda conn, trace: conditional.store(conn, writes, trace, caller.visibility)
        )
    except Hidden as hidden:
        return _store(service, caller, [_without_hidden(line, hidden) for line in lines])
    service.metrics.stored(stored)
    outcomes = iter(stored_outcomes)
    return lines, [next(outcomes) if line.request else "invalid" for line in lines]


def _without_hidden(line: Line, hidden: Hidden) -> Line:
    """Return the line, without its request if the caller may not write its evaluation."""
    if line.request is None or line.eval_id not in hidden.eval_ids:
        return line
    if line.eval_id in hidden.foreign:
        return line._replace(request=None, faults=(Fault("submitter", FOREIGN),))
    return line._replace(request=None, faults=(Fault("eval_id", "there is no such evaluation"),))


def _queue(service: Service, lines: Sequence[Line]) -> list[str]:
    store_evaluations(service.event_times.for_queue([line.request for line in lines if line.request]))
    return ["accepted" if line.request else "invalid" for line in lines]


def _describe(line: Line, outcome: str) -> dict[str, Any]:
    described: dict[str, Any] = {"line": line.number, "outcome": outcome}
    if line.eval_id is not None:
        described["eval_id"] = line.eval_id
    if line.event_id is not None:
        described["event_id"] = line.event_id
    if line.faults:
        described["faults"] = [fault._asdict() for fault in line.faults]
    return described


@router.get(
    "/evaluations/{eval_id}/events",
    operation_id="get_events",
    summary="Read an event log",
    responses={200: success("Log"), **openapi.problems(404)},
)
async def read(
    request: Request,
    caller: Reader,
    eval_id: EvalId,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: Annotated[str | None, Query(description="`next` of the page before.")] = None,
) -> Response:
    """The events of an evaluation by (`occurred_at`, `event_id`), with content up to 4 KiB."""
    service = service_of(request)
    if identity({"eval_id": eval_id})[0] is None or not await following.can_see(service, caller, eval_id):
        raise not_found(eval_id)
    after = cursors.decode_time(cursor, UUID) if cursor else None
    rows = await service.run(lambda conn: records.log(conn, eval_id, limit=limit + 1, after=after))
    if not rows and after is None:
        raise not_found(eval_id)
    events = [event_fields(eval_id, row, request.scope.get("root_path", "")) for row in rows[:limit]]
    last = rows[limit - 1].fields if len(rows) > limit else None
    following_cursor = cursors.encode_time(last["occurred_at"], last["event_id"]) if last else None
    return json_response({"events": events, "next": following_cursor})
