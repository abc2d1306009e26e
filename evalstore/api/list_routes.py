"""`GET /storage/evaluations`: lists, by page or all at once."""

import asyncio
import base64
import contextlib
import re
from collections.abc import AsyncIterator, Generator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Annotated, Any, Final, Literal, cast

from fastapi import APIRouter, Query, Request
from pydantic import AwareDatetime, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from sqlalchemy import Connection
from starlette.responses import Response

from evalstore.api.openapi import answers
from evalstore.api.problems import invalid, unavailable
from evalstore.api.rendering import Streamed, json_response, to_json
from evalstore.api.service import Service, service_of
from evalstore.storage import database, listing
from evalstore.storage.listing import Filter, Page, Position
from models.errors import Fault
from models.events import decode, identity


def _moment(value: object, read: ValidatorFunctionWrapHandler) -> datetime:
    with contextlib.suppress(ValidationError):
        if isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d[Tt ]", value, re.ASCII):  # pydantic takes numbers too
            return cast("datetime", read(value))
    raise ValueError("expected RFC 3339 with an offset, like 2026-01-31T09:30:00Z")


Moment = Annotated[AwareDatetime, WrapValidator(_moment)]
router = APIRouter(prefix="/storage", tags=["evaluations"])

Status = Literal["queued", "running", "completed", "failed", "timed_out", "cancelled", "lost"]
_ADVICE: Final = (
    "By `cursor` (empty for the first page, then `next`) a page comes in the same time however many evaluations there are; "
    "with filters it may hold fewer than `limit`, even none, while there is a `next`. Without, by `offset`, a page is as full "
    "as can be, and a filter that few match takes as long as it takes to find them, but for 5 s: then it has those among "
    "the first 200,000, and `next` leads on."
)
_METADATA: Final = {
    "name": "metadata",
    "in": "query",
    "style": "form",
    "explode": True,
    "required": False,
    "description": "`metadata.KEY=VALUE`: that key of the metadata has this value, compared as text.",
    "schema": {
        "type": "object",
        "additionalProperties": {"type": "string"},
        "propertyNames": {"pattern": "^metadata\\.[a-z]+$"},
    },
    "example": {"metadata.team": "blue"},
}
_MOST_KEYS: Final = 20
_KNOWN: Final = {
    *("status", "language", "submitter", "executor", "since", "until", "order"),
    *("limit", "offset", "cursor", "total", "format"),
}
_PAGE: Final = {
    "description": "A page, or all that match.",
    "content": {
        "application/json": {"schema": {"$ref": "#/components/schemas/Page"}},
        "application/x-ndjson": {"schema": {"type": "string", "description": "A record without its content a line."}},
    },
}
_TEXT: Final = Query(max_length=1000, pattern="^[^\\x00]*$")


@router.get(
    "/evaluations",
    operation_id="list_evaluations",
    summary="List evaluations",
    responses={**answers(s200="Page"), 200: _PAGE},
    description=f"The newest first, or the oldest, by `created_at`, without their content. {_ADVICE}",
    openapi_extra={"parameters": [_METADATA]},
)
async def read(  # noqa: PLR0913, PLR0917 - as many as there are query parameters
    request: Request,
    status: Annotated[list[Status] | None, Query(description="May be repeated.")] = None,
    language: Annotated[str | None, _TEXT] = None,
    submitter: Annotated[str | None, _TEXT] = None,
    executor: Annotated[str | None, _TEXT] = None,
    since: Annotated[Moment | None, Query(description="Created then or later.")] = None,
    until: Annotated[Moment | None, Query(description="Created before.")] = None,
    order: Annotated[Literal["newest", "oldest"], Query()] = "newest",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    offset: Annotated[int | None, Query(ge=0, le=100_000)] = None,
    cursor: Annotated[str | None, Query(max_length=600)] = None,
    total: Annotated[bool, Query(description="Count them too, up to 1,000,000, for up to 5 s.")] = False,
    format: Annotated[Literal["json", "ndjson"], Query(description="`ndjson`: all that match, streamed.")] = "json",  # noqa: A002
) -> Response:
    service = service_of(request)
    await service.access.caller(request, "read")
    chosen = Filter(
        statuses=tuple(status or ()),
        language=language,
        submitter=submitter,
        executor_id=executor,
        since=since,
        until=until,
        metadata=_metadata(request),
        oldest_first=order == "oldest",
    )
    if format == "ndjson" or request.headers.get("accept", "").startswith("application/x-ndjson"):
        return await _export(service, chosen)
    if cursor is not None and offset is not None:
        raise invalid([Fault("offset", "not together with cursor")])

    def work(conn: Connection) -> tuple[Page | None, int | None]:
        if cursor is None:
            page = listing.numbered_page(conn, chosen, limit=limit, offset=offset or 0)
        else:
            page = listing.page(conn, chosen, limit=limit, after=_position(cursor) if cursor else None)
        return page, listing.count(conn, chosen) if total and page else None

    page, count = await service.run(work)
    if page is None:
        raise invalid([Fault("offset", "too many evaluations to look through for it: cursor reads on from any page")])
    answer: dict[str, Any] = {"evaluations": page.rows, "next": _cursor(page.following) if page.following else None}
    return json_response({**answer, "total": count} if total else answer)


def _metadata(request: Request) -> dict[str, str]:
    """The filters by metadata; any other parameter that is not known is refused, so that a typo shows at once."""
    found: dict[str, str] = {}
    faults: list[Fault] = []
    for name, value in request.query_params.multi_items():
        prefix, dot, key = name.partition(".")
        if name in _KNOWN:
            continue
        if prefix != "metadata" or not dot or not key:
            faults.append(Fault(name[:100], "not a parameter; see /docs"))
        elif "\0" in key + value or len(key + value) > 1000:
            faults.append(Fault(name[:100], "expected up to 1,000 characters without NUL"))
        elif key in found:
            faults.append(Fault(name[:100], "given twice"))
        else:
            found[key] = value
    if len(found) > _MOST_KEYS:
        faults.append(Fault("metadata", f"expected up to {_MOST_KEYS} keys, not {len(found):,}"))
    if faults:
        raise invalid(faults)
    return found


def _cursor(position: Position) -> str:
    return base64.urlsafe_b64encode(to_json([*position])).decode().rstrip("=")


def _position(cursor: str) -> Position:
    try:
        created_at, eval_id = decode(base64.urlsafe_b64decode(cursor.encode("ascii") + b"=="))
        position = Position(datetime.fromisoformat(created_at), eval_id)
    except (ValueError, TypeError):
        position = None
    if position is None or position.created_at.utcoffset() is None or identity({"eval_id": position.eval_id})[0] is None:
        raise invalid([Fault("cursor", "expected the `next` of another page, or nothing")])
    return position


async def _export(service: Service, chosen: Filter) -> Response:
    """All that match, a line each. It holds a connection, so only a few run at once."""
    if service.exports.locked():
        raise unavailable("as many exports run as may")
    await service.exports.acquire()
    export = _Export(service, chosen)
    try:
        first = await export.next()
    except BaseException:
        export.close()
        raise
    return Streamed(export.lines(first), export.close, media_type="application/x-ndjson")


class _Export:
    """An export in a thread of its own, which ends it too: whoever went away cannot wait for that."""

    def __init__(self, service: Service, chosen: Filter) -> None:
        self._service = service
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="evalstore-export")
        self._chunks = self._read(service, chosen)

    def _read(self, service: Service, chosen: Filter) -> Generator[list[dict[str, Any]]]:
        with database.errors(), service.export_engine.connect() as conn:
            yield from listing.export(conn, chosen)

    async def next(self) -> list[dict[str, Any]] | None:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: next(self._chunks, None))

    async def lines(self, chunk: list[dict[str, Any]] | None) -> AsyncIterator[bytes]:
        """Those of that chunk and of the ones after it."""
        while chunk is not None:
            yield b"".join(to_json(row) + b"\n" for row in chunk)
            chunk = await self.next()

    def close(self) -> None:
        self._thread.submit(self._chunks.close)
        self._thread.shutdown(wait=False)
        self._service.exports.release()
