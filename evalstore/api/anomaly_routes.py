"""`/storage/anomalies`: what the anomaly detector found."""

from typing import Annotated, Any, Final, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Request
from sqlalchemy import Connection
from starlette.responses import Response

from evalstore.api import cursors, openapi
from evalstore.api.access import Caller
from evalstore.api.callers import Admin, Reader
from evalstore.api.openapi import success
from evalstore.api.problems import Problem
from evalstore.api.rendering import json_response
from evalstore.api.schemas import ref
from evalstore.api.service import Service, service_of
from evalstore.storage import anomalies
from evalstore.storage.anomalies import Anomaly, Filter
from evalstore.storage.operator_actions import Intent
from models.errors import Fault, InvalidEvent, printable
from models.events import decode

router = APIRouter(prefix="/storage/anomalies", tags=["anomalies"], responses=openapi.ALWAYS)

_TEXT: Final = Query(max_length=1000, pattern="^[^\\x00]*$")
_REASON_CHARACTERS: Final = 1000


@router.get(
    "",
    operation_id="list_anomalies",
    summary="List anomalies",
    responses={200: success("Anomalies")},
)
async def read_all(  # noqa: PLR0913, PLR0917 - a parameter for each in the query
    request: Request,
    caller: Reader,
    state: Annotated[Literal["open", "acknowledged"] | None, Query()] = None,
    kind: Annotated[Literal["drift", "outlier"] | None, Query()] = None,
    dimension: Annotated[Literal["language", "submitter", "executor"] | None, Query()] = None,
    value: Annotated[str | None, _TEXT] = None,
    metric: Annotated[str | None, _TEXT] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: Annotated[str | None, Query(max_length=600)] = None,
) -> Response:
    """The newest first, by `detected_at`. A key that is restricted to a submitter gets those about the submitter alone."""
    chosen = Filter(state, kind, dimension, value, metric)
    if caller.visibility.is_restricted:
        if not _is_visible(caller, dimension or "submitter", caller.visibility.submitter if value is None else value):
            return json_response({"anomalies": [], "next": None})
        chosen = chosen._replace(dimension="submitter", value=caller.visibility.submitter)
    before = cursors.decode_time(cursor, UUID) if cursor else None
    found = await service_of(request).run(lambda conn: anomalies.page(conn, chosen, limit + 1, before))
    last = found[limit - 1] if len(found) > limit else None
    following = cursors.encode_time(last.detected_at, last.id) if last else None
    return json_response({"anomalies": [one._asdict() for one in found[:limit]], "next": following})


@router.get(
    "/{anomaly_id}",
    operation_id="get_anomaly",
    summary="Read an anomaly",
    responses={200: success("Anomaly"), **openapi.problems(404)},
)
async def read(request: Request, caller: Reader, anomaly_id: UUID) -> Response:
    return json_response((await _get(service_of(request), anomaly_id, caller))._asdict())


def _is_visible(caller: Caller, dimension: str, value: str | None) -> bool:
    """Tell whether a finding is visible. One about a language or an executor is about evaluations of others, too."""
    visibility = caller.visibility
    if not visibility.is_restricted:
        return True
    return visibility.run_prefix is None and dimension == "submitter" and value == visibility.submitter


async def _get(service: Service, anomaly_id: UUID, caller: Caller) -> Anomaly:
    found = await service.run(lambda conn: anomalies.get(conn, anomaly_id))
    if found is None or not _is_visible(caller, found.dimension, found.value):
        raise Problem(404, "not-found", f"there is no anomaly {str(anomaly_id)!r}")
    return found


@router.post(
    "/{anomaly_id}/acknowledge",
    operation_id="acknowledge_anomaly",
    summary="Acknowledge an anomaly",
    responses={200: success("Anomaly"), **openapi.problems(404)},
    openapi_extra=openapi.body({"application/json": {"schema": ref("Acknowledgement")}}, required=False),
)
async def acknowledge(request: Request, caller: Admin, anomaly_id: UUID) -> Response:
    """Notes the key and the reason. One that is acknowledged already stays as it is."""
    service = service_of(request)
    reason = await _reason(service, request)
    intent = Intent("anomalies ack", f"key {caller.key_id}", reason, {"anomaly": str(anomaly_id)})

    def work(conn: Connection) -> bool:
        return anomalies.acknowledge(conn, anomaly_id, intent)

    await service.run(work)
    return json_response((await _get(service, anomaly_id, caller))._asdict())


async def _reason(service: Service, request: Request) -> str | None:
    async with service.body(request) as body:
        given: Any = decode(bytes(body), "body") if body else {}
    if not isinstance(given, dict):
        raise InvalidEvent([Fault("body", f"expected a JSON object, not {type(given).__name__}")])
    faults = [Fault(name, "there is no such field; there is reason") for name in sorted(given.keys() - {"reason"})]
    reason = given.get("reason")
    if reason is not None and (not isinstance(reason, str) or len(reason) > _REASON_CHARACTERS or not _is_storable(reason)):
        faults.append(Fault("reason", f"expected text of up to {_REASON_CHARACTERS:,} characters"))
    if faults:
        raise InvalidEvent(faults)
    return reason


def _is_storable(text: str) -> bool:
    return "\0" not in text and printable(text) == text
