"""`evalstore status`: how things stand, on one screen."""

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
from evalstore.storage import dead_letters, event_store
from evalstore.storage.dead_letters import Selection
from evalstore.storage.table_stats import Numbers
from evalstore.telemetry.backend_stats import BackendStats
from models.errors import EvalstoreError
from models.jobs import JOBS
from models.settings import settings
from tasks.actor import QUEUE
from tasks.tracing import release

_EVERY_S: Final = 2.0
_PATIENCE_S: Final = 5.0
_GROUPS: Final = 5
_WORKERS: Final = 8

Told = dict[str, Any]


def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep it fresh until Ctrl-C.")] = False,
    output_format: OutputOption = Format.table,
) -> None:
    """Show how things stand: queues, workers, outages, dead letters, the archive, the schedule.

    What a server that is away holds is left out, and the exit status is 7; 1 where the tables are of another release.
    """
    look = _Snapshot()
    if not watch:
        told = look.told()
        if output_format is Format.table:
            Console(highlight=False).print(_screen(told))
        else:
            write_json(told)
        look.raise_error()
        return
    with suppress(KeyboardInterrupt):
        _watch(look, output_format)


def _watch(look: "_Snapshot", form: Format) -> None:
    if form is not Format.table:
        while True:
            write_json(look.told())
            time.sleep(_EVERY_S)
    with Live(_screen(look.told()), console=Console(highlight=False), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(_EVERY_S)
            live.update(_screen(look.told()), refresh=True)


class _Snapshot:
    """Asks both servers, neither of which keeps it waiting."""

    def __init__(self) -> None:
        self._standing = BackendStats(settings(), patience_s=_PATIENCE_S)
        self._errors: dict[str, EvalstoreError] = {}
        self._evaluations = self._standing.probe(event_store.count_by_status)
        self._groups = self._standing.probe(lambda conn: dead_letters.groups(conn, Selection()))

    def told(self) -> Told:
        """As `-o json` prints it."""
        seen, answer, self._errors = self._standing.status()
        now = datetime.now(UTC)
        told: Told = {"at": now, "release": release(), "servers": {"redis": _state(seen), "postgresql": _state(answer)}}
        told["errors"] = {name: " ".join(str(error).split()) for name, error in self._errors.items()}
        told["doubts"] = (self._standing.doubts.get() or []) if answer is not None else []
        if seen is not None:
            told |= _of_redis(seen, now)
        if "schema" in self._errors:
            told["servers"]["postgresql"] = "has other tables"
        elif answer is not None:
            self._add_database(told, answer[1])
        return told

    def _add_database(self, told: Told, numbers: Numbers) -> None:
        told["confirmations"] = {
            "pending": int(numbers["evalstore_confirmations_pending",]),
            "oldest_age_s": round(numbers["evalstore_confirmations_oldest_age_seconds",], 1),
        }
        told["redrives_running"] = int(numbers["evalstore_redrives_running",])
        told["evaluations"] = self._evaluations.get()
        groups = self._groups.get()
        if groups is not None:
            kept = sum(group["count"] for group in groups)
            told["dead_letters"] = {"count": kept, "groups": groups}
            for queue in told.get("queues", []):
                queue["dead"] += sum(group["count"] for group in groups if group["queue"] == queue["queue"])
                if queue["queue"] == QUEUE:
                    told["queue"]["dead"] = queue["dead"]
        if (found := self._standing.contents.get()) is not None:
            places = ("database", "objects", "archive")
            told["contents"] = {
                place: {
                    "count": found.get(("evalstore_contents", place), 0),
                    "bytes": found.get(("evalstore_content_bytes", place), 0),
                }
                for place in places
            }
            told["archive"] = {
                "due": found["evalstore_archive_due_contents",],
                "due_bytes": found["evalstore_archive_due_bytes",],
                "oldest_due_age_s": round(found["evalstore_archive_oldest_due_age_seconds",], 1),
                "failing": found["evalstore_archive_failing_contents",],
            }

    def raise_error(self) -> None:
        """Raises what keeps a server from being used, if one cannot be."""
        for error in self._errors.values():
            raise error


def _state(answer: object) -> str:
    return "away" if answer is None else "up"


def _of_redis(seen: Any, now: datetime) -> Told:
    queues = [
        {"queue": one.name, **one.messages, "oldest_age_s": round(one.oldest_age_s, 1), "consumers": one.consumers}
        for one in seen.queues
    ]
    jobs = []
    for job in JOBS:
        last, success = seen.jobs.get(job.name, {}), seen.successes.get(job.name)
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
    workers = sorted(seen.workers.values(), key=lambda one: (one["host"], one["pid"]))
    return {
        "queue": next({state: row[state] for state in one.messages} for row, one in zip(queues, seen.queues, strict=True)),
        "queues": queues,
        "workers": workers,
        "events_per_s": round(sum(one.get("events_per_s", 0) for one in workers), 1),
        "outages": sorted({server for one in workers for server in one.get("away", [])}),
        "breaker_open": sum(bool(one.get("breaker_open")) for one in workers),
        "jobs": jobs,
    }


def _screen(told: Told) -> RenderableType:
    parts: list[RenderableType] = [_head(told)]
    if "queues" in told:
        rows = [row | {"oldest": age(row["oldest_age_s"])} for row in told["queues"]]
        parts += ["", _table(rows, ["queue", "ready", "inflight", "delayed", "dead", "oldest", "consumers"])]
        workers = [
            one
            | {"worker": f"{one['host'][-24:]} {one['pid']}", "waits_for": ", ".join(one.get("away", [])) or "-"}
            | {name: one.get(name, 0) for name in ("applied", "dead", "events_per_s")}
            | ({"state": "breaker open"} if one.get("breaker_open") else {})
            for one in told["workers"]
        ]
        columns = ["worker", "state", "threads", "events_per_s", "applied", "dead", "waits_for"]
        parts += ["", _table(workers[:_WORKERS], columns) if workers else Text("no worker runs", style="red")]
        if len(workers) > _WORKERS:
            parts.append(Text(f"and {len(workers) - _WORKERS} more"))
    if "dead_letters" in told:
        parts += ["", _letters(told["dead_letters"])]
    parts += ["", *(Text.assemble((f"{name:<15}", "bold"), escaped(what)) for name, what in _lines(told))]
    if "jobs" in told:
        now = told["at"]
        rows = [
            job
            | {"last_run": ago(job["last_run"], now), "last_success": ago(job["last_success"], now)}
            | {"next_run": f"in {age((job['next_run'] - now).total_seconds())}"}
            for job in told["jobs"]
        ]
        parts += ["", _table(rows, ["job", "outcome", "last_run", "last_success", "next_run"])]
    return Group(*parts)


def _head(told: Told) -> Text:
    head = Text.assemble(("evalstore", "bold"), f" {told['at']:%H:%M:%S}Z")
    for name, title in (("postgresql", "PostgreSQL"), ("redis", "Redis")):
        state = told["servers"][name]
        head.append(f"  {title} {state}", style="green" if state == "up" else "bold red")
    if "workers" in told:
        head.append(f"  {len(told['workers'])} worker processes  {told['events_per_s']:,g} events/s")
        if told["breaker_open"]:
            head.append("  breaker open", style="bold red")
    return head


def _letters(told: Told) -> RenderableType:
    if not told["count"]:
        return Text("no dead letters", style="green")
    rows = [
        {"dead_letters": one["signature"], **one, "error": f"{one['error_class']}: {one['error_message']}"}
        for one in told["groups"]
    ]
    table = _table(rows[:_GROUPS], ["dead_letters", "count", "error"], narrow="error")
    more = len(rows) - _GROUPS
    return Group(table, Text(f"and {more} more groups: evalstore dlq groups")) if more > 0 else table


def _lines(told: Told) -> list[tuple[str, str]]:
    found = [(name, what) for name, what in told["errors"].items()]
    found += [("doubt", f"PostgreSQL is not set up to keep what it commits: {doubt}") for doubt in told["doubts"]]
    if told.get("outages"):
        found.append(("outage", f"workers wait for {', '.join(told['outages'])}"))
    if "confirmations" in told:
        waiting = told["confirmations"]
        found.append(("confirmations", f"{waiting['pending']:,} pending, the oldest for {age(waiting['oldest_age_s'])}"))
    if told.get("redrives_running"):
        found.append(("redrives", f"{told['redrives_running']:,} running"))
    if told.get("evaluations") is not None:
        found.append(
            ("evaluations", ", ".join(f"{count:,} {name}" for name, count in sorted(told["evaluations"].items())) or "none")
        )
    if "contents" in told:
        places = told["contents"].items()
        found.append(("contents", ", ".join(f"{one['count']:,} in {name} ({_size(one['bytes'])})" for name, one in places)))
        due = told["archive"]
        what = f"{due['due']:,.0f} due ({_size(due['due_bytes'])}), the oldest for {age(due['oldest_due_age_s'])}"
        found.append(("archive", f"{what}, {due['failing']:,.0f} failing"))
    return found


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
