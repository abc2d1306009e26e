"""The actor that stores events, seen from the sender: what is wrong with an event shows here, before anything is sent."""

import base64
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, NoReturn

from dramatiq import Actor, Broker, Message
from dramatiq.logging import get_logger
from uuid_utils import uuid7

from models import content
from models.errors import Fault, InvalidEvent
from models.events import CONTENT_FIELDS, Event, check
from models.settings import settings

QUEUE = "evaluations"
ACTOR = "store_evaluation"

# Below this an event's JSON is small whatever it escapes to.
_SMALL = 64 * 1024


class EventActor(Actor[[Mapping[str, Any] | Event], None]):
    """An actor whose messages carry one event each, checked and completed by the sender.

    It is bound to its broker at its first use, not when it is imported: importing redis takes longer than all the rest.
    """

    def __init__(self, actor_name: str, queue_name: str) -> None:  # the base class would want a broker
        self.actor_name, self.queue_name = actor_name, queue_name
        self.fn = _not_here
        self.priority = 0
        self.options: dict[str, Any] = {}
        self.logger = get_logger("tasks", actor_name)

    @property
    def broker(self) -> Broker:  # type: ignore[override]
        from tasks.broker import broker

        return broker()

    def message_with_options(
        self, *, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, **options: Any
    ) -> Message[None]:
        """The message for one event. Raises InvalidEvent, which names every wrong field."""
        given = [*args, *(kwargs or {}).values()]
        if len(given) != 1 or set(kwargs or {}) - {"event"}:
            raise InvalidEvent([Fault("event", f"{self.actor_name} takes one event, as its one positional argument")])
        event = _completed(given[0])
        # The message goes by the event's id, as an event without one goes by its message's.
        return Message(self.queue_name, self.actor_name, (event,), {}, options, event["event_id"])


def _not_here(_event: object) -> NoReturn:
    raise RuntimeError("this process is no worker: send the event with store_evaluation.send(event)")


def _completed(data: Mapping[str, Any] | Event) -> dict[str, Any]:
    """`data` as it travels: checked, with its `event_id` and `occurred_at`, without nulls, as JSON that Redis can hold."""
    event = check(data, max_content_bytes=settings().max_content_bytes)
    given = data if isinstance(data, Mapping) else event.model_dump()
    travelling = {name: value for name, value in given.items() if value is not None}
    travelling["event_id"] = str(event.event_id or uuid7())
    occurred_at = event.occurred_at or datetime.now(UTC)
    travelling["occurred_at"] = occurred_at.isoformat().replace("+00:00", "Z")
    for name in CONTENT_FIELDS[event.type]:
        text = travelling.get(name)
        # JSON writes some characters as six: such content travels as base64, so that 100 MiB of it stay below the 512 MB that
        # Redis takes (https://redis.io/docs/latest/develop/data-types/strings/).
        if text is not None and len(text) > _SMALL:
            data_bytes = content.to_bytes(text)
            if len(json.dumps(text)) > len(data_bytes) * 4 / 3:
                del travelling[name]
                travelling[f"{name}_b64"] = base64.b64encode(data_bytes).decode()
    return travelling


store_evaluation = EventActor(ACTOR, QUEUE)


def store_evaluations(events: Iterable[Mapping[str, Any] | Event]) -> list[Message[None]]:
    """Send all of `events` in one round trip, or none.

    Raises InvalidEvent, whose faults name each event by its position (`[3].exit_code`), or RedisOutage: then none was sent,
    or, where only the answer was lost, all were; the same events may be sent again, as each is stored once. With
    EVALSTORE_SPOOL_DIR, what Redis does not take is kept there, all or none, and this returns; SpoolFull if it has no room.
    """
    messages, faults = [], []
    for position, event in enumerate(events):
        try:
            messages.append(store_evaluation.message(event))
        except InvalidEvent as error:
            faults += [Fault(f"[{position}].{fault.field}", fault.problem) for fault in error.faults]
    if faults:
        raise InvalidEvent(faults)
    from tasks.broker import broker

    broker().enqueue_many(messages)
    return messages
