"""Answer `Prefer: respond-async` (RFC 7240): send an event to the queue without waiting until it is stored."""

from typing import Final

from starlette.responses import Response

from evalstore.api.access import Caller
from evalstore.api.rendering import json_response, path_of
from evalstore.api.service import Service
from evalstore.storage.conditional import WriteRequest
from tasks import store_evaluation

APPLIED: Final = {"Preference-Applied": "respond-async"}


def is_preferred(prefer: str | None, caller: Caller) -> bool:
    """Tell whether to answer as a Prefer header with respond-async asks.

    A restricted caller's events are checked when they are stored, so that caller waits for it. A preference is no command.
    """
    return not caller.visibility.is_restricted and any(
        preference.partition(";")[0].strip().lower() == "respond-async" for preference in (prefer or "").split(",")
    )


async def send(service: Service, request: WriteRequest) -> Response:
    """Send the event of `request` to the queue, and return the answer 202. Raises RedisOutage."""
    (event,) = await service.thread(lambda: service.event_times.for_queue([request]))
    await service.thread(lambda: store_evaluation.send(event))
    service.metrics.events("accepted")
    accepted = {"eval_id": event.eval_id, "event_id": event.event_id, "status": "accepted"}
    return json_response(accepted, 202, {"Location": path_of(event.eval_id), **APPLIED})
