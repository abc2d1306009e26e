"""`evalstore status`: show the state of everything on one screen."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import pendulum
import typer
from periodiq import cron
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from evalstore.cli.output import Format, OutputOption, age, ago, escaped, write_json
from evalstore.storage import dead_letters, event_store, replay_jobs
from evalstore.storage.dead_letters import Selection
from evalstore.storage.table_stats import Numbers
from evalstore.telemetry.backend_stats import BackendStats
from models.errors import EvalstoreError
from models.jobs import JOBS
from models.settings import Settings, settings
from tasks.keys import QUEUE
from tasks.tracing import release

_INTERVAL_S: Final = 2.0
_TIMEOUT_S: Final = 5.0
_GROUPS: Final = 5
_WORKERS: Final = 8

Snapshot = dict[str, Any]


def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until Ctrl-C.")] = False,
    output_format: OutputOption = Format.table,
) -> None:
    """Show the state of queues, workers, outages, dead letters, archive and periodic jobs.

    During an outage of a server, its data is left out and the exit status is 7. Tables of another release exit with 1.
    """
    probe = _StatusProbe(settings())
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


def _watch(probe: "_StatusProbe", form: Format) -> None:
    if form is not Format.table:
        while True:
            write_json(probe.snapshot())
            time.sleep(_INTERVAL_S)
    with Live(_screen(probe.snapshot()), console=Console(highlight=False), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(_INTERVAL_S)
            live.update(_screen(probe.snapshot()), refresh=True)


class _StatusProbe:
    """Query both servers. Each query has a timeout."""

    def __init__(self, loaded: Settings) -> None:
        self._stats = BackendStats(loaded, patience_s=_TIMEOUT_S)
        self._errors: dict[str, EvalstoreError] = {}
        self._evaluations = self._stats.probe(event_store.count_by_status)
        self._replays = self._stats.probe(replay_jobs.running)
        self._groups = self._stats.probe(lambda conn: dead_letters.groups(conn, Selection()))

    def snapshot(self) -> Snapshot:
        """Return the data that `-o json` prints."""
        redis_stats, database_stats, self._errors = self._stats.status()
        now = datetime.now(UTC)
        snapshot: Snapshot = {
            "at": now,
            "release": release(),
            "servers": {"redis": _state(redis_stats), "postgresql": _state(database_stats)},
        }
        snapshot["errors"] = {name: " ".join(str(error).split()) for name, error in self._errors.items()}
        snapshot["doubts"] = (self._stats.doubts.get() or []) if database_stats is not None else []
        if redis_stats is not None:
            snapshot |= _redis_snapshot(redis_stats, now)
        if "schema" in self._errors:
            snapshot["servers"]["postgresql"] = "has other tables"
        elif database_stats is not None:
            self._add_database(snapshot, database_stats[1])
        return snapshot

    def _add_database(self, snapshot: Snapshot, numbers: Numbers) -> None:
        snapshot["confirmations"] = {
            "pending": int(numbers["evalstore_confirmations_pending",]),
            "oldest_age_s": round(numbers["evalstore_confirmations_oldest_age_seconds",], 1),
        }
        snapshot["redrives_running"] = int(numbers["evalstore_redrives_running",])
        snapshot["replays_running"] = [
            {name: row[name] for name in ("id", "evaluations", "total", "different", "write")}
            for row in self._replays.get() or []
        ]
        snapshot["evaluations"] = self._evaluations.get()
        groups = self._groups.get()
        if groups is not None:
            kept = sum(group["count"] for group in groups)
            snapshot["dead_letters"] = {"count": kept, "groups": groups}
            for queue in snapshot.get("queues", []):
                queue["dead"] += sum(group["count"] for group in groups if group["queue"] == queue["queue"])
                if queue["queue"] == QUEUE:
                    snapshot["queue"]["dead"] = queue["dead"]
        if (contents := self._stats.contents.get()) is not None:
            places = ("database", "objects", "archive")
            snapshot["contents"] = {
                place: {
                    "count": contents.get(("evalstore_contents", place), 0),
                    "bytes": contents.get(("evalstore_content_bytes", place), 0),
                }
                for place in places
            }
            snapshot["archive"] = {
                "due": contents["evalstore_archive_due_contents",],
                "due_bytes": contents["evalstore_archive_due_bytes",],
                "oldest_due_age_s": round(contents["evalstore_archive_oldest_due_age_seconds",], 1),
                "failing": contents["evalstore_archive_failing_contents",],
            }

    def raise_error(self) -> None:
        """Raise the error of a server that cannot be used, if there is one."""
        for error in self._errors.values():
            raise error


def _state(stats: object) -> str:
    return "away" if stats is None else "up"


def _redis_snapshot(stats: Any, now: datetime) -> Snapshot:
    queues = [
        {"queue": queue.name, **queue.messages, "oldest_age_s": round(queue.oldest_age_s, 1), "consumers": queue.consumers}
        for queue in stats.queues
    ]
    jobs = []
    for job in JOBS:
        last, success = stats.jobs.get(job.name, {}), stats.successes.get(job.name)
        upcoming = cron(job.schedule).next_valid_date(pendulum.instance(now))
        jobs.append(
            {
                "job": job.name,
                "outcome": last.get("outcome"),
                "last_run": last.get("started_at"),
                "last_success": datetime.fromtimestamp(success, UTC) if success else None,
                "next_run": datetime.fromtimestamp(upcoming.timestamp(), UTC),
                "error": last.get("error"),
            }
        )
    workers = sorted(stats.workers.values(), key=lambda worker: (worker["host"], worker["pid"]))
    return {
        "queue": next({state: row[state] for state in queue.messages} for row, queue in zip(queues, stats.queues, strict=True)),
        "queues": queues,
        "workers": workers,
        "events_per_s": round(sum(worker.get("events_per_s", 0) for worker in workers), 1),
        "outages": sorted({server for worker in workers for server in worker.get("away", [])}),
        "breaker_open": sum(bool(worker.get("breaker_open")) for worker in workers),
        "jobs": jobs,
    }


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
