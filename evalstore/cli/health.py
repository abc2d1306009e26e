"""`evalstore health`: for probes of containers, and for whoever wants to know."""

from typing import Annotated, Any

import typer

from evalstore.cli.output import Format, OutputOption, failed, notice, show
from evalstore.telemetry.process_registry import ROLES, groups
from models.errors import DatabaseMisconfigured, SchemaMismatch
from models.settings import settings

_PATIENCE_S = 5.0


def health(
    live: Annotated[bool, typer.Option("--live", help="Do the processes on this machine make progress?")] = False,
    ready: Annotated[bool, typer.Option("--ready", help="Do Redis and PostgreSQL answer, with the right tables?")] = False,
    of: Annotated[str | None, typer.Option(help="Only of: worker, scheduler or api.", metavar="GROUP")] = None,
    output_format: OutputOption = Format.table,
) -> None:
    """Say whether things work. --live asks no server, and looks at what runs on this machine (in this container).

    Exit status: 0 yes, 1 no (stuck, nothing runs, wrong tables or settings), 7 a server cannot be used.
    """
    if live == ready:
        raise typer.BadParameter("expected one of --live and --ready")
    if of is not None and of not in ROLES:
        raise typer.BadParameter(f"expected worker, scheduler or api, not {of!r}", param_hint="--of")
    if live:
        _report_live(of, output_format)
    else:
        _report_ready(output_format)


def _report_live(of: str | None, form: Format) -> None:
    rows: list[dict[str, Any]] = [
        {"group": group.role, "process": process.pid, "live": not process.stuck, "stuck": ", ".join(process.stuck) or None}
        for group in groups()
        if of in {None, group.role}
        for process in group.processes()
    ]
    if rows or form is not Format.table:
        # A process's number is a name for people, to be copied: it has no commas.
        shown = [row | {"process": str(row["process"])} for row in rows] if form is Format.table else rows
        show(shown, ["group", "process", "live", "stuck"], form)
    if not rows:
        raise failed(f"no {of or 'process of evalstore'} runs here", 1)
    if stuck := [row for row in rows if not row["live"]]:
        raise failed(f"stuck: {', '.join(str(row['process']) for row in stuck)}", 1)
    notice("live", "green")


def _report_ready(form: Format) -> None:
    from evalstore.telemetry.backend_stats import BackendStats  # noqa: PLC0415 - whoever asks for --live, often, is spared it

    stats = BackendStats(settings(), patience_s=_PATIENCE_S)
    errors = stats.status().errors
    found = {name: " ".join(str(error).split()) for name, error in errors.items()}
    show(
        [
            {"server": name, "state": found.get(name, "unknown" if name == "schema" and found.get("postgresql") else "ready")}
            for name in ("redis", "postgresql", "schema")
        ],
        ["server", "state"],
        form,
    )
    for doubt in stats.doubts.get() or [] if "postgresql" not in found else []:
        notice(f"PostgreSQL is not set up to keep what it commits: {doubt}", "yellow")
    if found:
        lasting = {name for name, error in errors.items() if isinstance(error, SchemaMismatch | DatabaseMisconfigured)}
        raise failed("not ready", 1 if set(found) == lasting else 7)
    notice("ready", "green")
