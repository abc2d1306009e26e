"""`evalstore status`: show the state of everything on one screen."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Final

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from evalstore.cli.output import Format, OutputOption, age, ago, escaped, write_json
from evalstore.telemetry.status_probe import Snapshot, StatusProbe
from models.settings import settings

_INTERVAL_S: Final = 2.0
_GROUPS: Final = 5
_WORKERS: Final = 8


def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until Ctrl-C.")] = False,
    output_format: OutputOption = Format.table,
) -> None:
    """Show the state of queues, workers, outages, dead letters, archive and periodic jobs.

    During an outage of a server, its data is left out and the exit status is 7. Tables of another release exit with 1.
    """
    probe = StatusProbe(settings())
    if not watch:
        snapshot = probe.snapshot()
        if output_format is Format.table:
            Console(highlight=False).print(_screen(snapshot))
        else:
            write_json(snapshot)
        probe.raise_error()
        return
    with suppress(KeyboardInterrupt):
        _watch(probe, output_format)


def _watch(probe: "StatusProbe", form: Format) -> None:
    if form is not Format.table:
        while True:
            write_json(probe.snapshot())
            time.sleep(_INTERVAL_S)
    with Live(_screen(probe.snapshot()), console=Console(highlight=False), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(_INTERVAL_S)
            live.update(_screen(probe.snapshot()), refresh=True)


def _screen(snapshot: Snapshot) -> RenderableType:
    parts: list[RenderableType] = [_head(snapshot)]
    if "queues" in snapshot:
        rows = [row | {"oldest": age(row["oldest_age_s"])} for row in snapshot["queues"]]
        parts += ["", _table(rows, ["queue", "ready", "inflight", "delayed", "dead", "oldest", "consumers"])]
        workers = [
            worker
            | {"worker": f"{worker['host'][-24:]} {worker['pid']}", "waits_for": ", ".join(worker.get("away", [])) or "-"}
            | {name: worker.get(name, 0) for name in ("applied", "dead", "events_per_s")}
            | ({"state": "breaker open"} if worker.get("breaker_open") else {})
            for worker in snapshot["workers"]
        ]
        columns = ["worker", "state", "threads", "events_per_s", "applied", "dead", "waits_for"]
        parts += ["", _table(workers[:_WORKERS], columns) if workers else Text("no worker runs", style="red")]
        if len(workers) > _WORKERS:
            parts.append(Text(f"and {len(workers) - _WORKERS} more"))
    if "dead_letters" in snapshot:
        parts += ["", _dead_letters(snapshot["dead_letters"])]
    parts += ["", *(Text.assemble((f"{name:<15}", "bold"), escaped(text)) for name, text in _lines(snapshot))]
    if "jobs" in snapshot:
        now = snapshot["at"]
        rows = [
            job
            | {"last_run": ago(job["last_run"], now), "last_success": ago(job["last_success"], now)}
            | {"next_run": f"in {age((job['next_run'] - now).total_seconds())}"}
            for job in snapshot["jobs"]
        ]
        parts += ["", _table(rows, ["job", "outcome", "last_run", "last_success", "next_run"])]
    return Group(*parts)


def _head(snapshot: Snapshot) -> Text:
    head = Text.assemble(("evalstore", "bold"), f" {snapshot['at']:%H:%M:%S}Z")
    for name, title in (("postgresql", "PostgreSQL"), ("redis", "Redis")):
        state = snapshot["servers"][name]
        head.append(f"  {title} {state}", style="green" if state == "up" else "bold red")
    if "workers" in snapshot:
        head.append(f"  {len(snapshot['workers'])} worker processes  {snapshot['events_per_s']:,g} events/s")
        if snapshot["breaker_open"]:
            head.append("  breaker open", style="bold red")
    return head


def _dead_letters(snapshot: Snapshot) -> RenderableType:
    if not snapshot["count"]:
        return Text("no dead letters", style="green")
    rows = [
        {"dead_letters": group["signature"], **group, "error": f"{group['error_class']}: {group['error_message']}"}
        for group in snapshot["groups"]
    ]
    table = _table(rows[:_GROUPS], ["dead_letters", "count", "error"], narrow="error")
    more = len(rows) - _GROUPS
    return Group(table, Text(f"and {more} more groups: evalstore dlq groups")) if more > 0 else table


def _lines(snapshot: Snapshot) -> list[tuple[str, str]]:
    lines = list(snapshot["errors"].items())
    lines += [("doubt", f"PostgreSQL is not set up to keep what it commits: {doubt}") for doubt in snapshot["doubts"]]
    if snapshot.get("outages"):
        lines.append(("outage", f"workers wait for {', '.join(snapshot['outages'])}"))
    if "confirmations" in snapshot:
        waiting = snapshot["confirmations"]
        lines.append(("confirmations", f"{waiting['pending']:,} pending, the oldest for {age(waiting['oldest_age_s'])}"))
    if snapshot.get("redrives_running"):
        lines.append(("redrives", f"{snapshot['redrives_running']:,} running"))
    for replay in snapshot.get("replays_running", []):
        counts = f"{replay['evaluations']:,} of about {replay['total']:,} evaluations, {replay['different']:,} different"
        lines.append(("replay", f"{str(replay['id'])[:8]}: {counts}"))
    if snapshot.get("evaluations") is not None:
        lines.append(
            ("evaluations", ", ".join(f"{count:,} {name}" for name, count in sorted(snapshot["evaluations"].items())) or "none")
        )
    if "contents" in snapshot:
        places = snapshot["contents"].items()
        lines.append(
            ("contents", ", ".join(f"{place['count']:,} in {name} ({_size(place['bytes'])})" for name, place in places))
        )
        due = snapshot["archive"]
        text = f"{due['due']:,.0f} due ({_size(due['due_bytes'])}), the oldest for {age(due['oldest_due_age_s'])}"
        lines.append(("archive", f"{text}, {due['failing']:,.0f} failing"))
    return lines


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], narrow: str | None = None) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        numeric = all(isinstance(row.get(column), int | float) for row in rows)
        table.add_column(
            column.replace("_per_", "/").replace("_", " "),
            justify="right" if numeric else "left",
            no_wrap=True,
            overflow="ellipsis",
            ratio=1 if column == narrow else None,
        )
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    table.expand = narrow is not None
    return table


def _cell(value: object) -> Text:
    if isinstance(value, int | float):
        return Text(f"{value:,}")
    return Text("-" if value is None else escaped(value), style="red" if value in {"failed", "breaker open"} else "")


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
