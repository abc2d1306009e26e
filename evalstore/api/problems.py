"""Errors as clients see them: application/problem+json (RFC 9457), whatever went wrong and wherever."""

from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Any, Final

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from evalstore.storage.conditional import AlreadyQueued, VersionChanged
from models.errors import EventIdReused, Fault, InvalidEvent, ObjectDamaged, ObjectMissing, Outage
from models.logs import EventLogger
from models.validation_errors import format_error

log = EventLogger("evalstore.api")

MEDIA_TYPE: Final = "application/problem+json"
_RETRY_AFTER_S: Final = 2
_NAMED: Final[dict[type[Exception], tuple[int, str]]] = {
    EventIdReused: (409, "event-id-reused"),
    AlreadyQueued: (409, "already-created"),
    VersionChanged: (412, "version-changed"),
    ObjectMissing: (500, "object-missing"),
    ObjectDamaged: (500, "object-damaged"),
}


class Problem(Exception):
    """An answer that is an error. `kind` names it for programs: `urn:evalstore:problem:KIND`."""

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        faults: Iterable[Fault] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail, self.headers = status, kind, detail, dict(headers or {})
        self.faults = tuple(faults)


def refuse_packed(headers: Mapping[str, str]) -> None:
    """A body is taken as it is. Raises Problem (415) for one that its client compressed."""
    if headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
        raise Problem(415, "unsupported-encoding", "a body is taken as it is: send it without Content-Encoding")


def invalid(faults: Iterable[Fault]) -> Problem:
    """422, with every wrong field."""
    faults = tuple(faults)
    return Problem(422, "invalid", "; ".join(f"{fault.field}: {fault.problem}" for fault in faults)[:2000], faults=faults)


def not_found(eval_id: str, what: str = "") -> Problem:
    """404 of an evaluation, or of something it does not have."""
    there = f"evaluation {eval_id!r} has no {what}" if what else f"there is no evaluation {eval_id!r}"
    return Problem(404, "not-found", there)


def unavailable(detail: str) -> Problem:
    """503, with when to try again."""
    return Problem(503, "outage", detail, headers={"Retry-After": str(_RETRY_AFTER_S)})


def body(problem: Problem, request_id: str) -> dict[str, Any]:
    """The JSON object of a problem."""
    fields: dict[str, Any] = {
        "type": f"urn:evalstore:problem:{problem.kind}",
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.detail,
        "request_id": request_id,
    }
    if problem.faults:
        fields["faults"] = [fault._asdict() for fault in problem.faults]
    return fields


def response(problem: Problem, request_id: str) -> Response:
    """The answer that tells of `problem`."""
    text = msgspec.json.encode(body(problem, request_id))
    return Response(text, problem.status, headers={"Cache-Control": "no-store", **problem.headers}, media_type=MEDIA_TYPE)


_ROUTING: Final = {
    404: ("no-such-path", "there is nothing at this path; /docs shows what there is"),
    405: ("method-not-allowed", "not with this method; the header Allow names those that are"),
}


_OURS: Final = (Problem, InvalidEvent, EventIdReused, AlreadyQueued, VersionChanged, ObjectMissing, ObjectDamaged, Outage)


def of(error: Exception) -> Problem:
    """`error` in HTTP's words. What it is not known to be is an error of ours: it is logged, and not told."""
    match error:
        case Problem():
            return error
        case InvalidEvent():
            return invalid(error.faults)
        case EventIdReused() | AlreadyQueued() | VersionChanged() | ObjectMissing() | ObjectDamaged():
            status, kind = _NAMED[type(error)]
            if status == 500:
                log.error("content_corrupt", kind=type(error).__name__, error=error)
            return Problem(status, kind, str(error))
        case Outage():
            log.warning("request_outage", kind=type(error).__name__, error=error)
            return unavailable(f"{type(error).__name__}: a server this service needs cannot be reached; try again")
        case ClientDisconnect():
            return Problem(400, "broken-off", "the request did not come to its end")  # so it is counted; nobody reads it
        case RuntimeError(__cause__=cause) if isinstance(cause, _OURS):
            return of(cause)  # Starlette's word for one that came when the answer had begun
        case RequestValidationError():
            return invalid(_faults(error))
        case HTTPException():
            kind, detail = _ROUTING.get(error.status_code, ("refused", str(error.detail)))
            return Problem(error.status_code, kind, detail, headers=error.headers)
        case _:
            log.error("unexpected_error", exc_info=error)
            return Problem(500, "internal", "an error of the service; its log tells more")


def _faults(error: RequestValidationError) -> list[Fault]:
    faults = []
    for fault in error.errors():
        where, *path = fault["loc"]
        name = ".".join(part for part in path if isinstance(part, str)) or str(where)  # of a repeated one without its number
        faults.append(Fault(name, format_error(fault)))
    return faults


def install(app: FastAPI, methods: Callable[[str], list[str]]) -> None:
    """Answer every error of `app` so, unknown paths and methods included. `methods` gives those that a path has."""

    async def handle(request: Request, error: Exception) -> Response:
        problem = of(error)
        if problem.status == 405:  # Starlette names those of one route alone
            problem.headers["Allow"] = ", ".join(methods(request.scope["path"]))
        return response(problem, request.state.request_id)

    for kind in (*_OURS, RequestValidationError, ClientDisconnect, HTTPException):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(Exception, handle)
