"""`evalstore cron`: list the periodic jobs, and run one now."""

import time
from datetime import UTC, datetime
from typing import Annotated

import typer

from evalstore.cli.output import Format, OutputOption, age, ago, failed, notice, show
from evalstore.telemetry import schedule
from models.jobs import JOBS
from tasks.broker import broker

app = typer.Typer(help="The periodic jobs.", no_args_is_help=True)


@app.command()
def ls(output_format: OutputOption = Format.table) -> None:
    """List the periodic jobs with their last run, its outcome, and the next run."""
    rows = schedule.rows(broker())
    if output_format is Format.table:
        now = datetime.now(UTC)
        for row in rows:
            row["result"] = schedule.describe(row["result"])
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
    before = schedule.last_runs(broker()).get(name)
    schedule.run_now(broker(), name)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        last = schedule.last_runs(broker()).get(name)
        if last is not None and last != before:
            if last.get("outcome") != "ok":
                raise failed(f"{name} failed: {last.get('error')}", 1)
            notice(f"{name} ran in {last.get('seconds')} s: {schedule.describe(last.get('result'))}", "green")
            return
        time.sleep(0.1)
    notice(f"{name} is queued" + (f"; no worker ran it within {wait_s:g} s" if wait_s else ""), "yellow")
    if wait_s:
        raise typer.Exit(1)
