"""`/console/runs`: runs, one run, and two runs side by side."""

from typing import Any, Final

from markupsafe import Markup
from sqlalchemy import Connection

from evalstore.api import cursors
from evalstore.api.problems import Problem, invalid
from evalstore.console import charts
from evalstore.console.pages import Answer, Pages, Shown, View
from evalstore.console.rendering import duration, number, size
from evalstore.storage import listing, run_comparison
from evalstore.storage import runs as stored
from evalstore.storage.listing import Filter
from evalstore.storage.runs import RunFilter
from evalstore.storage.summaries import Summary, histogram
from models.errors import Fault
from models.events import identity

pages = Pages()

_LIMIT: Final = 50
_SHOWN: Final = 10
_CHANGED: Final = 100
_COLUMNS: Final = 30
_SCORES: Final = 20_000
_SORTED: Final = 50_000  # The slowest of a larger run are not looked for.
_FAILING: Final = ("failed", "timed_out", "lost")


@pages.page("/runs", "runs.html", "Runs", key="r", for_restricted=True)
async def runs(view: View) -> Answer:
    """List runs, the newest first."""
    prefix, submitter, cursor = view.query("run_id_prefix", 200), view.query("submitter"), view.query("cursor")
    if prefix is not None:
        _check_id("run_id_prefix", prefix)
    chosen = RunFilter(prefix, submitter, visibility=view.viewer.visibility)
    after = cursors.decode(cursor, chosen) if cursor else None
    found, following = await view.service.run(lambda conn: stored.page(conn, chosen, limit=_LIMIT, after=after))
    next_cursor = cursors.encode(following, chosen) if following else None
    data = {"runs": found, "next": next_cursor}
    html = {
        "chosen": chosen,
        "bars": {run["run_id"]: _progress(run) for run in found},
        "first_link": view.link(cursor=None) if cursor else None,
        "next_link": view.link(cursor=next_cursor) if next_cursor else None,
    }
    return Shown(data, html)


def _progress(run: dict[str, Any]) -> Markup:
    """Return the bar of a run: its evaluations by status, and those that are expected and not yet there."""
    counts = [*run["by_status"].items()]
    missing = (run["expected"] or 0) - run["evaluations"]
    return charts.shares([*counts, ("missing", missing)] if missing > 0 else counts, "Evaluations by status")


def _check_id(name: str, value: str) -> None:
    if identity({"eval_id": value})[0] is None:
        raise invalid([Fault(name, "expected 1 to 200 of A-Z a-z 0-9 . _ ~ : @ + = -")])


async def _run(view: View, run_id: str) -> dict[str, Any]:
    """Return a run. Raises Problem (404), Outage."""
    found = None
    if identity({"eval_id": run_id})[0] is not None:
        found = await view.service.run(lambda conn: stored.get(conn, run_id, view.viewer.visibility))
    if found is None:
        raise Problem(404, "not-found", f"there is no run {run_id!r}")
    return found


@pages.page("/runs/{run_id}", "run.html", "Run", for_restricted=True)
async def run(view: View) -> Answer:
    """Show a run: progress, distributions, the slowest and the failing."""
    run_id = view.path("run_id")
    found = await _run(view, run_id)
    visibility = view.viewer.visibility

    def work(conn: Connection) -> tuple[Summary, list[float], list[dict[str, Any]], list[dict[str, Any]]]:
        failing = Filter(run_id=run_id, statuses=_FAILING, visibility=visibility)
        slowest = Filter(run_id=run_id, sort="duration_ms", visibility=visibility)
        return (
            stored.summary(conn, run_id),
            run_comparison.scores(conn, run_id, _SCORES),
            listing.page(conn, slowest, limit=_SHOWN).rows if found["evaluations"] <= _SORTED else [],
            listing.page(conn, failing, limit=_SHOWN).rows,
        )

    summary, scores, slowest, failing = await view.service.run(work)
    data = {"run": found, "slowest": slowest, "failing": failing}
    html = {
        "bar": _progress(found),
        "charts": [
            ("Duration", _bars(summary.durations, "Duration", lambda value: duration(value / 1000))),
            ("Score", _score_bars(scores)),
            ("Memory", _bars(summary.memory, "Memory", size)),
        ],
        "scores": len(scores),
        "most_scores": _SCORES,
    }
    return Shown(data, html)


def _bars(bins: Any, title: str, label: Any) -> Markup | None:
    columns = histogram(bins, _COLUMNS)
    if not columns:
        return None
    return charts.bars([(f"{label(low)} to {label(high)}", n) for low, high, n in columns], title)


def _score_bars(scores: list[float]) -> Markup | None:
    if not scores:
        return None
    low, high = min(scores), max(scores)
    width = (high - low) / _COLUMNS
    if not 0 < width < float("inf"):
        return charts.bars([(number(low), len(scores))], "Score")
    counts = [0] * _COLUMNS
    for score in scores:
        counts[min(_COLUMNS - 1, int((score - low) / width))] += 1
    labels = (f"{number(low + at * width)} to {number(low + (at + 1) * width)}" for at in range(_COLUMNS))
    return charts.bars(list(zip(labels, counts, strict=True)), "Score")


@pages.page("/compare", "compare.html", "Compare runs", for_restricted=True)
async def compare(view: View) -> Answer:
    """Show two runs side by side, and the evaluations whose outcome changed."""
    a, b, by, after = view.query("a", 200), view.query("b", 200), view.query("by"), view.query("after")
    if a is None or b is None:
        return Shown({"runs": []}, {"names": (a, b), "by": by})
    sides = [await _run(view, a), await _run(view, b)]
    visibility = view.viewer.visibility
    found = await view.service.run(
        lambda conn: run_comparison.compare(conn, (a, b), by=by, limit=_CHANGED, after=after or "", visibility=visibility)
    )
    data = {"runs": sides, "moves": found.moves, "changed": found.changed, "next": found.following}
    html = {
        "names": (a, b),
        "by": by,
        "bars": [_progress(side) for side in sides],
        "compared": run_comparison.COMPARED,
        "first_link": view.link(after=None) if after else None,
        "next_link": view.link(after=found.following) if found.following else None,
    }
    return Shown(data, html)
