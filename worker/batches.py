"""What a consumer hands to an actor: the messages it fetched together, and what is to become of each."""

import json
import socket
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
from dramatiq import Message

from models.errors import Fault, InvalidEvent
from models.events import decode
from tasks.redrives import REDRIVEN
from tasks.tracing import release


class Delivery(NamedTuple):
    """One message as it was fetched."""

    redis_id: bytes
    body: bytes

    @property
    def is_redriven(self) -> bool:
        """Whether an operator sent it again."""
        return self.redis_id.startswith(REDRIVEN)


@dataclass(slots=True)
class Batch:
    """Deliveries for one call of an actor. All are acknowledged after it but those it buried, and those that are to come again
    `later` (in so many ms), or go back if `returned`."""

    deliveries: list[Delivery]
    buried: dict[bytes, bytes] = field(default_factory=dict)
    later: dict[bytes, int] = field(default_factory=dict)
    returned: bool = False

    def __iter__(self) -> Iterator[Delivery]:
        return iter(self.deliveries)

    def __len__(self) -> int:
        return len(self.deliveries)

    def __repr__(self) -> str:
        return f"<batch of {len(self.deliveries)}>"


class _Envelope(msgspec.Struct):
    """A Dramatiq message as JSON."""

    queue_name: str
    actor_name: str
    args: list[Any]
    kwargs: dict[str, Any]
    options: dict[str, Any]
    message_id: str
    message_timestamp: float


_DECODER = msgspec.json.Decoder(_Envelope)


def read(body: bytes) -> Message[Any]:
    """The Dramatiq message in `body`. Raises InvalidEvent, which says what is wrong with it."""
    try:
        given = _DECODER.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        # With lone surrogates, or not a message at all.
        fields = decode(body)
        try:
            given = msgspec.convert(fields, _Envelope)
        except msgspec.ValidationError as error:
            raise InvalidEvent([Fault("message", str(error))]) from None
    if faults := _option_faults(given.options):
        raise InvalidEvent(faults)
    return Message(
        given.queue_name,
        given.actor_name,
        tuple(given.args),
        given.kwargs,
        given.options,
        given.message_id,
        int(given.message_timestamp),
    )


# The options that Dramatiq's worker and middleware compute with: of another type they would end the thread that meets them.
_OPTIONS: dict[str, tuple[type, ...]] = {
    "retries": (int,),
    "max_retries": (int, type(None)),
    "min_backoff": (int, type(None)),
    "max_backoff": (int, type(None)),
    "requeue_timestamp": (int, float),
    "eta": (int, float, type(None)),
    "traceback": (str,),
    "throws": (),
    "on_retry_exhausted": (str, type(None)),
    "pipe_target": (dict, type(None)),
    "on_success": (str, type(None)),
    "on_failure": (str, type(None)),
}


def _option_faults(options: dict[str, Any]) -> list[Fault]:
    return [
        Fault(f"message.options.{name}", f"not a value that {name} can have: {json.dumps(options[name])[:100]}")
        for name in options.keys() & _OPTIONS.keys()
        if not isinstance(options[name], _OPTIONS[name]) or isinstance(options[name], bool)
    ]


def cause(error: BaseException) -> bytes:
    """Why something became a dead letter, as JSON: the class, the message and the traceback of what happened last."""
    return msgspec.json.encode(
        {
            "error_class": type(error).__name__,
            "error_message": _printable(str(error), 2_000),
            "traceback": _printable("".join(traceback.format_exception(error)), 16_000),
            "host": socket.gethostname(),
            "release": release(),
        }
    )


def _printable(text: str, limit: int) -> str:
    """`text` as UTF-8 can hold it, its beginning and its end where it is long."""
    text = text.encode(errors="backslashreplace").decode().replace("\0", "\\x00")
    return text if len(text) <= limit else f"{text[: limit // 2]}\n[...]\n{text[-limit // 2 :]}"
