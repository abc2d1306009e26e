"""The messages of dead letters: read, export, edit and compare them. No SQL."""

import base64
import difflib
import json
from collections.abc import Callable, Mapping
from typing import Any, Final
from uuid import UUID

import msgspec

from evalstore.storage.dead_letters import Edited
from models.errors import Fault, InvalidEvent
from models.events import decode, identified, identity, parse

_LONGEST_LINE: Final = 400
_RECORDED_LINES: Final = 100
_KINDS: Final = {"queue_name": str, "actor_name": str, "args": list, "kwargs": dict, "options": dict, "message_id": str}


def message_of(dead_letter: Mapping[str, Any]) -> Any:
    """Decode the message of a dead letter. Raises InvalidEvent if it is no JSON."""
    return decode(dead_letter["message"])


def pretty(message: object) -> str:
    """Format JSON for reading and editing."""
    return json.dumps(message, indent=2, ensure_ascii=False)


def export_line(dead_letter: Mapping[str, Any], to_json: Callable[[Any], str]) -> str:
    """Encode a dead letter as a line of JSON, with its message in base64, and decoded if possible."""
    fields = {name: value for name, value in dead_letter.items() if name != "message"}
    fields["message_b64"] = base64.b64encode(dead_letter["message"]).decode()
    try:
        return to_json(fields | {"message": message_of(dead_letter)})
    except (InvalidEvent, ValueError, OverflowError, RecursionError):
        return to_json(fields | {"message": None})


def edited(before: bytes, message: Any, actor_name: str, max_content_bytes: int) -> Edited:
    """Encode an edited message. `actor_name` is the actor that stores events.

    Raises InvalidEvent with the faults that a worker would report.
    """
    if not isinstance(message, dict):
        raise InvalidEvent([Fault("message", "expected a JSON object")])
    faults = [
        Fault(f"message.{name}", f"expected {kind.__name__}")
        for name, kind in _KINDS.items()
        if not isinstance(message.get(name), kind)
    ]
    if not isinstance(message.get("message_timestamp"), int | float) or isinstance(message["message_timestamp"], bool):
        faults.append(Fault("message.message_timestamp", "expected a number"))
    if faults:
        raise InvalidEvent(faults)
    eval_id: str | None = None
    event_id: UUID | None = None
    if message["actor_name"] == actor_name:
        args = message["args"]
        if len(args) != 1 or message["kwargs"] or not isinstance(args[0], dict):
            raise InvalidEvent([Fault("message.args", "expected one event, a JSON object, as the one positional argument")])
        event = identified(args[0], message["message_id"], message["message_timestamp"])
        if parse(event, max_content_bytes=max_content_bytes).type == "evaluation:lost":
            raise InvalidEvent([Fault("type", "evaluation:lost is written by the system alone")])
        eval_id, event_id = identity(event)
    try:
        body = msgspec.json.encode(message)
    except (UnicodeEncodeError, OverflowError):
        body = json.dumps(message).encode()
    return Edited(before, body, message["actor_name"], eval_id, event_id)


def difference(old: Any, new: Any) -> list[str]:
    """Return the lines of a unified diff of two messages, each cut to 400 characters."""
    lines = difflib.unified_diff(_lines(old), _lines(new), "dead letter", "edited", lineterm="", n=2)
    return [line[:_LONGEST_LINE] for line in lines]


def _lines(message: Any) -> list[str]:
    return (message if isinstance(message, str) else pretty(message)).splitlines()


def recorded(diff: list[str]) -> list[str]:
    """Return the part of a diff that `operator_actions` keeps."""
    return [line.replace("\0", "") for line in diff[:_RECORDED_LINES]]
