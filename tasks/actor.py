"""The actor that stores events, seen from the sender: what is wrong with an event shows here, before anything is sent."""

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
from models.settings import settings
from models.threads import once_at_a_time, raise_if_ending
from tasks import uploads

if TYPE_CHECKING:
    from tasks.broker import SendingBroker

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
        return _broker()

    def send_with_options(self, **given: Any) -> Message[None]:
        """Send one event. Raises what `message_with_options` and `Broker.enqueue` raise, and SendRefused."""
        _refuse_if_too_late()
        try:
            return super().send_with_options(**given)
        except BaseException as error:  # Pydantic raises no Exception where it can import nothing more
            raise_if_ending(error)
            raise

    def message_with_options(
        self, *, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, **options: Any
    ) -> Message[None]:
        """The message for one event; its large content is in the object store.

        Raises InvalidEvent, which names every wrong field, or ObjectStoreOutage (send it again).
        """
        given = [*args, *(kwargs or {}).values()]
        if len(given) != 1 or set(kwargs or {}) - {"event"}:
            raise InvalidEvent([Fault("event", f"{self.actor_name} takes one event, as its one positional argument")])
        event, _ = _completed(given[0])
        uploads.offload([event])
        return self.message_of(event, options)

    def message_of(
        self, event: dict[str, Any], options: dict[str, Any] | None = None, *, at_ms: int | None = None, is_small: bool = False
    ) -> Message[None]:
        """The message for an event as it travels. `is_small`: it is known to have nothing that travels better as base64."""
        if not is_small:
            _escape_less(event)
        at_ms = int(time.time() * 1000) if at_ms is None else at_ms
        # The message goes by the event's id, as an event without one goes by its message's.
        return Message(self.queue_name, self.actor_name, (event,), {}, options or {}, event["event_id"], at_ms)


@cache
def _loaded() -> "Callable[[], SendingBroker]":
    """Import redis. Raises SendRefused if this thread is importing it, or cannot any more."""
    with once_at_a_time("load redis"):
        from tasks.broker import broker
    return broker


def _refuse_if_too_late() -> None:
    """Raise SendRefused for a first event after the interpreter took its modules apart: pydantic would panic."""
    if sys.is_finalizing() and not _loaded.cache_info().currsize:
        raise SendRefused("the interpreter has ended: send the first event earlier, or from another process")


def _broker() -> "SendingBroker":
    return _loaded()()


def _not_here(_event: object) -> NoReturn:
    raise RuntimeError("this process is no worker: send the event with store_evaluation.send(event)")


def _completed(data: Mapping[str, Any] | Event) -> tuple[dict[str, Any], bytes | None]:
    """`data` as it travels: checked, with its `event_id` and `occurred_at`, without nulls, as JSON has it.

    Also written as JSON, where that was done already and nothing of it is so large that it will travel in another form.
    """
    read = settings()
    most = read.max_content_bytes
    if type(data) is dict:
        if "event_id" in data and "occurred_at" in data:
            travelling = data.copy()
        else:
            travelling = {"event_id": str(uuid7()), "occurred_at": rfc3339(datetime.now(UTC)), **data}
        # Nearly all that is sent: tests/unit/test_wire.py compares it with what follows.
        if (found := check_and_encode(travelling, max_content_bytes=most)) is not None:
            at, written = found
            if len(written) > _SMALL:
                uploads.check_sizes(travelling)
            if not _is_ours(travelling["occurred_at"]):
                travelling["occurred_at"] = rfc3339(at)
            elif len(written) <= min(_SMALL, read.inline_limit_bytes):
                return travelling, written
            if metadata := travelling.get("metadata"):
                # A generator may fill the same object for its next event before this event is encoded.
                travelling["metadata"] = metadata.copy()
            return travelling, None
        data = travelling
    event = check(data, max_content_bytes=most)
    # The checked values, not the given ones: an encoder writes a Decimal as text.
    travelling = {
        name: value._asdict() if isinstance(value, content.Reference) else value
        for name, value in event.__dict__.items()
        if name in event.model_fields_set
    }
    travelling["event_id"] = str(event.event_id or uuid7())
    travelling["occurred_at"] = rfc3339(event.occurred_at or datetime.now(UTC))
    uploads.check_sizes(travelling)
    return travelling, None


def _named(event: object) -> str:
    """The end of a fault's text: the evaluation of an event that may be wrong in any way."""
    eval_id, _ = identity(event if isinstance(event, Mapping) else getattr(event, "__dict__", {}))
    return "" if eval_id is None else f" (eval_id {eval_id})"


def _is_ours(at: str) -> bool:
    """Whether a time, in its usual form, is as `rfc3339` writes it; to write it takes longer."""
    return at[-1] == "Z" and (len(at) == 20 or (len(at) == 27 and not at.endswith(".000000Z")))


def _escape_less(travelling: dict[str, Any]) -> None:
    """JSON writes some characters as six: larger content of such travels as base64."""
    for name in CONTENT_FIELDS[travelling["type"]]:
        text = travelling.get(name)
        if text is not None and len(text) > _SMALL:
            data_bytes = content.to_bytes(text)
            if len(json.dumps(text)) > len(data_bytes) * 4 / 3:
                del travelling[name]
                travelling[f"{name}_b64"] = base64.b64encode(data_bytes).decode()


store_evaluation = EventActor(ACTOR, QUEUE)


def store_evaluations(events: Iterable[Mapping[str, Any] | Event], *, durable: bool = False) -> list[Message[None]]:
    """Send all of `events` together, or none. All are checked before anything is put into the object store, and that
    holds their large content before any is sent. With `durable` this returns only when the append-only file is on disk or a
    replica has it.

    Raises InvalidEvent, whose faults name each event by its position (`[3].exit_code`) and its `eval_id`, ObjectStoreOutage
    (none was sent), or RedisOutage: then none was sent, or, where only the answer was lost, all were; the same events may be
    sent again, as each is stored once. With EVALSTORE_SPOOL_DIR, what Redis does not take is kept there, all or none, and this
    returns; SpoolFull if it has no room. What is `durable` is never kept there; NotDurable where Redis alone has it.
    """
    if not isinstance(events, Iterable) or isinstance(events, str | Mapping | BaseModel):
        raise InvalidEvent([Fault("events", f"expected a list of events, not {type(events).__name__}")])
    _refuse_if_too_late()
    travelling, written, faults = [], [], []
    for position, event in enumerate(events):
        try:
            one, text = _completed(event)
        except InvalidEvent as error:
            of = _named(event)
            faults += [Fault(f"[{position}].{fault.field}", fault.problem + of) for fault in error.faults]
        else:
            travelling.append(one)
            written.append(text)
    if faults:
        raise InvalidEvent(faults)
    try:
        uploads.offload(travelling)
        now_ms = int(time.time() * 1000)
        messages = [
            store_evaluation.message_of(one, at_ms=now_ms, is_small=text is not None)
            for one, text in zip(travelling, written, strict=True)
        ]
        _broker().enqueue_many(messages, events=written, durable=durable)
    except BaseException as error:
        raise_if_ending(error)
        raise
    return messages
