"""`/storage/evaluations/{id}/output|code|error`: content as bytes, streamed, or a range of it."""

import base64
import contextlib
import io
import re
import tempfile
from collections.abc import AsyncIterator, Callable
from typing import IO, Annotated, Final, NamedTuple, TypeVar
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from evalstore.api import following, openapi
from evalstore.api.callers import Reader
from evalstore.api.openapi import EvalId, IfNoneMatch
from evalstore.api.preconditions import matches_etag
from evalstore.api.problems import Problem, not_found
from evalstore.api.rendering import ClosingStream
from evalstore.api.service import Service, service_of
from evalstore.storage import content_reader
from evalstore.storage.content_reader import Content, Kind
from models.events import identity

router = APIRouter(prefix="/storage", tags=["content"], responses=openapi.ALWAYS)


SLICE_BYTES: Final = 256 * 1024
_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
_NEVER_CHANGES: Final = "private, max-age=31536000, immutable"
_NOW: Final = "private, no-cache"

T = TypeVar("T")


class Span(NamedTuple):
    """A range of bytes: `start` is the first byte, `stop` the byte after the last."""

    start: int
    stop: int


def span_of(range_header: str | None, size: int) -> Span | None:
    """Return the part that a Range header requests. Return None for the whole content, and for ranges that are not a single
    byte range.

    RFC 9110, 14.2. Raises Problem (416) if the content has no such part.
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
        raise Problem(416, "no-such-range", f"the content has {size} bytes", headers={"Content-Range": f"bytes */{size}"})
    return span


_BYTES: Final = {
    "text/plain": {"schema": {"type": "string"}},
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
}
_HEADERS: Final = ("ETag", "Accept-Ranges", "Content-Disposition", "Repr-Digest")


def _add_route(kind: Kind) -> None:
    @router.get(
        f"/evaluations/{{eval_id}}/{kind}",
        operation_id=f"get_{kind}",
        summary=f"Read {kind}",
        responses={
            200: openapi.response("All of it.", _BYTES, _HEADERS),
            206: openapi.response("The range that Range asks for.", _BYTES, (*_HEADERS, "Content-Range")),
            **openapi.problems(304, 404, 416),
        },
        response_class=Response,
    )
    async def read(
        request: Request,
        caller: Reader,
        eval_id: EvalId,
        event_id: Annotated[UUID | None, Query(description="Of this event, instead of the record.")] = None,
        range_: Annotated[str | None, Header(alias="Range", description="`bytes=FIRST-LAST`, one range.")] = None,
        if_range: Annotated[str | None, Header(alias="If-Range", description="Only if the ETag is this.")] = None,
        if_none_match: IfNoneMatch = None,
    ) -> Response:
        """The bytes as they were sent, as an attachment, so that no browser shows them as a page."""
        service = service_of(request)
        if identity({"eval_id": eval_id})[0] is None or not await following.can_see(service, caller, eval_id):
            raise not_found(eval_id)
        content = await service.run(lambda conn: content_reader.find(conn, eval_id, kind, event_id))
        if content is None:
            raise not_found(eval_id, kind)
        etag = f'"{content.event_id.hex}-{kind}"'
        headers = {
            "ETag": etag,
            "Accept-Ranges": "bytes",
            "Cache-Control": _NOW if event_id is None else _NEVER_CHANGES,
            "Vary": "Authorization, X-API-Key",
        }
        if content.sha256 is not None:
            headers["Repr-Digest"] = f"sha-256=:{base64.b64encode(content.sha256).decode()}:"
        if matches_etag(if_none_match, etag):
            return Response(status_code=304, headers=headers)
        part = span_of(range_, content.size) if if_range in {None, etag} else None
        return await _stream(service, content, part, headers)


for _kind in ("code", "output", "error"):
    _add_route(_kind)


async def _stream(service: Service, content: Content, part: Span | None, headers: dict[str, str]) -> Response:
    span = part or Span(0, content.size)
    if part:
        headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{content.size}"
    headers["Content-Length"] = str(span.stop - span.start)
    if content.store is not None and span.start:
        without_head = content
        content = await _read(
            service, content, lambda: content_reader.with_head(service.connection, service.stores, without_head)
        )
    # Read the first piece before the headers are sent: if it cannot be read, the answer can still be an error.
    reading = _Reading(service, content, span)
    first = await reading.next()
    if content.store is not None and not span.start:
        content = content._replace(head=first[: content_reader.HEAD_BYTES])
    name = f"{content.eval_id}-{content.kind}{'.txt' if content.is_text else '.bin'}"
    headers["Content-Disposition"] = f'attachment; filename="{name}"'
    media_type = "text/plain; charset=utf-8" if content.is_text else "application/octet-stream"
    status = 206 if part else 200
    return ClosingStream(reading.slices(first), reading.close, status_code=status, headers=headers, media_type=media_type)


class _Reading:
    """Content on its way to a client. A large piece waits in a temporary file, so that slow clients take no memory.

    Between two slices only that file is open. docs/decisions/0028 says why.
    """

    def __init__(self, service: Service, content: Content, span: Span) -> None:
        self._service, self._content = service, content
        self._pieces = content_reader.read(service.connection, service.stores, content, span.start, span.stop)
        self._piece: IO[bytes] = io.BytesIO()

    async def next(self) -> bytes:
        """Return the next slice, or b"" at the end. Raises Problem, Outage, ObjectMissing, ObjectDamaged."""
        if slice_ := self._piece.read(SLICE_BYTES):
            return slice_
        self._piece.close()
        self._piece = await _read(self._service, self._content, self._next_piece)
        return self._piece.read(SLICE_BYTES)

    def _next_piece(self) -> IO[bytes]:
        piece = next(self._pieces, b"")
        if len(piece) > SLICE_BYTES:
            with contextlib.suppress(OSError):
                return _to_file(piece)
        return io.BytesIO(piece)

    async def slices(self, slice_: bytes) -> AsyncIterator[bytes]:
        """Yield this slice and all later slices."""
        while slice_:
            yield slice_
            slice_ = await self.next()

    def close(self) -> None:
        """Remove the temporary file."""
        self._piece.close()


async def _read(service: Service, content: Content, work: Callable[[], T]) -> T:
    """Call `work` in a thread. Raises Problem (404 if the content was deleted), Outage, ObjectMissing, ObjectDamaged."""
    try:
        return await service.thread(work)
    except LookupError:
        raise not_found(content.eval_id, content.kind) from None


def _to_file(piece: bytes) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    try:
        file.write(piece)
        file.seek(0)
    except OSError:
        file.close()
        raise
    return file
