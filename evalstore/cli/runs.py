"""`evalstore runs`: how runs are doing."""

import time
from typing import Annotated, Any, Final

import typer
from sqlalchemy import Connection

from evalstore.cli.output import Format, OutputOption, escaped, failed, notices, progress_bar, show, write_json
from evalstore.storage import database, runs
from evalstore.storage.runs import RunFilter
from models.settings import settings

app = typer.Typer(help="Show runs: sets of evaluations that belong together.", no_args_is_help=True)

_COLUMNS: Final = ("run_id", "state", "evaluations", "unfinished", "pass_rate", "mean_score", "first_at", "last_at")
_LOOK_S: Final = 1.0


def _connect() -> Connection:
    return database.connect(settings(), pool_size=1).connect()


@app.command()
def ls(
    prefix: Annotated[str | None, typer.Option("--run-id-prefix", help="Only runs whose id begins so.")] = None,
    submitter: Annotated[str | None, typer.Option(help="Only runs all of whose evaluations are of this submitter.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many.")] = 100,
    output_format: OutputOption = Format.table,
) -> None:
    """List runs, the newest first. Their sums are late by some seconds. Exits 3 if no run matches."""
    found: list[dict[str, Any]] = []
    after = None
    with _connect() as conn:
        while len(found) < limit:
            page, after = runs.page(conn, RunFilter(prefix, submitter), limit=min(1000, limit - len(found)), after=after)
            found += page
            if after is None:
                break
    show(found, _COLUMNS, output_format, nothing="there are no runs; `evalstore sinks run` keeps them")
    if not found and (prefix or submitter):
        raise typer.Exit(3)


@app.command("show")
def show_run(
    run_id: Annotated[str, typer.Argument(metavar="RUN_ID", help="Id of the run.")],
    watch: Annotated[bool, typer.Option("--watch", help="Show a progress bar until no evaluation is unfinished.")] = False,
    output_format: OutputOption = Format.table,
) -> None:
    """Show the sums of a run: evaluations by status, pass rate, scores, durations and memory. Exits 3 if there is none.

    With --watch it waits until the run finished: it was declared complete, or has evaluations, and none is unfinished.
    """
    with _connect() as conn:
        found = _get(conn, run_id)
        if watch:
            found = _watch(conn, found)
    if output_format is Format.table:
        show([{"field": name, "value": value} for name, value in found.items()], ["field", "value"], output_format)
    else:
        write_json(found)


def _get(conn: Connection, run_id: str) -> dict[str, Any]:
    found = runs.get(conn, run_id)
    if found is None:
        raise failed(f"there is no run {escaped(run_id)!r}; `evalstore runs ls` lists them", 3)
    return found


def _is_over(run: dict[str, Any]) -> bool:
    is_declared = run["closed"] or run["expected"] is not None
    return bool(run["state"] == "finished" if is_declared else run["evaluations"] and not run["unfinished"])


def _watch(conn: Connection, run: dict[str, Any]) -> dict[str, Any]:
    total = max(run["expected"] or 0, run["evaluations"])
    with progress_bar(escaped(run["run_id"]), total, shown=notices.is_terminal) as advance:
        shown = 0
        while True:
            done = run["evaluations"] - run["unfinished"]
            advance(done - shown)
            shown = done
            if _is_over(run):
                return run
            time.sleep(_LOOK_S)
            run = _get(conn, run["run_id"])
