"""`POST /storage/content`: pass bytes to the object store as they arrive. Later events may refer to the object."""

import asyncio
import base64
import binascii
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from queue import SimpleQueue
from typing import Annotated, Final

from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from evalstore.api import openapi
from evalstore.api.callers import Writer
from evalstore.api.openapi import success
from evalstore.api.problems import Problem, invalid, refuse_compressed
from evalstore.api.references import TOUCHED_AFTER, granted_for
from evalstore.api.rendering import json_response
from evalstore.api.service import Service, service_of
from evalstore.objects import object_store
from evalstore.storage import grants
from models.content import Reference
from models.errors import Fault, ObjectDamaged

_Start = Callable[[Callable[[], Reference]], asyncio.Future[Reference]]

router = APIRouter(prefix="/storage", tags=["content"], responses=openapi.ALWAYS)

_PIECES: Final = 4  # of up to 64 KiB, between the event loop and the thread
_DIGEST: Final = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):")


@router.post(
    "/content",
    operation_id="put_content",
    summary="Upload content",
    responses={201: success("Reference"), **openapi.problems(408, 413, 415, 501)},
    openapi_extra=openapi.body(  # not required: empty content is content
        {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}, required=False
    ),
    status_code=201,
)
async def put(
    request: Request,
    caller: Writer,
    content_digest: Annotated[
        str | None,
        Header(alias="Content-Digest", description="`sha-256=:BASE64:`. Another upload is refused (RFC 9530)."),
    ] = None,
) -> Response:
    """Takes raw bytes, as many as content may hold, and answers with a reference. This key may use the reference in events, as
    `code_ref`, `output_ref` or `error_ref`, for some days. Another key must upload the bytes itself. They are stored once."""
    service = service_of(request)
    _refuse_forms(request)
    expected = _sha256(content_digest)
    if service.settings.object_store_url is None:
        raise Problem(501, "no-object-store", "the service has no object store: set EVALSTORE_OBJECT_STORE_URL")
    async with service.upload() as start:
        reference = await _stored(service, start, request.stream(), expected)
    await service.run(lambda conn: grants.grant(conn, caller.key_id, reference, granted_for(service)))
    return json_response(reference._asdict(), 201)


def _refuse_forms(request: Request) -> None:
    refuse_compressed(request.headers)
    if request.headers.get("content-type", "").strip().lower().startswith("multipart/"):
        raise Problem(415, "unsupported-type", "the whole body is the content: send it raw, not as a form")


def _sha256(content_digest: str | None) -> str | None:
    """Return the SHA-256 of a Content-Digest in hex, or None without one. Ignore other algorithms. Raises Problem (422)."""
    if content_digest is None or "sha-256=" not in content_digest:
        return None
    with contextlib.suppress(binascii.Error):
        if match := _DIGEST.search(content_digest):
            return base64.b64decode(match[1], validate=True).hex()
    raise invalid([Fault("Content-Digest", "expected sha-256=:BASE64: of 32 bytes")])


async def _stored(service: Service, start: _Start, stream: AsyncIterator[bytes], expected: str | None) -> Reference:
    """Store the body, as it arrives, in a thread. Raises Problem, ObjectStoreOutage."""
    pipe = _Pipe()

    def work() -> Reference:
        touch_before = datetime.now(UTC) - timedelta(days=service.settings.sweep_grace_days * TOUCHED_AFTER)
        return object_store.put(service.objects, pipe.pieces(), sha256=expected, touch_before=touch_before).reference

    storing = start(work)
    storing.add_done_callback(lambda _: pipe.stop_reading())
    try:
        async for piece in _limited(stream, service.settings.max_content_bytes):
            if not await pipe.put(piece):
                break
        pipe.end(None)
    except BaseException:
        pipe.end(_UploadAborted())
        await asyncio.wait([storing])
        storing.exception()  # _UploadAborted; the reason is raised here
        raise
    try:
        return await storing
    except ObjectDamaged:
        raise invalid([Fault("Content-Digest", "not the digest of the body")]) from None


async def _limited(stream: AsyncIterator[bytes], limit: int) -> AsyncIterator[bytes]:
    size = 0
    async for piece in stream:
        size += len(piece)
        if size > limit:
            raise Problem(413, "too-large", f"content may hold {limit:,} bytes", headers={"Connection": "close"})
        yield piece


class _UploadAborted(Exception):
    """The body ended too early."""


class _Pipe:
    """Passes a body from the event loop to a thread. At most _PIECES wait in between."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Semaphore(_PIECES)
        self._pieces: SimpleQueue[bytes | _UploadAborted | None] = SimpleQueue()
        self._is_read = True

    async def put(self, piece: bytes) -> bool:
        """Wait for room and pass a piece to the thread. Return False if the thread has stopped reading."""
        await self._room.acquire()
        self._pieces.put(piece)
        return self._is_read

    def end(self, error: _UploadAborted | None) -> None:
        """Signal the end of the body, or the error that ended it."""
        self._pieces.put(error)

    def stop_reading(self) -> None:
        """Tell `put` to stop, and release a `put` that waits."""
        self._is_read = False
        self._room.release()

    def pieces(self) -> Iterator[bytes]:
        """Yield the pieces. For the thread. Raises the error of `end`."""
        while (piece := self._pieces.get()) is not None:
            if isinstance(piece, _UploadAborted):
                raise piece
            self._loop.call_soon_threadsafe(self._room.release)
            yield piece
