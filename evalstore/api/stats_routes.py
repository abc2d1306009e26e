"""`GET /storage/stats`: counts and quantiles of finished evaluations over time."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from evalstore.api import openapi
from evalstore.api.callers import Reader
from evalstore.api.openapi import success
from evalstore.api.parameters import Time, refuse_unknown
from evalstore.api.problems import invalid
from evalstore.api.rendering import json_response
from evalstore.api.service import service_of
from evalstore.storage import statistics
from evalstore.storage.statistics import Bucket, GroupBy, TooMuch
from models.errors import Fault

router = APIRouter(prefix="/storage", tags=["statistics"], responses=openapi.ALWAYS)

_DEFAULT_RANGE: Final = timedelta(days=30)


@router.get(
    "/stats",
    operation_id="get_statistics",
    summary="Statistics of finished evaluations",
    responses={200: success("Statistics")},
)
async def read(
    request: Request,
    caller: Reader,
    group_by: Annotated[GroupBy | None, Query(description="A row for each value.")] = None,
    value: Annotated[
        str | None, Query(max_length=1000, pattern="^[^\\x00]*$", description="Only this value of `group_by`.")
    ] = None,
    bucket: Annotated[Bucket, Query(description="Of `finished_at`, in UTC.")] = "day",
    since: Annotated[Time | None, Query(description="By default 30 days before `until`.")] = None,
    until: Annotated[Time | None, Query(description="By default now.")] = None,
) -> Response:
    """Exact counts, and quantiles within 1 %, at most a minute late. The range is rounded outwards to whole buckets, at most
    10,000. Buckets and values without evaluations have no row. Lost evaluations have no `finished_at`, so they do not count."""
    refuse_unknown(request, {"group_by", "value", "bucket", "since", "until"})
    if value is not None and group_by is None:
        raise invalid([Fault("value", "needs group_by")])
    end = until or datetime.now(UTC)
    try:
        begin = since or end - _DEFAULT_RANGE
        asked = statistics.Query(begin, end, bucket, group_by, value, caller.visibility)
        rows = await service_of(request).run(lambda conn: statistics.read(conn, asked))
        first, last = statistics.span(asked)
    except TooMuch as error:
        raise invalid([Fault(error.field, error.problem)]) from None
    except OverflowError:
        raise invalid([Fault("until", "expected a time after the year 1")]) from None
    return json_response({"since": first, "until": last, "bucket": bucket, "group_by": group_by, "rows": rows})
