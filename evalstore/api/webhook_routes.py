"""`/storage/webhooks`: subscriptions, and what was sent to them."""

from typing import Annotated, Any, Final, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request
from sqlalchemy import Connection
from starlette.responses import Response

from evalstore.api import openapi
from evalstore.api.access import Caller
from evalstore.api.callers import Admin, admin
from evalstore.api.openapi import json_body, success
from evalstore.api.problems import Problem
from evalstore.api.rendering import json_response
from evalstore.api.schemas import ref
from evalstore.api.service import Service, service_of
from evalstore.storage import webhook_deliveries, webhooks
from evalstore.storage.operator_actions import Intent
from evalstore.storage.webhooks import TooManyWebhooks, Webhook
from models.errors import Fault, InvalidEvent
from models.events import decode
from models.networks import parse_networks
from models.webhooks import now, parse_rotation, parse_subscription

router = APIRouter(prefix="/storage/webhooks", tags=["webhooks"], responses=openapi.ALWAYS)

_NO_STORE: Final = {"Cache-Control": "no-store"}  # of answers that hold a secret


async def _json_object(service: Service, request: Request) -> dict[str, Any]:
    async with service.body(request) as body:
        data = decode(bytes(body), "body") if body else {}
    if not isinstance(data, dict):
        raise InvalidEvent([Fault("body", f"expected a JSON object, not {type(data).__name__}")])
    return data


def _intent(caller: Caller, verb: str, **what: object) -> Intent:
    return Intent(f"webhooks {verb}", f"key {caller.key_id}", None, {name: str(value) for name, value in what.items()})


def _found(found: Webhook | None, webhook_id: UUID) -> Webhook:
    if found is None:
        raise Problem(404, "not-found", f"there is no webhook {str(webhook_id)!r}")
    return found


async def _get(service: Service, webhook_id: UUID) -> Webhook:
    return _found(await service.run(lambda conn: webhooks.get(conn, webhook_id)), webhook_id)


async def _check_active(service: Service, webhook_id: UUID) -> None:
    """Raise Problem: 404 where there is no such webhook, 409 where it is disabled."""
    if (await _get(service, webhook_id)).state != "active":
        raise _disabled()


def _disabled() -> Problem:
    return Problem(409, "webhook-disabled", "the webhook is disabled: enable it first")


@router.post(
    "",
    operation_id="create_webhook",
    summary="Subscribe to confirmations",
    responses={201: success("NewWebhook"), **openapi.problems(409)},
    openapi_extra=json_body("Subscription"),
    status_code=201,
)
async def create(request: Request, caller: Admin) -> Response:
    """The answer holds the secret, which is shown this once."""
    service = service_of(request)
    intent = _intent(caller, "create")
    networks = parse_networks(service.settings.webhook_allow or "")
    subscription, secret = parse_subscription(await _json_object(service, request), networks)
    intent = intent._replace(filter={"url": subscription.url})

    def add(conn: Connection) -> Webhook | None:
        return webhooks.get(conn, webhooks.create(conn, subscription, secret, intent))

    try:
        found = await service.run(add)
    except TooManyWebhooks as error:
        raise Problem(409, "too-many-webhooks", str(error)) from error
    return json_response({**(found._asdict() if found else {}), "secret": secret}, 201, _NO_STORE)


@router.get(
    "",
    operation_id="list_webhooks",
    summary="List webhooks",
    responses={200: success("Webhooks")},
    dependencies=[Depends(admin)],
)
async def read_all(request: Request) -> Response:
    """All of them, the oldest first, without their secrets."""
    found = await service_of(request).run(webhooks.all_webhooks)
    return json_response({"webhooks": [one._asdict() for one in found]})


@router.get(
    "/{webhook_id}",
    operation_id="get_webhook",
    dependencies=[Depends(admin)],
    summary="Read a webhook",
    responses={200: success("Webhook"), **openapi.problems(404)},
)
async def read(request: Request, webhook_id: UUID) -> Response:
    return json_response((await _get(service_of(request), webhook_id))._asdict())


@router.delete(
    "/{webhook_id}",
    operation_id="delete_webhook",
    summary="Remove a webhook",
    responses={204: openapi.response("Removed.", {}), **openapi.problems(404)},
    status_code=204,
)
async def delete(request: Request, caller: Admin, webhook_id: UUID) -> Response:
    """Delete a subscription with its history. Its pending deliveries are not sent."""
    intent = _intent(caller, "rm", webhook=webhook_id)
    if not await service_of(request).run(lambda conn: webhooks.delete(conn, webhook_id, intent)):
        _found(None, webhook_id)
    return Response(status_code=204)


@router.post(
    "/{webhook_id}/enable",
    operation_id="enable_webhook",
    summary="Enable a webhook",
    responses={200: success("Webhook"), **openapi.problems(404)},
)
async def enable(request: Request, caller: Admin, webhook_id: UUID) -> Response:
    """Goes on with what is pending for a webhook that was disabled."""
    service = service_of(request)
    intent = _intent(caller, "enable", webhook=webhook_id)
    await service.run(lambda conn: webhooks.enable(conn, webhook_id, intent))
    return json_response((await _get(service, webhook_id))._asdict())


@router.post(
    "/{webhook_id}/rotate",
    operation_id="rotate_webhook_secret",
    summary="Change the secret",
    responses={200: success("Rotated"), **openapi.problems(404)},
    openapi_extra=openapi.body({"application/json": {"schema": ref("Rotation")}}, required=False),
)
async def rotate(request: Request, caller: Admin, webhook_id: UUID) -> Response:
    """Deliveries carry signatures by the new and by the old secret until `previous_valid_until`. The new one is shown this
    once."""
    service = service_of(request)
    intent = _intent(caller, "rotate", webhook=webhook_id)
    secret, overlap_s = parse_rotation(await _json_object(service, request))
    until = await service.run(lambda conn: webhooks.rotate(conn, webhook_id, secret, overlap_s, intent))
    if until is None:
        _found(None, webhook_id)
    return json_response({"id": webhook_id, "secret": secret, "previous_valid_until": until}, headers=_NO_STORE)


@router.post(
    "/{webhook_id}/test",
    operation_id="test_webhook",
    summary="Send a test",
    responses={202: success("Delivery"), **openapi.problems(404, 409)},
    status_code=202,
)
async def send_test(request: Request, caller: Admin, webhook_id: UUID) -> Response:
    """Queues a delivery of type `storage:webhook:test`. The sinks process sends it once; the history shows its outcome."""
    service = service_of(request)
    intent = _intent(caller, "test", webhook=webhook_id)
    delivery_id = await service.run(lambda conn: webhook_deliveries.queue_test(conn, webhook_id, intent, now()))
    if delivery_id is None:
        await _get(service, webhook_id)
        raise _disabled()
    return json_response(await _one(service, webhook_id, delivery_id), 202)


async def _one(service: Service, webhook_id: UUID, delivery_id: UUID) -> dict[str, Any]:
    found = await service.run(lambda conn: webhook_deliveries.history(conn, webhook_id, limit=1, delivery_id=delivery_id))
    if not found:
        raise Problem(404, "not-found", f"the webhook has no delivery {str(delivery_id)!r}")
    return found[0]._asdict()


@router.get(
    "/{webhook_id}/deliveries",
    operation_id="list_webhook_deliveries",
    dependencies=[Depends(admin)],
    summary="List deliveries of a webhook",
    responses={200: success("Deliveries"), **openapi.problems(404)},
)
async def deliveries(
    request: Request,
    webhook_id: UUID,
    state: Annotated[Literal["pending", "delivered", "failed"] | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """The newest first. Those that are settled are kept for some days."""
    service = service_of(request)
    await _get(service, webhook_id)
    found = await service.run(lambda conn: webhook_deliveries.history(conn, webhook_id, limit=limit, state=state))
    return json_response({"deliveries": [one._asdict() for one in found]})


@router.post(
    "/{webhook_id}/deliveries/{delivery_id}/redeliver",
    operation_id="redeliver",
    summary="Send a delivery again",
    responses={202: success("Delivery"), **openapi.problems(404, 409)},
    status_code=202,
)
async def redeliver(request: Request, caller: Admin, webhook_id: UUID, delivery_id: UUID) -> Response:
    """With the same `webhook-id`, after what is pending of its evaluation. One that is pending stays as it is."""
    service = service_of(request)
    intent = _intent(caller, "redeliver", webhook=webhook_id, delivery=delivery_id)
    if not await service.run(lambda conn: webhook_deliveries.redeliver(conn, webhook_id, delivery_id, intent, now())):
        await _check_active(service, webhook_id)
    return json_response(await _one(service, webhook_id, delivery_id), 202)
