"""Records and events as JSON."""

import base64
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any
from urllib.parse import quote

import msgspec
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from evalstore.api.record_cache import Rendered
from evalstore.storage.as_of import PastRecord
from evalstore.storage.records import CONTENTS, PREVIEW_BYTES, ContentView, RecordView
from models import content


def to_json(value: object) -> bytes:
    """Encode `value` as JSON. Lone surrogates become escapes, because UTF-8 cannot encode them."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return json.dumps(msgspec.to_builtins(value), separators=(",", ":")).encode()


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response that holds `value`."""
    return Response(to_json(value), status, headers=headers, media_type="application/json")


class ClosingStream(StreamingResponse):
    """A streamed response that calls `close` at its end, even if nobody reads it: Python finalizes generators late."""

    def __init__(self, pieces: AsyncIterator[bytes], close: Callable[[], None], **options: Any) -> None:
        super().__init__(pieces, **options)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def path_of(eval_id: str) -> str:
    """Return the path of an evaluation."""
    return f"/storage/evaluations/{quote(eval_id, safe=':@+=~')}"


def render(record: RecordView) -> Rendered:
    """Encode a record: small content whole, of large content the size, the beginning and the address."""
    fields: dict[str, Any] = dict(record.fields)
    for kind in CONTENTS:
        fields[kind] = None
        if (part := record.contents.get(kind)) is not None:
            fields |= _content(kind, part, f"{path_of(fields['eval_id'])}/{kind}")
    return Rendered(record.stamp, to_json(fields))


def render_past(past: PastRecord) -> bytes:
    """Return a record as it was, as JSON. The addresses of its content name the events that hold it."""
    fields: dict[str, Any] = {**past.view.fields, **({"provisional": True} if past.is_provisional else {})}
    for kind in CONTENTS:
        fields[kind] = None
        if (part := past.view.contents.get(kind)) is not None:
            event_id = past.code_event_id if kind == "code" else past.result_event_id
            fields |= _content(kind, part, f"{path_of(fields['eval_id'])}/{kind}?event_id={event_id}")
    return to_json(fields)


def with_prefix(prefix: str, body: bytes) -> bytes:
    """Add `prefix` to the addresses in a rendered record. Services with different prefixes share the cache, so it has none."""
    if not prefix or b'_url":"/storage/' not in body:
        return body
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:  # Content may hold lone surrogates, which this decoder refuses.
        found = json.loads(body)
        addresses = {name: prefix + found[name] for kind in CONTENTS if (name := f"{kind}_url") in found}
        return to_json(found | addresses)
    for kind in CONTENTS:
        if (address := fields.get(f"{kind}_url")) is not None:
            fields[f"{kind}_url"] = msgspec.Raw(b'"' + prefix.encode() + bytes(address)[1:])
    return msgspec.json.encode(fields)


def event_fields(eval_id: str, event: RecordView, prefix: str) -> dict[str, Any]:
    """Return an event of the log as a JSON object, without absent fields."""
    fields = {name: value for name, value in event.fields.items() if value is not None}
    if isinstance(extra := fields.pop("extra", None), str):
        fields["extra"] = json.loads(extra)
    for kind, part in event.contents.items():
        fields |= _content(kind, part, f"{prefix}{path_of(eval_id)}/{kind}?event_id={fields['event_id']}")
    return fields


def _content(kind: str, part: ContentView, address: str) -> dict[str, Any]:
    if not part.is_complete:
        preview = part.data[:PREVIEW_BYTES].decode(errors="replace")
        return {f"{kind}_size": part.size, f"{kind}_preview": preview, f"{kind}_url": address}
    text = content.from_bytes(part.data)
    if isinstance(text, str):
        return {f"{kind}_size": part.size, kind: text}
    return {f"{kind}_size": part.size, f"{kind}_b64": base64.b64encode(text).decode()}
