"""`/console/evaluations`: the list, with the filters of the API in the address."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, get_args

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Connection

from evalstore.api import cursors
from evalstore.api.list_routes import metadata_filters
from evalstore.api.parameters import Status, Time
from evalstore.api.problems import Problem, invalid
from evalstore.console.pages import Answer, Pages, Shown, View
from evalstore.storage import listing
from evalstore.storage.listing import BY_VALUE, Filter, Page, RunTooLarge, Total
from models.errors import Fault
from models.events import identity

pages = Pages()

LIMIT: Final = 50
STATUSES: Final[tuple[str, ...]] = get_args(Status)
SORTS: Final[tuple[str, ...]] = ("created_at", "eval_id", *BY_VALUE)
# More evaluations are estimated: counting must not make a page slow.
_COUNTED: Final = 10_000
_COUNT_S: Final = 0.1
_KNOWN: Final = (
    *("status", "language", "submitter", "executor_id", "run_id", "eval_id_prefix", "since", "until", "order", "sort"),
    *("cursor", "format", "metadata"),
)
_TIME: Final = TypeAdapter(Time)


@pages.page("/evaluations", "evaluations.html", "Evaluations", key="e", for_restricted=True)
async def evaluations(view: View) -> Answer:
    """List evaluations by page."""
    chosen = filter_of(view)
    cursor = view.query("cursor")
    after = cursors.decode(cursor, chosen) if cursor else None

    def work(conn: Connection) -> tuple[Page, Total]:
        page = listing.page(conn, chosen, limit=LIMIT, after=after)
        return page, listing.count(conn, chosen, up_to=_COUNTED, patience_s=_COUNT_S)

    try:
        page, total = await view.service.run(work)
    except RunTooLarge:
        raise invalid([Fault("sort", "the run is too large to sort it by a value: filter it, or list it by time")]) from None
    following = cursors.encode(page.following, chosen) if page.following else None
    data = {
        "evaluations": page.rows,
        "next": following,
        "total": total.evaluations,
        "total_is_estimate": total.is_estimate,
    }
    return Shown(data, _form(view, chosen, following))


def _form(view: View, chosen: Filter, following: str | None) -> dict[str, Any]:
    return {
        "chosen": chosen,
        "metadata": " ".join(f"{key}={value}" for key, value in chosen.metadata.items()),
        "statuses": STATUSES,
        "sorts": SORTS if chosen.run_id is not None else SORTS[:2],
        "is_filtered": chosen != Filter(visibility=chosen.visibility),
        "first_link": view.link(cursor=None) if view.query("cursor") else None,
        "next_link": view.link(cursor=following) if following else None,
    }


def filter_of(view: View) -> Filter:
    """Return the filters of a request. They have the names of the API. Raises Problem (422)."""
    statuses = [status for status in view.request.query_params.getlist("status") if status]
    sort, order = _one_of(view, "sort", SORTS), _one_of(view, "order", ("newest", "oldest"))
    prefix, run_id = view.query("eval_id_prefix"), view.query("run_id")
    if unknown := [status for status in statuses if status not in STATUSES]:
        raise invalid([Fault("status", f"unknown: {unknown[0][:50]}")])
    if prefix is not None and identity({"eval_id": prefix})[0] is None:
        raise invalid([Fault("eval_id_prefix", "expected 1 to 200 of A-Z a-z 0-9 . _ ~ : @ + = -")])
    if sort in BY_VALUE and run_id is None:
        raise invalid([Fault("sort", f"{sort} sorts within a run: give run_id")])
    return Filter(
        statuses=tuple(statuses),
        language=view.query("language"),
        submitter=view.query("submitter"),
        executor_id=view.query("executor_id"),
        run_id=run_id,
        eval_id_prefix=prefix,
        sort=None if prefix is not None and sort == "created_at" else sort,  # type: ignore[arg-type]
        since=_time(view, "since"),
        until=_time(view, "until"),
        metadata=_metadata(view),
        oldest_first=order == "oldest",
        visibility=view.viewer.visibility,
    )


def _metadata(view: View) -> dict[str, str]:
    """Return `metadata.KEY=VALUE` of the address, as in the API, and `KEY=VALUE …` of the form's one field."""
    found = metadata_filters(view.request, _KNOWN)
    for pair in (view.query("metadata") or "").split():
        key, is_pair, value = pair.partition("=")
        if not is_pair or not key:
            raise invalid([Fault("metadata", "expected KEY=VALUE, several separated by spaces")])
        found[key] = value
    return found


def _one_of(view: View, name: str, values: Sequence[str]) -> str | None:
    value = view.query(name)
    if value is not None and value not in values:
        raise invalid([Fault(name, f"expected {', '.join(values)}")])
    return value


def _time(view: View, name: str) -> datetime | None:
    value = view.query(name)
    try:
        return None if value is None else _TIME.validate_python(value)
    except ValidationError:
        raise Problem(422, "invalid", f"{name}: expected RFC 3339 with an offset, like 2026-01-31T09:30:00Z") from None
