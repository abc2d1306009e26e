"""`/console/redrives`: progress and outcome of redrives."""

from collections.abc import Mapping
from typing import Any

from evalstore.api.problems import Problem
from evalstore.console import forms
from evalstore.console.pages import Answer, Done, Pages, Shown, View
from evalstore.storage import redrives as stored

pages = Pages()
_LIMIT = 100


@pages.page("/redrives", "redrives.html", "Redrives")
async def redrives(view: View) -> Answer:
    """List the newest redrives."""
    return {"redrives": await view.service.run(lambda conn: stored.latest(conn, _LIMIT))}


@pages.page("/redrives/{redrive_id}", "redrive.html", "Redrive")
async def redrive(view: View) -> Answer:
    """Show the progress of a redrive."""
    redrive_id = forms.uuid_of(view, "redrive_id", "redrive")
    rows = await view.service.run(lambda conn: stored.between(conn, redrive_id, redrive_id))
    if not rows:
        raise Problem(404, "not-found", f"there is no redrive {redrive_id}")
    row = rows[0]
    return Shown(row, {"settled": row["stored"] + row["died"] + row["returned"], "outcome": outcome(row)})


def outcome(row: Mapping[str, Any]) -> str:
    """Return a sentence about a redrive."""
    if row["finished_at"] is None:
        if row["started_at"] is None:
            return "It waits for a worker."
        if row["canary"] and row["sent"] <= row["canary"] < row["total"]:
            return "The canary is sent: the others follow once all of it is stored."
        return "It runs."
    parts = [f"{row['stored']:,} of {row['total']:,} stored"]
    parts += [f"{row[name]:,} {text}" for name, text in (("died", "dead again"), ("returned", "dead as before")) if row[name]]
    reason = f" ({row['state']}: {row['error'] or 'by an operator'})" if row["state"] not in {"done", "running"} else ""
    return ", ".join(parts) + reason + "."


@pages.action("/redrives/{redrive_id}/cancel")
async def cancel(view: View) -> Done:
    """Stop a redrive. Messages sent already are processed."""
    redrive_id = forms.uuid_of(view, "redrive_id", "redrive")
    intent = view.intent("cancel", {"redrive": str(redrive_id)})
    returned = await view.service.run(lambda conn: stored.end(conn, redrive_id, "cancelled", None, intent))
    notice = "The redrive has ended already." if returned is None else f"Cancelled: {returned:,} not sent."
    return Done(f"/console/redrives/{redrive_id}", notice)
