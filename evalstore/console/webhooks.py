"""`/console/webhooks`: subscriptions and their deliveries. As in the API, they need the scope admin."""

from uuid import UUID

from evalstore.api.problems import Problem
from evalstore.console import forms
from evalstore.console.pages import Answer, Done, Pages, View
from evalstore.storage import webhook_deliveries
from evalstore.storage import webhooks as stored
from evalstore.storage.webhooks import Webhook
from models.webhooks import now

pages = Pages()
_DELIVERIES = 100
_STATES = ("pending", "delivered", "failed")


@pages.page("/webhooks", "webhooks.html", "Webhooks", key="w")
async def webhooks(view: View) -> Answer:
    """List the subscriptions."""
    forms.require_admin(view)
    return {"webhooks": [one._asdict() for one in await view.service.run(stored.all_webhooks)]}


async def _get(view: View) -> Webhook:
    webhook_id = forms.uuid_of(view, "webhook_id", "webhook")
    found = await view.service.run(lambda conn: stored.get(conn, webhook_id))
    if found is None:
        raise Problem(404, "not-found", f"there is no webhook {webhook_id}")
    return found


@pages.page("/webhooks/{webhook_id}", "webhook.html", "Webhook")
async def webhook(view: View) -> Answer:
    """Show a subscription with its newest deliveries."""
    forms.require_admin(view)
    found, state = await _get(view), view.query("state")
    if state is not None and state not in _STATES:
        raise Problem(422, "invalid", f"state: expected {', '.join(_STATES)}")
    deliveries = await view.service.run(lambda conn: webhook_deliveries.history(conn, found.id, limit=_DELIVERIES, state=state))
    return {**found._asdict(), "deliveries": [one._asdict() for one in deliveries], "chosen": state or "", "states": _STATES}


@pages.action("/webhooks/{webhook_id}/test")
async def test(view: View) -> Done:
    """Queue a test delivery, which is tried once."""
    found = await _get(view)
    intent = view.intent("webhooks test", {"webhook": str(found.id)})
    if await view.service.run(lambda conn: webhook_deliveries.queue_test(conn, found.id, intent, now())) is None:
        raise _disabled()
    return Done(f"/console/webhooks/{found.id}", "A test is queued: the sinks process sends it once.")


@pages.action("/webhooks/{webhook_id}/enable")
async def enable(view: View) -> Done:
    """Deliver again to a disabled subscription."""
    found = await _get(view)
    intent = view.intent("webhooks enable", {"webhook": str(found.id)})
    await view.service.run(lambda conn: stored.enable(conn, found.id, intent))
    return Done(f"/console/webhooks/{found.id}", "The webhook is active: it goes on with what is pending.")


@pages.action("/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver")
async def redeliver(view: View) -> Done:
    """Send a settled delivery again."""
    found = await _get(view)
    delivery_id: UUID = forms.uuid_of(view, "delivery_id", "delivery")
    intent = view.intent("webhooks redeliver", {"webhook": str(found.id), "delivery": str(delivery_id)})
    if not await view.service.run(lambda conn: webhook_deliveries.redeliver(conn, found.id, delivery_id, intent, now())):
        if found.state != "active":
            raise _disabled()
        raise Problem(409, "changed", "the delivery is pending already, or gone")
    return Done(f"/console/webhooks/{found.id}", "The delivery is sent again.")


def _disabled() -> Problem:
    return Problem(409, "webhook-disabled", "the webhook is disabled: enable it first")
