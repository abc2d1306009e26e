"""`evalstore ls`: a list of evaluations."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final, cast

import typer

from evalstore.cli.dlq_options import parse_time
from evalstore.cli.output import Format, OutputOption, notice, show, write_json
from evalstore.storage import database, listing
from evalstore.storage.listing import Filter, RunTooLarge, Sort
from models.settings import settings

_COLUMNS: Final = ("eval_id", "status", "run_id", "submitter", "language", "exit_code", "duration_ms", "score", "created_at")
_Status = StrEnum("_Status", ["queued", "running", "completed", "failed", "timed_out", "cancelled", "lost"])
_Sort = StrEnum("_Sort", ["created_at", "eval_id", "duration_ms", "memory_bytes", "score"])
_PAGE: Final = 1000


def ls(  # noqa: PLR0913, PLR0917 - as many as there are filters
    run_id: Annotated[str | None, typer.Option(help="Only evaluations of this run.")] = None,
    submitter: Annotated[str | None, typer.Option(help="Only evaluations of this submitter.")] = None,
    status: Annotated[list[_Status] | None, typer.Option(help="Only evaluations in this status; may be repeated.")] = None,
    executor_id: Annotated[str | None, typer.Option(help="Only evaluations of this executor.")] = None,
    language: Annotated[str | None, typer.Option(help="Only evaluations in this language.")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only evaluations with this metadata; may be repeated.")
    ] = None,
    eval_id_prefix: Annotated[str | None, typer.Option(help="Only evaluations whose id begins so; sorts by id.")] = None,
    since: Annotated[
        datetime | None, typer.Option(parser=parse_time, metavar="TIME", help="Created since: RFC 3339, or an age like 2h.")
    ] = None,
    until: Annotated[
        datetime | None, typer.Option(parser=parse_time, metavar="TIME", help="Created before: RFC 3339, or an age like 2h.")
    ] = None,
    sort: Annotated[_Sort | None, typer.Option(help="By a value only with --run-id.")] = None,
    oldest_first: Annotated[bool, typer.Option("--oldest-first", help="In ascending order.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    output_format: OutputOption = Format.table,
) -> None:
    """List evaluations without their content, the newest first. Exits 3 if none matches."""
    chosen = Filter(
        statuses=tuple(one.value for one in status or ()),
        language=language,
        submitter=submitter,
        executor_id=executor_id,
        since=since,
        until=until,
        metadata=_metadata(metadata or []),
        oldest_first=oldest_first,
        run_id=run_id,
        eval_id_prefix=eval_id_prefix,
        sort=cast("Sort | None", sort and sort.value),
    )
    if chosen.sorted_by in listing.BY_VALUE and run_id is None:
        raise typer.BadParameter(f"--sort {chosen.sorted_by} needs --run-id")
    if eval_id_prefix is not None and sort is not None and sort.value == "created_at":
        raise typer.BadParameter("--eval-id-prefix sorts by eval_id")
    rows = _read(chosen, limit, is_stream=output_format is Format.jsonl)
    if output_format is not Format.jsonl:
        show(rows, _COLUMNS, output_format, nothing="there are no evaluations")
    if not rows:
        raise typer.Exit(3)


def _metadata(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in given:
        key, separator, value = one.partition("=")
        if not key or not separator:
            raise typer.BadParameter(f"--metadata {one}: expected KEY=VALUE")
        found[key] = value
    return found


def _read(chosen: Filter, limit: int, *, is_stream: bool) -> list[dict[str, Any]]:
    """Return up to `limit` evaluations; print each at once if `is_stream`."""
    rows: list[dict[str, Any]] = []
    after = None
    with database.connect(settings(), pool_size=1).connect() as conn:
        while len(rows) < limit:
            try:
                page = listing.page(conn, chosen, limit=min(_PAGE, limit - len(rows)), after=after, scan=listing.LOOKED)
            except RunTooLarge:
                raise typer.BadParameter("--sort: the run is too large to sort it by a value") from None
            rows += page.rows
            for row in page.rows if is_stream else ():
                write_json(row)
            after = page.following
            if after is None:
                return rows
    if not is_stream:
        notice(f"there are more than {limit:,}: --limit shows more")
    return rows
