"""The bridge's file (EVALSTORE_BRIDGE_FILE, TOML), and how it makes an event of a message."""

import os
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal
from uuid import NAMESPACE_URL, uuid5

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from models.errors import Fault, InvalidEvent, InvalidSettings
from models.events import decode
from models.fields import CONTENTS, FIELDS, SENT
from models.record import rfc3339
from models.validation_errors import did_you_mean, format_error

_MILLISECONDS_FROM: Final = 1e11  # A larger number is milliseconds: in seconds it would be after the year 5138.
_ALIASES: Final = {"evaluation:running": "evaluation:started"}
TYPES: Final = {**{f"evaluation:{name}": f"evaluation:{name}" for name in SENT}, **_ALIASES}


def _names_of(type_: str) -> frozenset[str]:
    own = [field.name for field in FIELDS if type_ in field.events]
    forms = [f"{name}_{form}" for name in own if name in CONTENTS for form in ("b64", "ref")]
    return frozenset([*own, *forms])


_FIELDS: Final = {f"evaluation:{type_}": _names_of(type_) for type_ in SENT}
_ALL_FIELDS: Final = frozenset({"type"}.union(*_FIELDS.values()))


class Mapped(BaseModel):
    """The keys of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    url: str | None = None
    url_env: str | None = None
    url_file: Path | None = None
    channels: list[str] = Field(default=["evaluation:*"], min_length=1)
    types: dict[str, str] = {}
    fields: dict[str, str | dict[str, str]] = {}
    rest: Literal["metadata", "drop"] = "metadata"

    @field_validator("url")
    @classmethod
    def _holds_no_password(cls, value: str | None) -> str | None:
        if value is not None and "@" in value:
            raise ValueError("a password stands in no file: give url_env or url_file")
        return value

    @field_validator("types")
    @classmethod
    def _names_types(cls, value: dict[str, str]) -> dict[str, str]:
        if wrong := [type_ for type_ in value.values() if type_ not in TYPES]:
            raise ValueError(f"there is no type {wrong[0]}{did_you_mean(wrong[0], list(TYPES))}")
        return value

    @field_validator("fields")
    @classmethod
    def _names_fields(cls, value: dict[str, str | dict[str, str]]) -> dict[str, str | dict[str, str]]:
        for name, path in value.items():
            allowed = _ALL_FIELDS if isinstance(path, str) else _FIELDS.get(TYPES.get(name, ""), frozenset())
            names = [name] if isinstance(path, str) else list(path)
            if not isinstance(path, str) and not allowed:
                raise ValueError(f"there is no type {name}{did_you_mean(name, list(TYPES))}")
            if wrong := [one for one in names if one not in allowed]:
                raise ValueError(f"there is no field {wrong[0]}{did_you_mean(wrong[0], list(allowed))}")
        return value

    def source_url(self, otherwise: str) -> str:
        """Return the address of the Redis to listen to. Raises InvalidSettings if it is not where the file says."""
        if self.url_env is not None:
            if not os.environ.get(self.url_env):
                raise InvalidSettings(f"EVALSTORE_BRIDGE_FILE: url_env: the environment variable {self.url_env} is not set")
            return os.environ[self.url_env]
        if self.url_file is not None:
            try:
                return self.url_file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise InvalidSettings(f"EVALSTORE_BRIDGE_FILE: url_file: {self.url_file} cannot be read: {error}") from error
        return self.url or otherwise


def load(path: Path | None) -> Mapped:
    """Read the file; without one, listen to `evaluation:*` of EVALSTORE_REDIS_URL. Raises InvalidSettings with all faults."""
    if path is None:
        return Mapped()
    try:
        return Mapped.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidSettings(f"EVALSTORE_BRIDGE_FILE: {path}: {getattr(error, 'strerror', None) or error}") from error
    except ValidationError as error:
        faults = [f"EVALSTORE_BRIDGE_FILE: {path}: {_fault(fault)}" for fault in error.errors()]
        raise InvalidSettings("\n".join(faults)) from error


def _fault(fault: Any) -> str:
    key = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"{key}: there is no such key{did_you_mean(key, list(Mapped.model_fields))}"
    return f"{key}: {format_error(fault)}"


def event_id_of(channel: str, payload: bytes) -> str:
    """Return the id of the event in a message that names none: every copy of the bridge gives the same one."""
    return str(uuid5(NAMESPACE_URL, f"evalstore:bridge:{channel}:{payload.decode('latin-1')}"))


def to_event(mapped: Mapped, channel: str, payload: bytes) -> dict[str, Any]:
    """Make an event of a message, unchecked, with an `event_id`; `occurred_at` may be missing.

    Members that no field takes become metadata. Raises InvalidEvent.
    """
    document = decode(payload, "payload")
    if not isinstance(document, dict):
        raise InvalidEvent([Fault("payload", f"expected a JSON object, not {type(document).__name__}")])
    type_ = _type(mapped, channel, document)
    paths = {name: path for name, path in mapped.fields.items() if isinstance(path, str)}
    for name, own in mapped.fields.items():
        if not isinstance(own, str) and TYPES[name] == type_:
            paths |= own
    event: dict[str, Any] = {"type": type_}
    for name in _FIELDS[type_]:
        value = _take(document, paths.get(name, name))
        if value is not None:
            event[name] = value
    if document and mapped.rest == "metadata" and isinstance(event.get("metadata", {}), dict):
        event["metadata"] = {**document, **event.get("metadata", {})}
    event["occurred_at"] = _time(event.get("occurred_at"))
    event.setdefault("event_id", event_id_of(channel, payload))
    return {name: value for name, value in event.items() if value is not None}


def _type(mapped: Mapped, channel: str, document: dict[str, Any]) -> str:
    path = mapped.fields.get("type", "type")
    given = _take(document, path) if isinstance(path, str) else None
    named = mapped.types.get(channel) or (given if isinstance(given, str) else None)
    for name in (named and mapped.types.get(named, named), channel):
        if name in TYPES:
            return TYPES[name]
    raise InvalidEvent([Fault("type", f"the channel {channel} and its payload name no type of event: name it in [types]")])


def _take(document: dict[str, Any], path: str) -> Any:
    """Remove a member and return it: by its name, or by names with dots between for members of members."""
    if path in document:
        return document.pop(path)
    name, _, rest = path.partition(".")
    inner = document.get(name)
    if not rest or not isinstance(inner, dict):
        return None
    value = _take(inner, rest)
    if not inner:
        del document[name]
    return value


def _time(value: Any) -> Any:
    """Return a Unix time, in seconds or milliseconds, in RFC 3339. Other values come back unchanged."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return value
    try:
        return rfc3339(datetime.fromtimestamp(value / 1000 if abs(value) >= _MILLISECONDS_FROM else value, UTC))
    except (ValueError, OverflowError, OSError):
        raise InvalidEvent([Fault("occurred_at", "expected a time: RFC 3339, or Unix seconds or milliseconds")]) from None


def unreadable(channel: str, payload: bytes) -> Mapping[str, Any]:
    """Return what stands for the event of a message that no event can be made of: a worker makes it a dead letter."""
    try:
        kept = {"payload": payload.decode()}
    except UnicodeDecodeError:
        kept = {"payload_hex": payload.hex()}
    return {"type": channel, "channel": channel, **kept}
