"""`/storage/evaluations/{id}/output|code|error`: content as bytes, streamed, or a range of it."""

import base64
import contextlib
import io
import re
import tempfile
from collections.abc import AsyncIterator, Callable
from typing import IO, Annotated, Any, Final, NamedTuple, TypeVar
from uuid import UUID

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from evalstore.api.openapi import answers, header
from evalstore.api.problems import Problem, not_found
from evalstore.api.record_routes import is_match
from evalstore.api.rendering import Streamed
from evalstore.api.service import Service, service_of
from evalstore.storage import content_reader
from evalstore.storage.content_reader import Content, Kind
from models.events import identity

router = APIRouter(prefix="/storage", tags=["content"])

# So much of an answer is in memory while its client takes it.
SLICE_BYTES: Final = 256 * 1024
_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
_NEVER_CHANGES: Final = "private, max-age=31536000, immutable"
_NOW: Final = "private, no-cache"

T = TypeVar("T")


class Span(NamedTuple):
    """From `start` up to `stop`."""

    start: int
    stop: int


def span_of(range_header: str | None, size: int) -> Span | None:
    """The part that a Range asks for; None: all of it (RFC 9110, 14.2: what is no single range of bytes is ignored).

    Raises Problem (416) where there is no such part.
    """
    match = _RANGE.fullmatch((range_header or "").strip())
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        span = Span(max(0, size - int(last)), size)
    elif last and int(last) < int(first):
        return None
    else:
        span = Span(int(first), min(size, int(last) + 1) if last else size)
    if span.start >= span.stop:
        raise Problem(416, "no-such-range", f"it holds {size} bytes", headers={"Content-Range": f"bytes */{size}"})
    return span


def _route(kind: Kind) -> None:
    @router.get(
        f"/evaluations/{{eval_id}}/{kind}",
        operation_id=f"get_{kind}",
        summary=f"Read {kind}",
        responses={
            **answers(304, 404, 416),
            **{
                status: {
                    "description": what,
                    "content": {
                        "text/plain": {"schema": {"type": "string"}},
                        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
                    },
                }
                for status, what in ((200, "All of it."), (206, "The range that was asked for."))
            },
        },
        openapi_extra={
            "parameters": [
                header("Range", "`bytes=FIRST-LAST`, one range."),
                header("If-Range", "Only where this is its ETag."),
                header("If-None-Match", "Answer 304 where this is its ETag."),
            ]
        },
    )
    async def read(
        request: Request,
        eval_id: str,
        event_id: Annotated[UUID | None, Query(description="That of this event, instead of the record's.")] = None,
    ) -> Response:
        """The bytes as they were sent, as an attachment: no browser takes them for a page."""
        service = service_of(request)
        await service.access.caller(request, "read")
        return await _answer(service, request, eval_id, kind, event_id)


for _kind in ("code", "output", "error"):
    _route(_kind)


async def _answer(service: Service, request: Request, eval_id: str, kind: Kind, event_id: UUID | None) -> Response:
    if identity({"eval_id": eval_id})[0] is None:
        raise not_found(eval_id)
    found = await service.run(lambda conn: content_reader.find(conn, eval_id, kind, event_id))
    if found is None:
        raise not_found(eval_id, kind)
    content = found
    etag = f'"{content.event_id.hex}-{kind}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": _NOW if event_id is None else _NEVER_CHANGES,
        "Vary": "Authorization, X-API-Key",
    }
    if content.sha256 is not None:
        headers["Repr-Digest"] = f"sha-256=:{base64.b64encode(content.sha256).decode()}:"
    if is_match(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    is_same = request.headers.get("if-range", etag) == etag
    part = span_of(request.headers.get("range"), content.size) if is_same else None
    span = part or Span(0, content.size)
    if part:
        headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{content.size}"
    headers["Content-Length"] = str(span.stop - span.start)
    if content.store is not None and span.start:
        content = await _read(service, content, lambda: content_reader.with_head(service.connection, service.stores, found))
    # The first piece before the headers: where it cannot be read, the answer still can say so.
    reading = _Reading(service, content, span)
    first = await reading.next()
    if content.store is not None and not span.start:
        content = content._replace(head=first[: content_reader.HEAD_BYTES])
    headers["Content-Disposition"] = f'attachment; filename="{eval_id}-{kind}{".txt" if content.is_text else ".bin"}"'
    media_type = "text/plain; charset=utf-8" if content.is_text else "application/octet-stream"
    shown: dict[str, Any] = {"status_code": 206 if part else 200, "headers": headers, "media_type": media_type}
    return Streamed(reading.slices(first), reading.close, **shown)


class _Reading:
    """Content on its way to a client. A large piece of it waits in a temporary file: who is slow takes no memory for it.

    Nothing else is held between two slices, so that nothing but that file is left of who goes away.
    """

    def __init__(self, service: Service, content: Content, span: Span) -> None:
        self._service, self._content = service, content
        self._pieces = content_reader.read(service.connection, service.stores, content, span.start, span.stop)
        self._piece: IO[bytes] = io.BytesIO()

    async def next(self) -> bytes:
        """The next slice; nothing after the last. Raises Problem, Outage, ObjectMissing, ObjectDamaged."""
        if slice_ := self._piece.read(SLICE_BYTES):
            return slice_
        self._piece.close()
        self._piece = await _read(self._service, self._content, self._take)
        return self._piece.read(SLICE_BYTES)

    def _take(self) -> IO[bytes]:
        piece = next(self._pieces, b"")
        if len(piece) > SLICE_BYTES:
            with contextlib.suppress(OSError):  # no room there: it is read all the same
                return _filed(piece)
        return io.BytesIO(piece)

    async def slices(self, slice_: bytes) -> AsyncIterator[bytes]:
        """That one and those after it."""
        while slice_:
            yield slice_
            slice_ = await self.next()

    def close(self) -> None:
        """End it, wherever it is."""
        self._piece.close()


async def _read(service: Service, content: Content, work: Callable[[], T]) -> T:
    """What `work` gives, called in a thread. Raises Problem, Outage, ObjectMissing, ObjectDamaged."""
    try:
        return await service.thread(work)
    except LookupError:
        raise not_found(content.eval_id, content.kind) from None


def _filed(piece: bytes) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - who reads it closes it
    try:
        file.write(piece)
        file.seek(0)
    except OSError:
        file.close()
        raise
    return file
