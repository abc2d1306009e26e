"""Decode Dramatiq messages, and describe the cause of a dead letter."""

import json
import socket
import traceback
from typing import Any

import msgspec
from dramatiq import Message
from dramatiq.errors import ActorNotFound

from models.errors import Fault, InvalidEvent
from models.events import decode, identified, parse
from models.fast_decode import decode_message
from models.record import EventRow, to_row
from tasks.actor import ACTOR
from tasks.tracing import release


class _Envelope(msgspec.Struct):
    queue_name: str
    actor_name: str
    args: list[Any]
    kwargs: dict[str, Any]
    options: dict[str, Any]
    message_id: str
    message_timestamp: float


_DECODER = msgspec.json.Decoder(_Envelope)


def read_envelope(body: bytes) -> Message[Any]:
    """Decode a Dramatiq message. Raises InvalidEvent, which names the wrong fields."""
    try:
        given = _DECODER.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        # msgspec refuses lone surrogates, which `decode` accepts.
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


# Dramatiq's worker and middleware compute with these options: a value of another type would end their thread.
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


def read_message(body: bytes, max_content_bytes: int) -> EventRow:
    """Return the event in a message as a row of the log. Raises InvalidEvent, ActorNotFound."""
    return decode_message(body, max_content_bytes=max_content_bytes) or parse_message(body, max_content_bytes)


def parse_message(
    body: bytes, max_content_bytes: int, traceparents: dict[bytes, Any] | None = None, redis_id: bytes = b""
) -> EventRow:
    """Return the event in a message that `decode_message` left to the slow path. `traceparents` is as in `decode_message`.

    Raises InvalidEvent, ActorNotFound.
    """
    message = read_envelope(body)
    if traceparents is not None:
        traceparents[redis_id] = message.options.get("traceparent")
    if message.actor_name != ACTOR:
        raise ActorNotFound(message.actor_name)
    if len(message.args) != 1 or message.kwargs or not isinstance(message.args[0], dict):
        raise InvalidEvent([Fault("message.args", "expected one event, a JSON object, as the one positional argument")])
    given = identified(message.args[0], message.message_id, message.message_timestamp)
    event = parse(given, max_content_bytes=max_content_bytes)
    if event.type == "evaluation:lost":
        raise InvalidEvent([Fault("type", "evaluation:lost is written by the system alone")])
    return to_row(event)


def cause(error: BaseException) -> bytes:
    """Return the cause of a dead letter as JSON: class, message and traceback of `error`, host and release."""
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
    """Return `text` without characters that UTF-8 or PostgreSQL refuses. Shorten a long text in the middle."""
    text = text.encode(errors="backslashreplace").decode().replace("\0", "\\x00")
    return text if len(text) <= limit else f"{text[: limit // 2]}\n[...]\n{text[-limit // 2 :]}"
