"""`evalstore stats`: statistics of finished evaluations."""

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Final, cast

import typer

from evalstore.cli.dlq_options import parse_time
from evalstore.cli.output import Format, OutputOption, show
from evalstore.storage import database, statistics
from evalstore.storage.statistics import Bucket, GroupBy, TooMuch
from models.settings import settings

_DEFAULT_RANGE: Final = timedelta(days=30)
_COLUMNS: Final = ("evaluations", "pass_rate", "mean_score", "duration_ms", "memory_bytes")
_GroupBy = StrEnum("_GroupBy", ["status", "language", "submitter", "executor", "run"])
_Bucket = StrEnum("_Bucket", ["hour", "day", "month", "all"])


def stats(
    group_by: Annotated[_GroupBy | None, typer.Option(help="A row for each value.")] = None,
    value: Annotated[str | None, typer.Option(help="Only this value of --group-by.")] = None,
    bucket: Annotated[_Bucket, typer.Option(help="Of the time at which evaluations finished, in UTC.")] = _Bucket.day,
    since: Annotated[
        datetime | None, typer.Option(parser=parse_time, metavar="TIME", help="RFC 3339, or an age like 2h; by default 30d.")
    ] = None,
    until: Annotated[
        datetime | None, typer.Option(parser=parse_time, metavar="TIME", help="RFC 3339, or an age like 2h; by default now.")
    ] = None,
    output_format: OutputOption = Format.table,
) -> None:
    """Show counts, pass rates, scores, durations and memory of finished evaluations, by time.

    Counts are exact, and quantiles within 1 %, at most a minute late while `evalstore sinks run` runs. Exits 3 if no evaluation
    finished.
    """
    if value is not None and group_by is None:
        raise typer.BadParameter("--value needs --group-by")
    end = until or datetime.now(UTC)
    group = cast("GroupBy | None", group_by and group_by.value)
    asked = statistics.Query(since or end - _DEFAULT_RANGE, end, cast("Bucket", bucket.value), group, value)
    try:
        with database.connect(settings(), pool_size=1).connect() as conn:
            rows = statistics.read(conn, asked)
    except TooMuch as error:
        raise typer.BadParameter(f"--{error.field.replace('_', '-')}: {error.problem}") from None
    columns = ["bucket", *([group] if group else []), *_COLUMNS]
    show(rows, columns, output_format, nothing="no evaluation finished in this range")
    if not rows:
        raise typer.Exit(3)
