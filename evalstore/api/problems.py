"""Errors as application/problem+json (RFC 9457)."""

from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route

from evalstore.storage.conditional import AlreadyQueued, EvaluationErased, VersionChanged
from evalstore.storage.visibility import Hidden
from models.errors import EventIdReused, Fault, InvalidEvent, ObjectDamaged, ObjectMissing, Outage
from models.logs import EventLogger
from models.validation_errors import format_error

log = EventLogger("evalstore.api")

MEDIA_TYPE: Final = "application/problem+json"
_RETRY_AFTER_S: Final = 2
_NAMED: Final[dict[type[Exception], tuple[int, str]]] = {
    EventIdReused: (409, "event-id-reused"),
    AlreadyQueued: (409, "already-created"),
    EvaluationErased: (410, "erased"),
    VersionChanged: (412, "version-changed"),
    ObjectMissing: (500, "object-missing"),
    ObjectDamaged: (500, "object-damaged"),
}


class Problem(Exception):
    """An error to answer with. `kind` names it for programs: `urn:evalstore:problem:KIND`."""

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


def refuse_compressed(headers: Mapping[str, str]) -> None:
    """Raise Problem (415) for a compressed body."""
    if headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
        raise Problem(415, "unsupported-encoding", "compressed bodies are refused: send the body without Content-Encoding")


def invalid(faults: Iterable[Fault]) -> Problem:
    """Return 422, which names every wrong field."""
    faults = tuple(faults)
    return Problem(422, "invalid", "; ".join(f"{fault.field}: {fault.problem}" for fault in faults)[:2000], faults=faults)


def not_found(eval_id: str, content: str = "") -> Problem:
    """Return a 404 for an evaluation, or for its `content`."""
    detail = f"evaluation {eval_id!r} has no {content}" if content else f"there is no evaluation {eval_id!r}"
    return Problem(404, "not-found", detail)


def unavailable(detail: str) -> Problem:
    """Return 503, with Retry-After."""
    return Problem(503, "outage", detail, headers={"Retry-After": str(_RETRY_AFTER_S)})


def body(problem: Problem, request_id: str) -> dict[str, Any]:
    """Return the JSON object of a problem."""
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
    """Return the response of a problem."""
    text = msgspec.json.encode(body(problem, request_id))
    return Response(text, problem.status, headers={"Cache-Control": "no-store", **problem.headers}, media_type=MEDIA_TYPE)


FOREIGN: Final = "the key stores only evaluations of its submitter and of its runs: give them in the queued event"


def _hidden(error: Hidden) -> Problem:
    """Return 403 for a queued event of another submitter or run, and 404 for what does not exist for the key."""
    if error.foreign:
        return Problem(403, "forbidden", FOREIGN)
    return not_found(min(error.eval_ids))


_ROUTING: Final = {
    404: ("no-such-path", "the service has no such path: /docs lists them"),
    405: ("method-not-allowed", "the path does not have this method: the header Allow lists its methods"),
}
_OURS: Final = (
    Problem,
    InvalidEvent,
    EventIdReused,
    AlreadyQueued,
    EvaluationErased,
    VersionChanged,
    ObjectMissing,
    ObjectDamaged,
    Hidden,
    Outage,
)


def of(error: Exception) -> Problem:
    """Translate an error into a problem. Log an unexpected error, and answer 500 without its text."""
    match error:
        case Problem() | Hidden():
            return _hidden(error) if isinstance(error, Hidden) else error
        case InvalidEvent():
            return invalid(error.faults)
        case EventIdReused() | AlreadyQueued() | EvaluationErased() | VersionChanged() | ObjectMissing() | ObjectDamaged():
            status, kind = _NAMED[type(error)]
            if status == 500:
                log.error("content_corrupt", kind=type(error).__name__, error=error)
            return Problem(status, kind, str(error))
        case Outage():
            log.warning("request_outage", kind=type(error).__name__, error=error)
            return unavailable(f"{type(error).__name__}: a server that the service needs cannot be reached; try again")
        case ClientDisconnect():
            return Problem(400, "broken-off", "the request is incomplete")
        case RuntimeError(__cause__=cause) if isinstance(cause, _OURS):
            return of(cause)  # Starlette wraps an error after the answer has begun
        case RequestValidationError():
            return invalid(_faults(error))
        case HTTPException():
            kind, detail = _ROUTING.get(error.status_code, ("refused", str(error.detail)))
            return Problem(error.status_code, kind, detail, headers=error.headers)
        case _:
            log.error("unexpected_error", exc_info=error)
            return Problem(500, "internal", "an error of the service: its log says more")


def _faults(error: RequestValidationError) -> list[Fault]:
    faults = []
    for fault in error.errors():
        place, *path = fault["loc"]
        name = ".".join(part for part in path if isinstance(part, str)) or str(place)
        faults.append(Fault(name, format_error(fault)))
    return faults


def install(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Answer every error of `app` with a problem. The header Allow lists methods of `routes`."""

    async def handle(request: Request, error: Exception) -> Response:
        problem = of(error)
        if problem.status == 405:
            problem.headers["Allow"] = ", ".join(_methods(request, routes))
        return response(problem, request.state.request_id)

    for kind in (*_OURS, RequestValidationError, ClientDisconnect, HTTPException):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(Exception, handle)


def _methods(request: Request, routes: Sequence[BaseRoute]) -> list[str]:
    """Return the methods of a path from all its routes. Starlette's own Allow has the methods of one route only."""
    matching = [route for route in routes if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE]
    methods = {method for route in matching for method in route.methods or ()} or {"GET"}
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)
