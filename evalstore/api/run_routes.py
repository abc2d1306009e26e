"""`/storage/runs`: runs and their sums, and what a client declares about a run."""

from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from sqlalchemy import Connection
from starlette.responses import Response

from evalstore.api import cursors, openapi
from evalstore.api.callers import Reader, Writer
from evalstore.api.openapi import json_body, success
from evalstore.api.parameters import Time, refuse_unknown
from evalstore.api.problems import Problem, invalid
from evalstore.api.rendering import json_response
from evalstore.api.service import service_of
from evalstore.storage import runs
from evalstore.storage.runs import RunFilter
from models.errors import Fault
from models.events import decode, identity

router = APIRouter(prefix="/storage/runs", tags=["runs"], responses=openapi.ALWAYS)

_PREFIX: Final = Query(pattern="^[A-Za-z0-9._~:@+=-]{1,200}$", description="The beginning of `run_id`.")
_TEXT: Final = Query(max_length=1000, pattern="^[^\\x00]*$")
_MOST_EXPECTED: Final = 2**53


@router.get(
    "",
    operation_id="list_runs",
    summary="List runs",
    responses={200: success("RunPage")},
)
async def read_all(
    request: Request,
    caller: Reader,
    run_id_prefix: Annotated[str | None, _PREFIX] = None,
    submitter: Annotated[str | None, _TEXT] = None,
    since: Annotated[Time | None, Query(description="`first_at` is this time or later.")] = None,
    until: Annotated[Time | None, Query(description="`first_at` is before this time.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: Annotated[str, Query(max_length=600)] = "",
) -> Response:
    """The newest first, by `first_at`. `submitter`: runs all of whose evaluations are of this submitter.

    With filters a page may hold fewer than `limit`, even none, although there is a `next`. The sums are late by some seconds.
    """
    refuse_unknown(request, {"run_id_prefix", "submitter", "since", "until", "limit", "cursor"})
    chosen = RunFilter(run_id_prefix, submitter, since, until, caller.visibility)
    after = cursors.decode(cursor, chosen) if cursor else None
    found, following = await service_of(request).run(lambda conn: runs.page(conn, chosen, limit=limit, after=after))
    return json_response({"runs": found, "next": cursors.encode(following, chosen) if following else None})


@router.get(
    "/{run_id}",
    operation_id="get_run",
    summary="Read a run",
    responses={200: success("Run"), **openapi.problems(404)},
)
async def read(request: Request, caller: Reader, run_id: openapi.EvalId) -> Response:
    """Sums of its evaluations, which are late by some seconds.

    `state` is `finished` when the run was declared complete and no evaluation is queued or running.
    """
    found = None
    if _is_possible(run_id):
        found = await service_of(request).run(lambda conn: runs.get(conn, run_id, caller.visibility))
    if found is None:
        raise _no_run(run_id)
    return json_response(found)


def _no_run(run_id: str) -> Problem:
    return Problem(404, "not-found", f"there is no run {run_id!r}")


@router.put(
    "/{run_id}",
    operation_id="declare_run",
    summary="Declare a run complete",
    responses={200: success("Run"), **openapi.problems(404, 413, 415)},
    openapi_extra=json_body("RunDeclaration"),
)
async def declare(request: Request, caller: Writer, run_id: openapi.EvalId) -> Response:
    """`expected`: the run is complete when it has so many evaluations. `closed`: it is complete as it is.

    A run that is complete and has no unfinished evaluation left sends `storage:run:finished`. A run may be declared before its
    first event, but by a key that is restricted to a submitter only after it.
    """
    service = service_of(request)
    if not _is_possible(run_id):
        raise invalid([Fault("run_id", "expected 1 to 200 of A-Z a-z 0-9 . _ ~ : @ + = -")])
    async with service.body(request) as body:
        declared = _declaration(decode(bytes(body), "body"))

    def work(conn: Connection) -> dict[str, Any] | None:
        visibility = caller.visibility
        if visibility.submitter is not None and runs.get(conn, run_id, visibility) is None:
            return None
        if visibility.run_prefix is not None and not run_id.startswith(visibility.run_prefix):
            return None
        runs.declare(conn, run_id, declared)
        return runs.get(conn, run_id)

    found = await service.run(work)
    if found is None:
        raise _no_run(run_id)
    return json_response(found)


def _is_possible(run_id: str) -> bool:
    return identity({"eval_id": run_id})[0] is not None


def _declaration(body: Any) -> dict[str, Any]:
    """Return the checked declaration. Raises Problem (422)."""
    if not isinstance(body, dict):
        raise invalid([Fault("body", f"expected a JSON object, not {type(body).__name__}")])
    faults = [Fault(str(name)[:100], "unknown: expected expected or closed") for name in body.keys() - {"expected", "closed"}]
    expected = body.get("expected")
    is_count = isinstance(expected, int) and not isinstance(expected, bool) and 0 <= expected <= _MOST_EXPECTED
    if expected is not None and not is_count:
        faults.append(Fault("expected", f"expected an integer from 0 to {_MOST_EXPECTED:,}, or null"))
    if not isinstance(body.get("closed", False), bool):
        faults.append(Fault("closed", "expected true or false"))
    if not body:
        faults.append(Fault("body", "expected expected or closed"))
    if faults:
        raise invalid(faults)
    return body
