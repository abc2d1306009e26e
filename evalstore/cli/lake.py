"""`evalstore lake`: what the lake holds, queries, and maintenance."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated

import typer

from evalstore.cli.output import Format, OutputOption, failed, notice, show, write_json
from evalstore.lake import maintenance, query, recovery, status
from evalstore.lake.errors import LakeDamaged, LakeMismatch
from evalstore.lake.lake import Lake
from models.settings import settings

app = typer.Typer(help="The lake: what it holds, queries, and maintenance.", no_args_is_help=True)


@contextmanager
def _opened(*, create: bool = False) -> Iterator[Lake]:
    """Open the lake. Exit status 1 where it is another evalstore's, or damaged."""
    try:
        lake = Lake.open(settings(), create=create)
        try:
            yield lake
        finally:
            lake.close()
    except (LakeDamaged, LakeMismatch) as error:
        raise failed(str(error), 1) from error


@app.command("status")
def show_status(output_format: OutputOption = Format.table) -> None:
    """Show the tables: rows, files, bytes, snapshots, and where they are."""
    with _opened() as lake:
        found = status.tables(lake)
    columns = ["table", "rows", "files", "bytes", "days", "most_files_a_day", "snapshots", "committed_at", "metadata"]
    show(found, columns if output_format is Format.table else list(found[0]), output_format, wrapped="metadata")


@app.command("query")
def run_query(
    sql: Annotated[str, typer.Argument(help="One SELECT from `events` and `evaluations`, in DuckDB's SQL.")],
    *,
    max_rows: Annotated[int, typer.Option(min=1, max=1_000_000, help="Refuse more rows.")] = 10_000,
    timeout: Annotated[float, typer.Option(min=0.1, max=86_400, help="Refuse what takes longer, in seconds.")] = 60,
    memory: Annotated[int, typer.Option(min=64, max=1_000_000, help="Refuse what needs more memory, in MB.")] = 512,
    output_format: OutputOption = Format.table,
) -> None:
    """Ask the lake. Read-only, without access to files, bounded in memory, time and rows.

    Content is text where it is text, else base64. Exit status 1 if the query is refused.
    """
    with _opened() as lake:
        try:
            rows = query.run(lake, sql, query.Limits(max_rows, timeout, memory))
        except query.QueryRefused as error:
            raise failed(str(error), 1) from error
    show(rows, list(rows[0]) if rows else [], output_format, nothing="no row")


@app.command()
def maintain(
    *,
    keep_hours: Annotated[float, typer.Option(min=0, help="Keep snapshots that are younger, for readers.")] = 3,
    grace_hours: Annotated[float, typer.Option(min=0, help="Keep files that no snapshot names, if younger.")] = 24,
    output_format: OutputOption = Format.table,
) -> None:
    """Merge small files, expire old snapshots, and remove files that no snapshot names. Workers do the same every half hour.

    Safe while others write and read, and after a crash at any step.
    """
    with _opened(create=True) as lake:
        done = maintenance.run_once(lake, keep=timedelta(hours=keep_hours), grace=timedelta(hours=grace_hours))
    if output_format is not Format.table:
        write_json(done._asdict())
    notice(
        f"{done.files_before:,} data files became {done.files_after:,}; {done.snapshots_expired:,} snapshots expired, "
        f"{done.files_removed:,} files removed",
        "green",
    )


@app.command()
def recover(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
    output_format: OutputOption = Format.table,
) -> None:
    """After a restore of the database: lead its catalog to the newest state that the lake's files show.

    Run it before sinks and workers start.
    """
    try:
        found = recovery.run_once(settings(), dry_run=dry_run)
    except (LakeDamaged, LakeMismatch) as error:
        raise failed(str(error), 1) from error
    show([one._asdict() for one in found], ["table", "before", "after"], output_format)
