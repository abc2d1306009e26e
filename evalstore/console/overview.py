"""`/console`: the state of everything, live; and the runbook that its problems name."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import StreamingResponse

from evalstore.console import attention, charts, rendering
from evalstore.console.live import Live, LiveState, as_json
from evalstore.console.pages import Answer, Pages, Shown, View
from evalstore.console.viewer import Viewer

pages = Pages()

# A stream ends after this time. The page connects again, and its session is checked.
_STREAM_S: Final = 300.0
_CURVES: Final = (
    ("waiting", "Messages waiting"),
    ("oldest_age_s", "Oldest message"),
    ("events_per_s", "Stored a second"),
    ("dead", "Dead letters"),
    ("sink_lag_s", "Lag of the slowest sink"),
    ("workers", "Worker processes"),
)


def live_of(app: FastAPI) -> LiveState:
    """Return the state that all pages of this process share."""
    if not hasattr(app.state, "console_live"):
        app.state.console_live = LiveState(app.state.service.settings)
    found: LiveState = app.state.console_live
    return found


def close(app: FastAPI) -> None:
    """Close the connections of the shared state, if a page opened any."""
    if hasattr(app.state, "console_live"):
        app.state.console_live.close()
        del app.state.console_live


@pages.page("", "overview.html", "Overview", key="o")
async def overview(view: View) -> Answer:
    """Show the state of everything."""
    live = await live_of(view.request.app).current()
    problems = attention.of(live.snapshot)
    data = {**as_json(live), "problems": [problem._asdict() for problem in problems]}
    return Shown(data, _values(view.request, live))


def _values(request: Request, live: Live) -> dict[str, Any]:
    """Return what the live part of the page shows."""
    snapshot = live.snapshot
    paths = {entry.path for entry in request.app.state.console_entries}
    letters = snapshot.get("dead_letters") or {"count": None}
    now = {
        "waiting": sum(queue[state] for queue in snapshot["queues"] for state in ("ready", "inflight", "delayed"))
        if "queues" in snapshot
        else None,
        "oldest_age_s": max((queue["oldest_age_s"] for queue in snapshot.get("queues", ())), default=None),
        "events_per_s": snapshot.get("events_per_s"),
        "dead": letters["count"],
        "sink_lag_s": max((sink["lag_s"] for sink in snapshot.get("sinks", ())), default=None),
        "workers": len(snapshot["workers"]) if "workers" in snapshot else None,
    }
    return {
        "snapshot": snapshot,
        "arriving_per_s": live.arriving_per_s,
        "attention": [
            problem._replace(page=problem.page if problem.page in paths else None) for problem in attention.of(snapshot)
        ],
        "tiles": [
            (name, title, now[name], charts.sparkline(live.samples, name, snapshot["at"], title)) for name, title in _CURVES
        ],
        "root": request.scope.get("root_path", ""),
    }


@pages.stream("/live")
async def stream(view: View) -> Answer:
    """Stream the live part of the overview as server-sent events."""
    pieces = _pieces(view.request, view.viewer)
    return StreamingResponse(
        pieces, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    )


async def _pieces(request: Request, viewer: Viewer) -> AsyncIterator[bytes]:
    live, service, loop = live_of(request.app), request.app.state.service, asyncio.get_running_loop()
    began, before = loop.time(), ""
    try:
        with live.listening():
            yield b": connected\n\n"
            async for state in live.changes():
                is_over = loop.time() - began > _STREAM_S or service.feed.is_stopping
                if is_over or (viewer.key_id is not None and await service.access.find_by_id(viewer.key_id) is None):
                    return
                shown = rendering.fragment("overview_live.html", **_values(request, state))
                if shown != before:
                    yield "".join(f"data: {line}\n" for line in shown.split("\n") if line).encode() + b"\n"
                before = shown
    finally:
        request.state.waited_s = loop.time() - began
