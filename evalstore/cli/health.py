"""`evalstore health`: a check for container probes and operators."""

from typing import Annotated, Any

import typer

from evalstore.cli.output import Format, OutputOption, failed, notice, show
from evalstore.telemetry.process_registry import ROLES, groups
from models.errors import DatabaseMisconfigured, SchemaMismatch
from models.settings import settings

_TIMEOUT_S = 5.0


def health(
    live: Annotated[bool, typer.Option("--live", help="Check that the processes on this machine make progress.")] = False,
    ready: Annotated[
        bool, typer.Option("--ready", help="Check that Redis and PostgreSQL answer, with the right tables.")
    ] = False,
    of: Annotated[
        str | None, typer.Option(help="Only one group: worker, scheduler, api, sinks or bridge.", metavar="GROUP")
    ] = None,
    output_format: OutputOption = Format.table,
) -> None:
    """Check processes and servers. --live checks only the processes on this machine or in this container.

    Exit status: 0 healthy, 1 unhealthy (stuck, no process, wrong tables or settings), 7 a server cannot be used.
    """
    if live == ready:
        raise typer.BadParameter("expected one of --live and --ready")
    if of is not None and of not in ROLES:
        raise typer.BadParameter(f"expected one of {', '.join(ROLES)}, not {of!r}", param_hint="--of")
    if live:
        _report_live(of, output_format)
    else:
        _report_ready(output_format)


def _report_live(of: str | None, form: Format) -> None:
    rows: list[dict[str, Any]] = [
        {"group": group.role, "process": process.pid, "live": not process.stuck, "stuck": ", ".join(process.stuck) or None}
        for group in groups(settings().runtime_dir)
        if of in {None, group.role}
        for process in group.processes()
    ]
    if rows or form is not Format.table:
        # As text, a process id has no thousands separators.
        shown = [row | {"process": str(row["process"])} for row in rows] if form is Format.table else rows
        show(shown, ["group", "process", "live", "stuck"], form)
    if not rows:
        raise failed(f"no {of or 'process of evalstore'} runs on this machine", 1)
    if stuck := [row for row in rows if not row["live"]]:
        raise failed(f"stuck: {', '.join(str(row['process']) for row in stuck)}", 1)
    notice("live", "green")


def _report_ready(form: Format) -> None:
    from evalstore.telemetry.backend_stats import BackendStats  # noqa: PLC0415 - slow to import, and --live runs often

    stats = BackendStats(settings(), patience_s=_TIMEOUT_S)
    errors = stats.status().errors
    texts = {name: " ".join(str(error).split()) for name, error in errors.items()}
    show(
        [
            {"server": name, "state": texts.get(name, "unknown" if name == "schema" and "postgresql" in texts else "ready")}
            for name in ("redis", "postgresql", "schema")
        ],
        ["server", "state"],
        form,
    )
    for doubt in stats.doubts.get() or [] if "postgresql" not in texts else []:
        notice(f"PostgreSQL is not set up to keep what it commits: {doubt}", "yellow")
    if texts:
        permanent = {name for name, error in errors.items() if isinstance(error, SchemaMismatch | DatabaseMisconfigured)}
        raise failed("not ready", 1 if set(texts) == permanent else 7)
    notice("ready", "green")
