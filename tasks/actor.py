"""The actor that stores events, as a sender sees it: it checks each event before it sends any."""

import base64
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from dramatiq import Actor, Broker, Message
from dramatiq.logging import get_logger
from pydantic import BaseModel
from uuid_utils import uuid7

from models import content
from models.errors import Fault, InvalidEvent, SendRefused
from models.events import CONTENT_FIELDS, Event, check, identity
from models.fast_decode import check_and_encode
from models.record import rfc3339
from models.settings import Settings
from models.threads import once_at_a_time, raise_if_ending
from tasks import uploads
from tasks.keys import QUEUE

if TYPE_CHECKING:
    from tasks.broker import GatewayBroker

ACTOR = "store_evaluation"

# Content up to this size travels as text, even where JSON escapes make base64 shorter.
_SMALL_BYTES = 64 * 1024


class EventActor(Actor[[Mapping[str, Any] | Event], None]):
    """An actor that checks and completes one event for each message.

    It asks for its broker at the first send. Importing redis at once would double the time to import `tasks`.
    """

    def __init__(self, actor_name: str, queue_name: str) -> None:  # the base class's constructor requires a broker
        self.actor_name, self.queue_name = actor_name, queue_name
        self.fn = _refuse_to_run
        self.priority = 0
        self.options: dict[str, Any] = {}
        self.logger = get_logger("tasks", actor_name)

    @property
    def broker(self) -> Broker:  # type: ignore[override]
        return _broker()

    def send_with_options(self, **options: Any) -> Message[None]:
        """Send one event. Raises SendRefused, and the errors of `message_with_options` and `SendingBroker.enqueue`."""
        _refuse_at_exit()
        try:
            return super().send_with_options(**options)
        except BaseException as error:  # at exit, pydantic raises a BaseException when it cannot import
            raise_if_ending(error)
            raise

    def message_with_options(
        self, *, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, **options: Any
    ) -> Message[None]:
        """Build the message for one event, after large content is in the object store.

        Raises InvalidEvent, which names every wrong field, or ObjectStoreOutage (send the event again).
        """
        values = [*args, *(kwargs or {}).values()]
        if len(values) != 1 or set(kwargs or {}) - {"event"}:
            raise InvalidEvent([Fault("event", f"{self.actor_name} takes one event, as its one positional argument")])
        broker = _broker()
        event, _ = _complete(values[0], broker.settings)
        broker.uploader.offload([event])
        return self.build_message(event, options)

    def build_message(
        self, event: dict[str, Any], options: dict[str, Any] | None = None, *, at_ms: int | None = None, is_small: bool = False
    ) -> Message[None]:
        """Build the message for a completed event. `is_small` says that its content is too small for base64."""
        if not is_small:
            _encode_escaped_content(event)
        at_ms = int(time.time() * 1000) if at_ms is None else at_ms
        # The message takes the event's id. A worker does the reverse for an event without an id.
        return Message(self.queue_name, self.actor_name, (event,), {}, options or {}, event["event_id"], at_ms)


@cache
def _load_broker() -> "Callable[[], GatewayBroker]":
    """Import redis. Raises SendRefused while this thread imports it already, and at the interpreter's end."""
    with once_at_a_time("load redis"):
        from tasks.broker import broker
    return broker


def _refuse_at_exit() -> None:
    """Raise SendRefused if the interpreter has cleared its modules before the first event: pydantic would panic."""
    if sys.is_finalizing() and not _load_broker.cache_info().currsize:
        raise SendRefused("the interpreter has ended: send the first event earlier, or from another process")


def _broker() -> "GatewayBroker":
    broker = _load_broker()()
    if ACTOR not in broker.actors:
        broker.declare_actor(store_evaluation)
    return broker


def _refuse_to_run(_event: object) -> NoReturn:
    raise RuntimeError("this process is no worker: send the event with store_evaluation.send(event)")


def _complete(data: Mapping[str, Any] | Event, settings: Settings) -> tuple[dict[str, Any], bytes | None]:
    """Check an event. Return it with `event_id` and `occurred_at`, without nulls, in JSON's types.

    The second result is the event as JSON, or None if content may still change its form.
    """
    max_bytes, has_store = settings.max_content_bytes, settings.object_store_url is not None
    if type(data) is dict:
        if "event_id" in data and "occurred_at" in data:
            completed = data.copy()
        else:
            completed = {"event_id": str(uuid7()), "occurred_at": rfc3339(datetime.now(UTC)), **data}
        # The fast path serves nearly all events. tests/unit/test_wire.py compares it with the slow path below.
        if (decoded := check_and_encode(completed, max_content_bytes=max_bytes)) is not None:
            occurred_at, encoded = decoded
            if len(encoded) > _SMALL_BYTES and not has_store:
                uploads.check_sizes(completed)
            if not _is_rfc3339_form(completed["occurred_at"]):
                completed["occurred_at"] = rfc3339(occurred_at)
            elif len(encoded) <= min(_SMALL_BYTES, settings.inline_limit_bytes):
                return completed, encoded
            if metadata := completed.get("metadata"):
                # A generator may reuse its metadata object for the next event before this event is encoded.
                completed["metadata"] = metadata.copy()
            return completed, None
        data = completed
    event = check(data, max_content_bytes=max_bytes)
    # Send the checked values: the encoder would write a Decimal of the caller as text.
    completed = {
        name: value._asdict() if isinstance(value, content.Reference) else value
        for name, value in event.__dict__.items()
        if name in event.model_fields_set
    }
    completed["event_id"] = str(event.event_id or uuid7())
    completed["occurred_at"] = rfc3339(event.occurred_at or datetime.now(UTC))
    if not has_store:
        uploads.check_sizes(completed)
    return completed, None


def _eval_id_suffix(event: object) -> str:
    """Return ` (eval_id X)` for the text of a fault, or nothing if the event has no valid eval_id."""
    eval_id, _ = identity(event if isinstance(event, Mapping) else getattr(event, "__dict__", {}))
    return "" if eval_id is None else f" (eval_id {eval_id})"


def _is_rfc3339_form(time_text: str) -> bool:
    """Return whether a valid time is written as `rfc3339` writes it. Formatting it again would take longer."""
    return time_text[-1] == "Z" and (len(time_text) == 20 or (len(time_text) == 27 and not time_text.endswith(".000000Z")))


def _encode_escaped_content(event: dict[str, Any]) -> None:
    """Encode large content as base64 if its JSON escapes, of 6 characters each, would take more space."""
    for name in CONTENT_FIELDS[event["type"]]:
        text = event.get(name)
        if text is not None and len(text) > _SMALL_BYTES:
            data = content.to_bytes(text)
            if len(json.dumps(text)) > len(data) * 4 / 3:
                del event[name]
                event[f"{name}_b64"] = base64.b64encode(data).decode()


store_evaluation = EventActor(ACTOR, QUEUE)


def store_evaluations(events: Iterable[Mapping[str, Any] | Event], *, durable: bool = False) -> list[Message[None]]:
    """Check all of `events`, upload their large content, then send all of them or none.

    With `durable`, return only after the append-only file is on disk or a replica has the events.

    Raises InvalidEvent, whose faults name each event by its position (`[3].exit_code`) and its `eval_id`: nothing was sent.
    Raises ObjectStoreOutage: nothing was sent. Raises RedisOutage: none was sent, or all were and the reply was lost.
    Send the same events again after an outage; each is stored once.
    With EVALSTORE_SPOOL_DIR, the spool takes the events that Redis does not, all or none; SpoolFull if it has no room.
    The spool never takes durable events. Raises NotDurable if only Redis' memory holds them.
    """
    if not isinstance(events, Iterable) or isinstance(events, str | Mapping | BaseModel):
        raise InvalidEvent([Fault("events", f"expected a list of events, not {type(events).__name__}")])
    _refuse_at_exit()
    completed: list[dict[str, Any]] = []
    encoded: list[bytes | None] = []
    faults: list[Fault] = []
    broker = _broker()
    for position, event in enumerate(events):
        try:
            data, json_bytes = _complete(event, broker.settings)
        except InvalidEvent as error:
            suffix = _eval_id_suffix(event)
            faults += [Fault(f"[{position}].{fault.field}", fault.problem + suffix) for fault in error.faults]
        else:
            completed.append(data)
            encoded.append(json_bytes)
    if faults:
        raise InvalidEvent(faults)
    try:
        broker.uploader.offload(completed)
        now_ms = int(time.time() * 1000)
        messages = [
            store_evaluation.build_message(data, at_ms=now_ms, is_small=json_bytes is not None)
            for data, json_bytes in zip(completed, encoded, strict=True)
        ]
        broker.enqueue_many(messages, events=encoded, durable=durable)
    except BaseException as error:
        raise_if_ending(error)
        raise
    return messages
