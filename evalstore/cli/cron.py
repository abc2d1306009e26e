"""`evalstore cron`: list the periodic jobs, and run one now."""

import time
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
import pendulum
import redis
import typer
from dramatiq import Message
from periodiq import cron as cron_line

from evalstore.cli.output import Format, OutputOption, age, ago, failed, notice, show
from models.errors import RedisOutage
from models.jobs import JOBS, QUEUE
from models.record import rfc3339
from tasks.broker import broker

app = typer.Typer(help="The periodic jobs.", no_args_is_help=True)


@app.command()
def ls(output_format: OutputOption = Format.table) -> None:
    """List the periodic jobs with their last run, its outcome, and the next run."""
    last_runs = _last_runs()
    rows: list[dict[str, Any]] = []
    for job in JOBS:
        last = last_runs.get(job.name, {})
        upcoming = cron_line(job.schedule).next_valid_date(pendulum.now("UTC"))
        rows.append(
            {
                "job": job.name,
                "schedule": job.schedule,
                "last_run": last.get("started_at"),
                "outcome": last.get("outcome"),
                "seconds": last.get("seconds"),
                "result": last.get("result") or last.get("error"),
                "next_run": rfc3339(upcoming),
                "does": job.does,
            }
        )
    if output_format is Format.table:
        now = datetime.now(UTC)
        for row in rows:
            row["result"] = _describe(row["result"])
            row["last_run"] = ago(row["last_run"], now)
            row["next_run"] = f"in {age((datetime.fromisoformat(row['next_run']) - now).total_seconds())}"
    show(rows, ["job", "last_run", "outcome", "next_run", "result"], output_format, wrapped="result")


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="Name of the job.")],
    wait_s: Annotated[
        float, typer.Option("--wait", min=0, help="Seconds to wait for the end of the job; 0: do not wait.")
    ] = 60,
) -> None:
    """Run a job in a worker now, and wait for its end."""
    if name not in {job.name for job in JOBS}:
        raise failed(f"there is no job {name!r}; the jobs are {', '.join(job.name for job in JOBS)}", 3)
    before = _last_runs().get(name)
    broker().enqueue(Message(queue_name=QUEUE, actor_name=name, args=(), kwargs={}, options={}))
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        last = _last_runs().get(name)
        if last is not None and last != before:
            if last.get("outcome") != "ok":
                raise failed(f"{name} failed: {last.get('error')}", 1)
            notice(f"{name} ran in {last.get('seconds')} s: {_describe(last.get('result'))}", "green")
            return
        time.sleep(0.1)
    notice(f"{name} is queued" + (f"; no worker ran it within {wait_s:g} s" if wait_s else ""), "yellow")
    if wait_s:
        raise typer.Exit(1)


def _describe(result: object) -> object:
    """Describe the counts of a job, or its error."""
    return ", ".join(f"{count} {name}" for name, count in result.items()) if isinstance(result, dict) else result


def _last_runs() -> dict[str, dict[str, Any]]:
    try:
        runs = broker().client.hgetall(broker().names.last_runs)
    except redis.RedisError as error:
        raise RedisOutage(str(error)) from error
    return {name.decode(): msgspec.json.decode(run) for name, run in dict(runs).items()}
