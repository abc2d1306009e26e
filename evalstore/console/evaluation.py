"""`/console/evaluations/{eval_id}`: the record, its events, and its content."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any, Final
from urllib.parse import quote
from uuid import UUID

import msgspec
from markupsafe import Markup
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import StreamingResponse

from evalstore.api import content_routes, following
from evalstore.api.access import Caller
from evalstore.api.problems import Problem, invalid, not_found
from evalstore.api.record_cache import Rendered
from evalstore.api.rendering import event_fields, render, with_prefix
from evalstore.console import content_view, highlight, rendering, timeline
from evalstore.console.pages import Answer, Pages, Shown, View
from evalstore.console.viewer import Viewer
from evalstore.storage import content_reader, records
from evalstore.storage.content_reader import Content, Kind
from evalstore.storage.records import ContentView, RecordView
from models.errors import Fault
from models.events import identity

pages = Pages()

_EVENTS: Final = 100
_UNFINISHED: Final = ("queued", "running")
_PREVIEW_BYTES: Final = 16 * 1024
_STREAM_S: Final = 300.0
_WAIT_S: Final = 15.0
_KINDS: Final[tuple[Kind, ...]] = ("code", "output", "error")
_TRACE_ID: Final = re.compile(r"(?:00-)?([0-9a-f]{32})(?:-.*)?")
_CURSOR: Final = re.compile(r"([0-9T:.+-]{10,40}),([0-9a-f-]{36})", re.ASCII)
_HIDDEN: Final = (
    "eval_id",
    "status",
    "metadata",
    "enrichment",
    "event_id",
    "type",
    "attempt",
    "occurred_at",
    "recorded_at",
    "extra",
)


@pages.page("/evaluations/{eval_id}", "evaluation.html", "Evaluation", for_restricted=True)
async def evaluation(view: View) -> Answer:
    """Show an evaluation."""
    eval_id = view.path("eval_id")
    shown = await _shown(view.request, view.viewer, eval_id, _after(view.query("cursor")))
    data, html = shown
    html["next_link"] = view.link(cursor=data["next"]) if data["next"] else None
    html["first_link"] = view.link(cursor=None) if view.query("cursor") else None
    return Shown(data, html)


async def _shown(
    request: Request, viewer: Viewer, eval_id: str, after: tuple[datetime, UUID] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the data of the page, and what only its template needs. Raises Problem (404), Outage."""
    service = request.app.state.service
    if identity({"eval_id": eval_id})[0] is None:
        raise not_found(eval_id)
    record: RecordView | None = await service.thread(lambda: service.load(eval_id))
    if record is None or not viewer.visibility.allows(record.fields["submitter"], record.fields["run_id"]):
        raise not_found(eval_id)
    events = await service.run(lambda conn: records.log(conn, eval_id, limit=_EVENTS + 1, after=after))
    rest, events = len(events) > _EVENTS, events[:_EVENTS]
    root = request.scope.get("root_path", "")
    last = events[-1].fields if events else {}
    data = {
        "evaluation": msgspec.Raw(with_prefix(root, render(record).body)),
        "events": [event_fields(eval_id, event, root) for event in events],
        "next": f"{last['occurred_at'].isoformat()},{last['event_id']}" if rest else None,
    }
    html = await service.thread(lambda: _html(record, events, service.settings.console_trace_url))
    return data, {**html, "root": root}


def _html(record: RecordView, events: list[RecordView], trace_url: str | None) -> dict[str, Any]:
    fields = record.fields
    return {
        "record": fields,
        "is_unfinished": fields["status"] in _UNFINISHED,
        "contents": {
            kind: _content(part, fields["language"] if kind == "code" else None) for kind, part in record.contents.items()
        },
        "lanes": timeline.lanes([event.fields for event in events]),
        "rows": [_event_row(event) for event in events],
        "trace": _trace(trace_url, fields),
        "metadata": sorted((key, _json(value)) for key, value in fields["metadata"].items()),
        "enrichment": sorted((key, _json(value)) for key, value in (fields.get("enrichment") or {}).items()),
    }


def _content(part: ContentView, language: str | None) -> dict[str, Any]:
    """Return the beginning of content as lines, or as rows of bytes if it is no text."""
    data = part.data[:_PREVIEW_BYTES]
    is_binary = b"\0" in data or _is_binary(data, part.size)
    if is_binary:
        return {"size": part.size, "rows": content_view.hex_rows(data[:512], 0), "lines": None, "is_whole": part.size <= 512}
    if language is not None:
        lines: list[tuple[int | None, Markup]] = [*enumerate(highlight.lines(content_view.text_of(data), language), 1)]
    else:
        lines = content_view.after(lambda start, stop: iter([data[start:stop]]), len(data), 0, 1).lines
    return {"size": part.size, "rows": None, "lines": lines, "is_whole": part.size <= len(data)}


def _is_binary(data: bytes, size: int) -> bool:
    try:
        data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        return size <= len(data) or error.start < len(data) - 3
    return False


def _event_row(event: RecordView) -> dict[str, Any]:
    fields = event.fields
    details = [(name, value) for name, value in fields.items() if name not in _HIDDEN and value is not None]
    return {
        **{name: fields[name] for name in ("type", "event_id", "attempt", "occurred_at", "recorded_at")},
        "details": [(name, _plain(value)) for name, value in details],
        "metadata": _json(fields["metadata"]) if fields.get("metadata") else None,
        "contents": [(kind, part.size) for kind, part in event.contents.items()],
    }


def _plain(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _trace(url: str | None, fields: Mapping[str, Any]) -> str | None:
    """Return the address of the evaluation's trace, None without EVALSTORE_CONSOLE_TRACE_URL or without a trace."""
    if url is None:
        return None
    found = fields["metadata"].get("trace_id") or fields["metadata"].get("traceparent") or ""
    match = _TRACE_ID.fullmatch(found) if isinstance(found, str) else None
    if "{trace_id}" in url and match is None:
        return None
    return url.replace("{eval_id}", quote(fields["eval_id"], safe="")).replace("{trace_id}", match[1] if match else "")


def _after(cursor: str | None) -> tuple[datetime, UUID] | None:
    if cursor is None:
        return None
    match = _CURSOR.fullmatch(cursor)
    with suppress(ValueError):
        if match is not None and (at := datetime.fromisoformat(match[1])).utcoffset() is not None:
            return at, UUID(match[2])
    raise invalid([Fault("cursor", "expected the `next` of another page")])


@pages.stream("/evaluations/{eval_id}/live", for_restricted=True)
async def stream(view: View) -> Answer:
    """Stream the page of an unfinished evaluation at each change, as server-sent events."""
    pieces = _pieces(view.request, view.viewer, view.path("eval_id"))
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(pieces, media_type="text/event-stream", headers=headers)


async def _pieces(request: Request, viewer: Viewer, eval_id: str) -> AsyncIterator[bytes]:
    service, loop = request.app.state.service, asyncio.get_running_loop()
    began, shown_version = loop.time(), ""
    yield b": connected\n\n"
    while loop.time() - began < _STREAM_S and not service.feed.is_stopping:
        if viewer.key_id is not None and await service.access.find_by_id(viewer.key_id) is None:
            return
        before = shown_version
        record = await following.until(request, service, eval_id, partial(_is_other, before), _WAIT_S)
        if record is None or await request.is_disconnected():
            return
        if record.row_version == before:
            yield b": heartbeat\n\n"
            continue
        try:
            _, html = await _shown(request, viewer, eval_id, None)
        except Problem:
            return
        shown_version = record.row_version
        fragment = rendering.fragment("evaluation_live.html", **html, next_link=None, first_link=None)
        yield "".join(f"data: {line}\n" for line in fragment.split("\n")).encode("utf-8", "backslashreplace") + b"\n"
        if record.head.status not in _UNFINISHED:
            yield b"event: finished\ndata: \n\n"
            return


def _is_other(before: str, record: Rendered | None) -> bool:
    return record is not None and record.row_version != before


def _kind(view: View) -> Kind:
    kind = view.path("kind")
    if kind not in _KINDS:
        raise Problem(404, "not-found", "content is code, output or error")
    return kind


async def _find(view: View) -> Content:
    """Return the content that the address names. Raises Problem (404, 422), Outage."""
    service, eval_id, kind = view.service, view.path("eval_id"), _kind(view)
    if identity({"eval_id": eval_id})[0] is None or not await following.can_see(service, _caller(view.viewer), eval_id):
        raise not_found(eval_id)
    event_id = _event_id(view)

    def work(conn: Connection) -> Content | None:
        return content_reader.find(conn, eval_id, kind, event_id)

    found = await service.run(work)
    if found is None:
        raise not_found(eval_id, kind)
    return await service.thread(lambda: content_reader.with_head(service.connection, service.stores, found))


def _event_id(view: View) -> UUID | None:
    value = view.query("event_id")
    try:
        return None if value is None else UUID(value)
    except ValueError:
        raise invalid([Fault("event_id", "expected a UUID")]) from None


def _caller(viewer: Viewer) -> Caller:
    return Caller(viewer.key_id or viewer.actor, viewer.scopes, viewer.visibility)


@pages.stream("/evaluations/{eval_id}/{kind}/raw", for_restricted=True)
async def raw(view: View) -> Answer:
    """Download content as it was sent, or a range of it."""
    eval_id, headers = view.path("eval_id"), view.request.headers
    conditions = content_routes.Conditions(headers.get("range"), headers.get("if-range"), headers.get("if-none-match"))
    caller, kind, event_id = _caller(view.viewer), _kind(view), _event_id(view)
    response = await content_routes.serve(view.service, caller, eval_id, kind, event_id, conditions)
    response.headers["Content-Security-Policy"] = "sandbox; default-src 'none'"
    return response


@pages.page("/evaluations/{eval_id}/{kind}", "content.html", "Content", for_restricted=True)
async def viewer(view: View) -> Answer:
    """Show a range of content, and what a search in it found."""
    found = await _find(view)
    start, stop, line = (_number(view, name) for name in ("from", "before", "line"))
    wanted = view.query("q", 200)
    is_hex = view.query("view") == "hex" or (not found.is_text and view.query("view") != "text")

    def read(begin: int, end: int) -> Iterator[bytes]:
        return content_reader.read(view.service.connection, view.service.stores, found, begin, end)

    def work() -> tuple[dict[str, Any], dict[str, Any]]:
        if is_hex:
            return _hex(read, found.size, min(start or 0, max(0, found.size - 1)))
        return _text(read, found.size, start, stop, line, wanted)

    try:
        data, html = await view.service.thread(work)
    except LookupError:
        raise not_found(found.eval_id, found.kind) from None
    about = {"eval_id": found.eval_id, "kind": found.kind, "size": found.size, "event_id": found.event_id, "is_hex": is_hex}
    links = {name: view.link(**{**_NOWHERE, **place}) for name, place in html.pop("places").items()}
    matches = [
        {**match._asdict(), "link": view.link(**{**_NOWHERE, "from": str(match.start), "line": str(match.line)})}
        for match in html.pop("matches")
    ]
    query = view.query("event_id")
    return Shown({**about, **data}, {**html, "links": links, "matches": matches, "wanted": wanted, "asked_event_id": query})


_NOWHERE: Final[dict[str, str | None]] = {"from": None, "before": None, "line": None, "search": None}


def _number(view: View, name: str) -> int | None:
    value = view.query(name, 18)
    if value is None or value == "end":
        return None
    if not re.fullmatch(r"\d{1,15}", value, re.ASCII):
        raise invalid([Fault(name, "expected a number")])
    return int(value)


def _hex(read: content_view.Read, size: int, start: int) -> tuple[dict[str, Any], dict[str, Any]]:
    start -= start % 16
    stop = min(size, start + content_view.HEX_BYTES)
    rows = content_view.hex_rows(b"".join(read(start, stop)) if start < stop else b"", start)
    places: dict[str, dict[str, str | None]] = {}
    if start > 0:
        places["previous"] = {"from": str(max(0, start - content_view.HEX_BYTES)), "view": "hex"}
    if stop < size:
        places["next"] = {"from": str(stop), "view": "hex"}
        places["end"] = {"from": str(size - min(size, content_view.HEX_BYTES)), "view": "hex"}
    places["text"] = {"view": "text"}
    return {"start": start, "stop": stop, "rows": rows}, {"places": places, "matches": [], "searched": None, "lines": []}


def _text(
    read: content_view.Read, size: int, start: int | None, stop: int | None, line: int | None, wanted: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    matches = content_view.Matches([], size, 1)
    if wanted is not None:
        at = (start, line) if start is not None and line is not None else (0, 1)
        matches = content_view.search(read, size, wanted, *at)
        if start is None and matches.found:
            start, line = matches.found[0].start, matches.found[0].line
    if stop is not None:
        shown = content_view.before(read, min(stop, size), line, wanted)
    elif start is None and line is not None:
        shown = content_view.after(read, size, *content_view.find_line(read, size, line), wanted)
    else:
        shown = content_view.after(read, size, min(start or 0, size), line if start else 1, wanted)
    places: dict[str, dict[str, str | None]] = {"hex": {"view": "hex"}}
    known = str(shown.first_line) if shown.first_line is not None else None
    if shown.start > 0:
        places["start"] = {}
        places["previous"] = {"before": str(shown.start), "line": known}
    if shown.stop < size:
        places["next"] = {"from": str(shown.stop), "line": None if shown.next_line is None else str(shown.next_line)}
        places["end"] = {"before": str(size)}
    if wanted is not None and matches.searched < size:
        places["search"] = {"from": str(matches.searched), "line": str(matches.line)}
    text = [{"line": number, "html": str(html)} for number, html in shown.lines]
    data = {
        "start": shown.start,
        "stop": shown.stop,
        "lines": len(text),
        "matches": [match._asdict() for match in matches.found],
    }
    return data, {"places": places, "matches": matches.found, "searched": matches.searched, "lines": shown.lines, "rows": []}
