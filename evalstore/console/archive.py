"""`/console/archive`: where content is, what is due to move, and what failed to move."""

from datetime import UTC, datetime

from evalstore.console.overview import live_of
from evalstore.console.pages import Answer, Done, Pages, Shown, View
from evalstore.storage import archive as moving
from evalstore.storage import inventory, operator_actions
from evalstore.telemetry import schedule
from tasks.broker import broker

pages = Pages()
_JOB = "archive_large_outputs"


@pages.page("/archive", "archive.html", "Archive", key="a")
async def archive(view: View) -> Answer:
    """Show the places of content, the moves that are due, and those that failed."""
    settings = view.service.settings
    snapshot = (await live_of(view.request.app).current()).snapshot
    failures = await view.service.run(inventory.failures)
    address = settings.archive_url or settings.object_store_url
    data = {"contents": snapshot.get("contents"), "due": snapshot.get("archive"), "failures": failures}
    return Shown({**data, "is_on": address is not None}, {"at": snapshot["at"]})


@pages.action("/archive/retry")
async def retry(view: View) -> Done:
    """Let all failed moves be tried at once, and have a worker run the job now."""
    intent = view.intent("archive retry", {})
    moved = await view.service.run(lambda conn: moving.retry_failed(conn, datetime.now(UTC)))
    await view.service.thread(lambda: schedule.run_now(broker(), _JOB))
    await view.service.run(lambda conn: operator_actions.note(conn, intent, moved or 0))
    return Done("/console/archive", "Failed moves are tried again by the next free worker.")
