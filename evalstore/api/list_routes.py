"""`GET /storage/evaluations`: lists of records, by page or as one stream."""

import asyncio
from collections.abc import AsyncIterator, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Query, Request
from sqlalchemy import Connection
from starlette.responses import Response

from evalstore.api import cursors, openapi
from evalstore.api.callers import Reader
from evalstore.api.parameters import Status, Time
from evalstore.api.problems import invalid, unavailable
from evalstore.api.rendering import ClosingStream, json_response, to_json
from evalstore.api.schemas import ref
from evalstore.api.service import Service, service_of
from evalstore.storage import database, listing
from evalstore.storage.listing import Filter, Page, RunTooLarge, Sort, Total
from models.errors import Fault

router = APIRouter(prefix="/storage", tags=["evaluations"], responses=openapi.ALWAYS)

_PAGING: Final = (
    "By `cursor` (empty for the first page, then `next`) the time for a page does not depend on the number of evaluations. "
    "Filters by `run_id`, `submitter`, `executor_id`, `eval_id_prefix`, statuses other than `completed`, and metadata keys in "
    "EVALSTORE_INDEXED_METADATA use an index. With other filters, or with several, a page may hold fewer than `limit`, even "
    "none, although there is a `next`. A cursor belongs to its filters and order. By `offset` pages are full. "
    "If a filter matches so few that this takes more than 5 s, the page holds the matches among the first 200,000, and `next` "
    "goes on."
)
_METADATA: Final = {
    "name": "metadata",
    "in": "query",
    "style": "form",
    "explode": True,
    "required": False,
    "description": "`metadata.KEY=VALUE`: this key of the metadata has this value, compared as text.",
    "schema": {
        "type": "object",
        "additionalProperties": {"type": "string"},
        "propertyNames": {"pattern": "^metadata\\.[a-z]+$"},
    },
    "example": {"metadata.team": "blue"},
}
_MOST_KEYS: Final = 20
_PARAMETERS: Final = {
    *("status", "language", "submitter", "executor", "executor_id", "run_id", "eval_id_prefix", "since", "until", "order"),
    *("sort", "limit", "offset", "cursor", "total", "format"),
}
_PAGE: Final = {
    "description": "A page, or all matches.",
    "content": {
        "application/json": {"schema": ref("Page")},
        "application/x-ndjson": {"schema": {"type": "string", "description": "A Listed a line."}},
    },
}
_SORTING: Final = (
    "By default `created_at`, or `eval_id` with `eval_id_prefix`. Within a run also `duration_ms`, `memory_bytes` or `score`; "
    "evaluations without the value come last."
)
_PREFIX: Final = Query(pattern="^[A-Za-z0-9._~:@+=-]{1,200}$", description="The beginning of `eval_id`.")
_TEXT: Final = Query(max_length=1000, pattern="^[^\\x00]*$")


@router.get(
    "/evaluations",
    operation_id="list_evaluations",
    summary="List evaluations",
    responses={200: _PAGE},
    description=f"Records without content, by `created_at`, newest first. {_PAGING}",
    openapi_extra={"parameters": [_METADATA]},
)
async def read(  # noqa: PLR0913, PLR0917 - a parameter for each in the query
    request: Request,
    caller: Reader,
    status: Annotated[list[Status] | None, Query(description="May be repeated.")] = None,
    language: Annotated[str | None, _TEXT] = None,
    submitter: Annotated[str | None, _TEXT] = None,
    executor_id: Annotated[str | None, _TEXT] = None,
    executor: Annotated[str | None, Query(max_length=1000, pattern="^[^\\x00]*$", deprecated=True)] = None,
    run_id: Annotated[str | None, _TEXT] = None,
    eval_id_prefix: Annotated[str | None, _PREFIX] = None,
    since: Annotated[Time | None, Query(description="Created at this time or later.")] = None,
    until: Annotated[Time | None, Query(description="Created before this time.")] = None,
    order: Annotated[Literal["newest", "oldest"], Query(description="`newest`: descending; `oldest`: ascending.")] = "newest",
    sort: Annotated[Sort | None, Query(description=_SORTING)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    offset: Annotated[int | None, Query(ge=0, le=100_000)] = None,
    cursor: Annotated[str | None, Query(max_length=600)] = None,
    total: Annotated[bool, Query(description="Count the matches. More than 1,000,000 are estimated.")] = False,
    format: Annotated[Literal["json", "ndjson"], Query(description="`ndjson`: all matches, streamed.")] = "json",  # noqa: A002
) -> Response:
    service = service_of(request)
    chosen = Filter(
        statuses=tuple(status or ()),
        language=language,
        submitter=submitter,
        executor_id=executor if executor_id is None else executor_id,
        run_id=run_id,
        eval_id_prefix=eval_id_prefix,
        sort=sort,
        since=since,
        until=until,
        metadata=_metadata_filters(request),
        oldest_first=order == "oldest",
        visibility=caller.visibility,
    )
    if sort in listing.BY_VALUE and run_id is None:
        raise invalid([Fault("sort", f"{sort} sorts within a run: give run_id")])
    if eval_id_prefix is not None and sort == "created_at":
        raise invalid([Fault("sort", "a list by eval_id_prefix is sorted by eval_id")])
    if format == "ndjson" or request.headers.get("accept", "").startswith("application/x-ndjson"):
        return await _export(service, chosen)
    if cursor is not None and offset is not None:
        raise invalid([Fault("offset", "cannot be combined with cursor")])

    after = cursors.decode(cursor, chosen) if cursor else None

    def work(conn: Connection) -> tuple[Page | None, Total | None]:
        if cursor is None:
            page = listing.numbered_page(conn, chosen, limit=limit, offset=offset or 0)
        else:
            page = listing.page(conn, chosen, limit=limit, after=after)
        return page, listing.count(conn, chosen) if total and page else None

    try:
        page, count = await service.run(work)
    except RunTooLarge:
        raise invalid([Fault("sort", "the run is too large to sort it by a value: filter it, or list it by time")]) from None
    if page is None:
        raise invalid([Fault("offset", "too few evaluations match: read on by cursor, from the `next` of a page")])
    following = cursors.encode(page.following, chosen) if page.following else None
    body: dict[str, Any] = {"evaluations": page.rows, "next": following}
    return json_response({**body, "total": count.evaluations, "total_is_estimate": count.is_estimate} if count else body)


def _metadata_filters(request: Request) -> dict[str, str]:
    """Return the values of `metadata.KEY`. Raises Problem (422) for an unknown parameter, so that a typo shows."""
    filters: dict[str, str] = {}
    faults: list[Fault] = []
    for name, value in request.query_params.multi_items():
        prefix, dot, key = name.partition(".")
        if name in _PARAMETERS:
            continue
        if prefix != "metadata" or not dot or not key:
            faults.append(Fault(name[:100], "unknown parameter: /docs lists them"))
        elif "\0" in key + value or len(key + value) > 1000:
            faults.append(Fault(name[:100], "expected up to 1,000 characters without NUL"))
        elif key in filters:
            faults.append(Fault(name[:100], "given twice"))
        else:
            filters[key] = value
    if len(filters) > _MOST_KEYS:
        faults.append(Fault("metadata", f"expected up to {_MOST_KEYS} keys, not {len(filters):,}"))
    if faults:
        raise invalid(faults)
    return filters


async def _export(service: Service, chosen: Filter) -> Response:
    """Stream all matches. Each export keeps a connection, so only EXPORTS run at a time."""
    if service.exports.locked():
        raise unavailable("the service is busy with other exports")
    await service.exports.acquire()
    export = _Export(service, chosen)
    try:
        first = await export.next()
    except BaseException:
        export.close()
        raise
    return ClosingStream(export.lines(first), export.close, media_type="application/x-ndjson")


class _Export:
    """An export in its own thread. The thread also ends the export after the client has disconnected."""

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
        """Yield the lines of `chunk` and of all later chunks."""
        while chunk is not None:
            yield b"".join(to_json(row) + b"\n" for row in chunk)
            chunk = await self.next()

    def close(self) -> None:
        self._thread.submit(self._chunks.close)
        self._thread.shutdown(wait=False)
        self._service.exports.release()
