"""Records and events as JSON."""

import base64
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any
from urllib.parse import quote

import msgspec
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from evalstore.api.cache import Rendered
from evalstore.storage.records import CONTENTS, PREVIEW_BYTES, ContentView, RecordView
from models import content


def to_json(value: object) -> bytes:
    """`value` as JSON; lone surrogates, which UTF-8 has no form for, as escapes."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return json.dumps(msgspec.to_builtins(value), separators=(",", ":")).encode()


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer that holds `value`."""
    return Response(to_json(value), status, headers=headers, media_type="application/json")


class Streamed(StreamingResponse):
    """An answer in pieces. At its end `close` is called, also where nobody ever read of it: generators end when they are
    forgotten, which may be late."""

    def __init__(self, pieces: AsyncIterator[bytes], close: Callable[[], None], **shown: Any) -> None:
        super().__init__(pieces, **shown)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def url(eval_id: str) -> str:
    """The path of an evaluation."""
    return f"/storage/evaluations/{quote(eval_id, safe=':@+=~')}"


def rendered(record: RecordView) -> Rendered:
    """A record as it is answered: small content whole, of the rest the beginning, and where to read it."""
    fields: dict[str, Any] = dict(record.fields)
    for kind in CONTENTS:
        fields[kind] = None
        if (part := record.contents.get(kind)) is not None:
            fields |= _content(kind, part, f"{url(fields['eval_id'])}/{kind}")
    return Rendered(record.stamp, to_json(fields))


def logged(eval_id: str, event: RecordView) -> dict[str, Any]:
    """An event of the log as it is answered, without what it does not have."""
    fields = {name: value for name, value in event.fields.items() if value is not None}
    if isinstance(extra := fields.pop("extra", None), str):
        fields["extra"] = json.loads(extra)
    for kind, part in event.contents.items():
        fields |= _content(kind, part, f"{url(eval_id)}/{kind}?event_id={fields['event_id']}")
    return fields


def _content(kind: str, part: ContentView, address: str) -> dict[str, Any]:
    if not part.is_complete:
        preview = part.data[:PREVIEW_BYTES].decode(errors="replace")
        return {f"{kind}_size": part.size, f"{kind}_preview": preview, f"{kind}_url": address}
    text = content.from_bytes(part.data)
    if isinstance(text, str):
        return {f"{kind}_size": part.size, kind: text}
    return {f"{kind}_size": part.size, f"{kind}_b64": base64.b64encode(text).decode()}
