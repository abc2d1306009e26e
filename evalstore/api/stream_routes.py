"""`GET /storage/stream`: changes as they are committed, as server-sent events."""

from typing import Annotated, Final

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from evalstore.api import openapi
from evalstore.api.callers import Reader
from evalstore.api.change_feed import ChangeFilter
from evalstore.api.following import EventStream, parse_id
from evalstore.api.parameters import Status
from evalstore.api.problems import invalid
from evalstore.api.service import service_of
from models.errors import Fault
from models.events import identity

router = APIRouter(prefix="/storage", tags=["evaluations"], responses=openapi.ALWAYS)

_PARAMETERS: Final = {"eval_id", "run_id", "status"}
_EVENTS: Final = {
    "text/event-stream": {
        "schema": {
            "type": "string",
            "description": "`id`: for Last-Event-ID. `event`: the confirmation's type, or `snapshot`. `data`: a line of JSON.",
        }
    }
}


@router.get(
    "/stream",
    operation_id="stream_changes",
    summary="Follow changes",
    responses={200: openapi.response("Confirmations, until the client disconnects.", _EVENTS)},
    response_class=Response,
)
async def read(
    request: Request,
    caller: Reader,
    eval_id: Annotated[str | None, Query(description="Only changes of this evaluation.")] = None,
    run_id: Annotated[str | None, Query(description="Only changes of evaluations of this run.")] = None,
    status: Annotated[list[Status] | None, Query(description="Only changes to this status. May be repeated.")] = None,
    last_event_id: Annotated[
        str | None, Header(alias="Last-Event-ID", description="Go on after this event, without a gap.")
    ] = None,
) -> Response:
    """The confirmation of each change that is committed from now on. A change may come twice: ignore an `updated` whose
    version is not above the last. Where the place of `Last-Event-ID` is gone, `event: snapshot` comes first: read the
    evaluations again."""
    faults = [
        Fault(name[:100], "unknown parameter: /docs lists them") for name in request.query_params if name not in _PARAMETERS
    ]
    for name, value in (("eval_id", eval_id), ("run_id", run_id)):
        if value is not None and identity({"eval_id": value})[0] is None:
            faults.append(Fault(name, "expected 1 to 200 of A-Z a-z 0-9 . _ ~ : @ + = -"))
    if faults:
        raise invalid(faults)
    chosen = ChangeFilter(eval_id, run_id, frozenset(status or ()))
    return EventStream(service_of(request), request, caller, chosen, parse_id(last_event_id))
