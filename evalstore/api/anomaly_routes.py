"""`/storage/anomalies`: what the anomaly detector found."""

import base64
from datetime import datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request
from sqlalchemy import Connection
from starlette.responses import Response

from evalstore.api import openapi
from evalstore.api.callers import Admin, reader
from evalstore.api.openapi import success
from evalstore.api.problems import Problem, invalid
from evalstore.api.rendering import json_response, to_json
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
    dependencies=[Depends(reader)],
)
async def read_all(
    request: Request,
    state: Annotated[Literal["open", "acknowledged"] | None, Query()] = None,
    kind: Annotated[Literal["drift", "outlier"] | None, Query()] = None,
    dimension: Annotated[Literal["language", "submitter", "executor"] | None, Query()] = None,
    value: Annotated[str | None, _TEXT] = None,
    metric: Annotated[str | None, _TEXT] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: Annotated[str | None, Query(max_length=600)] = None,
) -> Response:
    """The newest first, by `detected_at`."""
    chosen = Filter(state, kind, dimension, value, metric)
    before = _position(cursor) if cursor else None
    found = await service_of(request).run(lambda conn: anomalies.page(conn, chosen, limit + 1, before))
    following = _cursor(found[limit - 1]) if len(found) > limit else None
    return json_response({"anomalies": [one._asdict() for one in found[:limit]], "next": following})


def _cursor(last: Anomaly) -> str:
    return base64.urlsafe_b64encode(to_json([last.detected_at.isoformat(), str(last.id)])).decode().rstrip("=")


def _position(cursor: str) -> tuple[datetime, UUID]:
    try:
        at, anomaly_id = decode(base64.urlsafe_b64decode(cursor.encode("ascii") + b"=="))
        found = datetime.fromisoformat(at), UUID(anomaly_id)
    except (ValueError, TypeError, AttributeError):
        found = None
    if found is None or found[0].utcoffset() is None:
        raise invalid([Fault("cursor", "expected the `next` of another page")])
    return found


@router.get(
    "/{anomaly_id}",
    operation_id="get_anomaly",
    summary="Read an anomaly",
    responses={200: success("Anomaly"), **openapi.problems(404)},
    dependencies=[Depends(reader)],
)
async def read(request: Request, anomaly_id: UUID) -> Response:
    return json_response((await _get(service_of(request), anomaly_id))._asdict())


async def _get(service: Service, anomaly_id: UUID) -> Anomaly:
    found = await service.run(lambda conn: anomalies.get(conn, anomaly_id))
    if found is None:
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
    return json_response((await _get(service, anomaly_id))._asdict())


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
