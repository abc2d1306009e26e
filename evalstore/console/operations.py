"""`/console/queues` and `/console/schedule`: queues, worker processes and periodic jobs."""

from evalstore.api.problems import Problem
from evalstore.console.overview import live_of
from evalstore.console.pages import Answer, Done, Pages, Shown, View
from evalstore.storage import operator_actions
from evalstore.telemetry import schedule
from models.jobs import JOBS
from tasks.broker import broker

pages = Pages()


@pages.page("/queues", "queues.html", "Queues and workers", key="q")
async def queues(view: View) -> Answer:
    """Show the queues and the worker processes."""
    snapshot = (await live_of(view.request.app).current()).snapshot
    if "queues" not in snapshot:
        raise Problem(503, "outage", f"Redis does not answer: {snapshot['errors'].get('redis', 'no answer in time')}")
    names = ("at", "servers", "queues", "workers", "events_per_s", "outages", "breaker_open")
    return {name: snapshot[name] for name in names}


@pages.page("/schedule", "schedule.html", "Schedule", key="t")
async def jobs(view: View) -> Answer:
    """List the periodic jobs with their last outcome and their next run."""
    rows = await view.service.thread(lambda: schedule.rows(broker()))
    return Shown({"jobs": rows}, {"results": {row["job"]: schedule.describe(row["result"]) for row in rows}})


@pages.action("/schedule/{job}/run")
async def run(view: View) -> Done:
    """Queue a run of a job now."""
    name = view.path("job")
    if name not in {job.name for job in JOBS}:
        raise Problem(404, "not-found", "there is no such job")
    intent = view.intent("cron run", {"job": name})

    await view.service.thread(lambda: schedule.run_now(broker(), name))
    await view.service.run(lambda conn: operator_actions.note(conn, intent, 1))
    return Done("/console/schedule", f"{name} is queued: the next free worker runs it.")
