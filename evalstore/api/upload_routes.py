"""`POST /storage/content`: bytes go to the object store as they come in, and an event may name them afterwards."""

import asyncio
import base64
import binascii
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from queue import SimpleQueue
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from evalstore.api.access import Caller
from evalstore.api.openapi import answers, header
from evalstore.api.problems import Problem, invalid, refuse_packed
from evalstore.api.rendering import json_response
from evalstore.api.service import Service, service_of
from evalstore.objects import object_store
from evalstore.storage import grants
from models.content import Reference
from models.errors import Fault, ObjectDamaged
from models.events import CONTENT_FIELDS, Event
from models.record import EventRow

_Start = Callable[[Callable[[], Reference]], asyncio.Future[Reference]]

router = APIRouter(prefix="/storage", tags=["content"])

# Shares of the time after which an object that nothing names is swept away. What a key uploads is made young, unless it is
# younger than the first share already, and the key may use it for the second: all the while it is there.
_TOUCHED_AFTER: Final = 0.25
_GRANTED_FOR: Final = 0.5
_PIECES: Final = 4  # of up to 64 KiB, on their way from the event loop to the thread
_NOT_UPLOADED: Final = (
    "not what this key uploaded of late: POST it to /storage/content, and give the reference as it is answered"
)
_DIGEST: Final = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):")


@router.post(
    "/content",
    operation_id="put_content",
    summary="Upload content",
    responses=answers(408, 413, 415, 501, s201="Reference"),
    openapi_extra={
        "parameters": [header("Content-Digest", "`sha-256=:BASE64:`; the upload is refused where it is another (RFC 9530).")],
        "requestBody": {
            "required": False,  # no bytes are content too
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        },
    },
    status_code=201,
)
async def put(request: Request) -> Response:
    """Takes raw bytes, up to as many as content may hold, and answers with a reference. This key may use it in an event, as
    `code_ref`, `output_ref` or `error_ref`, for some days. Another key has to upload the same itself; it is kept once."""
    service = service_of(request)
    caller = await service.access.caller(request, "write")
    _check_form(request)
    expected = _digest(request.headers.get("content-digest"))
    if service.settings.object_store_url is None:
        raise Problem(501, "no-object-store", "the service has no object store: set EVALSTORE_OBJECT_STORE_URL")
    async with service.upload() as start:
        reference = await _stored(service, start, request.stream(), expected)
    await service.run(lambda conn: grants.grant(conn, caller.key_id, reference, _granted_for(service)))
    return json_response(reference._asdict(), 201)


def _check_form(request: Request) -> None:
    """What a client wrapped or packed, it did not mean to be kept so."""
    refuse_packed(request.headers)
    if request.headers.get("content-type", "").strip().lower().startswith("multipart/"):
        raise Problem(415, "unsupported-type", "content is the whole body: send it raw, not as a form")


def _digest(content_digest: str | None) -> str | None:
    """The SHA-256 in a Content-Digest; others are passed over."""
    if content_digest is None or "sha-256=" not in content_digest:
        return None
    found = _DIGEST.search(content_digest)
    try:
        return base64.b64decode(found[1], validate=True).hex() if found else _refuse_digest()
    except binascii.Error:
        return _refuse_digest()


def _refuse_digest() -> str:
    raise invalid([Fault("Content-Digest", "expected sha-256=:BASE64: of 32 bytes")])


async def _stored(service: Service, start: _Start, stream: AsyncIterator[bytes], expected: str | None) -> Reference:
    """The body, in the object store, while a thread takes it as it comes. Raises Problem, ObjectStoreOutage."""
    pipe = _Pipe()

    def work() -> Reference:
        touch_before = datetime.now(UTC) - timedelta(days=service.settings.sweep_grace_days * _TOUCHED_AFTER)
        return object_store.put(service.objects, pipe.pieces(), sha256=expected, touch_before=touch_before).reference

    storing = start(work)
    storing.add_done_callback(lambda _: pipe.has_no_reader())
    try:
        async for piece in _limited(stream, service.settings.max_content_bytes):
            if not await pipe.put(piece):
                break
        pipe.end(None)
    except BaseException:
        pipe.end(_UploadAborted())
        await asyncio.wait([storing])
        storing.exception()  # is that it broke off: what is raised here says why
        raise
    try:
        return await storing
    except ObjectDamaged:
        raise invalid([Fault("Content-Digest", "not that of the body")]) from None


async def _limited(stream: AsyncIterator[bytes], limit: int) -> AsyncIterator[bytes]:
    size = 0
    async for piece in stream:
        size += len(piece)
        if size > limit:
            raise Problem(413, "too-large", f"content may hold {limit:,} bytes", headers={"Connection": "close"})
        yield piece


def _granted_for(service: Service) -> timedelta:
    return timedelta(days=service.settings.sweep_grace_days * _GRANTED_FOR)


def faults(service: Service, caller: Caller, events: Sequence[Event | EventRow | None]) -> list[tuple[Fault, ...]]:
    """Of each event, the references that the caller may not use. For a thread. Raises DatabaseOutage (retry)."""
    given = [_references(event) if event else {} for event in events]
    wanted = {reference for references in given for reference in references.values()}
    if not wanted:
        return [()] * len(events)
    usable = service.with_connection(lambda conn: grants.granted(conn, caller.key_id, wanted, _granted_for(service)))
    return [
        tuple(Fault(name, _NOT_UPLOADED) for name, reference in references.items() if reference not in usable)
        for references in given
    ]


def _references(event: Event | EventRow) -> dict[str, Reference]:
    form = "{}" if isinstance(event, EventRow) else "{}_ref"
    given = {f"{kind}_ref": getattr(event, form.format(kind)) for kind in CONTENT_FIELDS[event.type]}
    return {name: reference for name, reference in given.items() if isinstance(reference, Reference)}


class _UploadAborted(Exception):
    """The body will not come to its end."""


class _Pipe:
    """A body on its way from the event loop into a thread. Who sends waits for who takes: little is held in between."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Semaphore(_PIECES)
        self._pieces: SimpleQueue[bytes | _UploadAborted | None] = SimpleQueue()
        self._is_read = True

    async def put(self, piece: bytes) -> bool:
        """Wait for room, and pass it on; False where nobody takes any more."""
        await self._room.acquire()
        self._pieces.put(piece)
        return self._is_read

    def end(self, error: _UploadAborted | None) -> None:
        """Nothing comes any more: that was all, or not."""
        self._pieces.put(error)

    def has_no_reader(self) -> None:
        """Whoever waits for room need not."""
        self._is_read = False
        self._room.release()

    def pieces(self) -> Iterator[bytes]:
        """For the thread. Raises what it was ended with."""
        while (piece := self._pieces.get()) is not None:
            if isinstance(piece, _UploadAborted):
                raise piece
            self._loop.call_soon_threadsafe(self._room.release)
            yield piece
