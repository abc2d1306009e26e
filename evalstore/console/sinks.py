"""`/console/sinks`: other systems that get all events."""

from datetime import UTC, datetime
from typing import Any, Final

from evalstore.api.problems import Problem, invalid
from evalstore.console.pages import Answer, Done, Pages, View
from evalstore.console.rendering import segment
from evalstore.storage import sink_cursors
from evalstore.storage.sink_cursors import SinkStatus
from models import times
from models.errors import Fault

pages = Pages()
_FIRST: Final = datetime(2000, 1, 1, tzinfo=UTC)  # before the first event of any installation


@pages.page("/sinks", "sinks.html", "Sinks", key="s")
async def sinks(view: View) -> Answer:
    """List the sinks: state, position, lag, deliveries, and the last error."""
    return {"sinks": [_row(sink) for sink in await view.service.run(sink_cursors.statuses)]}


@pages.page("/sinks/{name}", "sink.html", "Sink")
async def sink(view: View) -> Answer:
    """Show a sink, and forms that pause, resume and rewind it."""
    name = view.path("name")
    found = await view.service.run(lambda conn: sink_cursors.statuses(conn, name))
    if not found:
        raise _missing(name)
    return _row(found[0])


def _row(status: SinkStatus) -> dict[str, Any]:
    return {**status._asdict(), "lag_s": round(status.lag_s, 3)}


def _missing(name: str) -> Problem:
    return Problem(404, "not-found", f"there is no sink {name[:100]!r}")


@pages.action("/sinks/{name}/pause")
async def pause(view: View) -> Done:
    """Pass nothing on to a sink until it is resumed."""
    return await _set_state(view, "pause", "paused", "is paused: the outbox keeps what it needs no longer")


@pages.action("/sinks/{name}/resume")
async def resume(view: View) -> Done:
    """Go on with a paused sink, from where it was."""
    return await _set_state(view, "resume", "running", "goes on")


async def _set_state(view: View, verb: str, state: str, notice: str) -> Done:
    name = view.path("name")
    intent = view.intent(f"sinks {verb}", {"sink": name})
    if not await view.service.run(lambda conn: sink_cursors.set_state(conn, name, state, intent)):
        raise _missing(name)
    return Done(f"/console/sinks/{segment(name)}", f"{name} {notice}.")


@pages.action("/sinks/{name}/rewind")
async def rewind(view: View) -> Done:
    """Pass on again what was stored since a time, and then go on with what is new."""
    name, to = view.path("name"), view.form.get("to", "").strip()
    at = _FIRST if to == "start" else times.parse_time(to)
    if at is None:
        raise invalid([Fault("to", "expected RFC 3339 like 2026-01-31T09:30:00Z, an age like 2h or 7d, or `start`")])
    intent = view.intent("sinks rewind", {"sink": name, "to": to})
    if not await view.service.run(lambda conn: sink_cursors.rewind(conn, name, at, intent)):
        raise _missing(name)
    return Done(f"/console/sinks/{segment(name)}", f"{name} is filled from the event log, beginning with {to}.")
