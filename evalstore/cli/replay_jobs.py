"""`evalstore replay --background`: start a replay in the workers, show how far it came, and cancel it."""

from typing import Any, Final
from uuid import uuid4

import typer
from sqlalchemy import Connection

from evalstore.cli.dlq_options import cells, connect, find_by_prefix
from evalstore.cli.output import Format, failed, notice, show, write_json
from evalstore.storage import replay, replay_jobs
from evalstore.storage.operator_actions import Intent
from evalstore.storage.replay import Selection
from models.errors import RedisOutage
from models.settings import settings
from tasks.broker import broker
from tasks.replays import ask

# Slow enough that storing keeps most of a small server.
DEFAULT_RATE: Final = 1000.0
_TABLE_ROWS: Final = 100


def start(chosen: Selection, intent: Intent, output_format: Format, *, write: bool, rate: float | None, parallel: int) -> None:
    """Start a replay in the workers, or show the running one of the same records. Raises Outage, Exit(3)."""
    wanted = uuid4()
    with connect(settings()) as conn:
        total = replay.count(conn, chosen)
        if not total and chosen != Selection():
            raise failed("no evaluation matches", 3)
        rate = DEFAULT_RATE if rate is None else rate
        replay_id = replay_jobs.begin(conn, wanted, chosen, intent, total=total, write=write, rate=rate, ranges=parallel)
        if replay_id != wanted:
            notice("a replay of the same records runs already")
        try:
            for one in replay_jobs.unfinished(conn, replay_id):
                ask(broker(), *one)
        except RedisOutage as error:
            notice(f"{error}: workers start the replay within a minute after Redis is back", "yellow")
        row = replay_jobs.between(conn, replay_id, replay_id)[0]
    if output_format is not Format.table:
        write_json(_shown(row))
    notice(f"replay {replay_id}: {_progress(row)}. `evalstore replay --show {replay_id}` shows it")


def list_all(output_format: Format) -> None:
    """List the replays in the background, the newest first. Raises Outage."""
    with connect(settings()) as conn:
        rows = replay_jobs.latest(conn, _TABLE_ROWS if output_format is Format.table else None)
    if output_format is not Format.table:
        show([_shown(row) for row in rows], [], output_format)
        return
    widths = {"id": 9, "asked_at": 12, "actor": 12, "state": 9, "evaluations": 12, "different": 9}
    short = [cells(row | {"id": f"{str(row['id'])[:8]}…"}, widths) for row in rows]
    show(short, list(widths), output_format, nothing="no replay ran in the background")


def show_one(text: str, output_format: Format) -> None:
    """Show a replay, by its id or the beginning of it. Raises Outage, Exit(3), and Exit(1) as in the foreground."""
    with connect(settings()) as conn:
        row = _find(conn, text)
        found = replay_jobs.differences(conn, row["id"])
    if output_format is Format.json:
        write_json(_shown(row) | {"differences": found})
    elif found or output_format is Format.jsonl:
        show(found, ["eval_id", "field", "stored", "replayed"], output_format)
    is_bad = row["state"] in {"cancelled", "failed"} or bool(row["unrepairable"] if row["write"] else row["different"])
    notice(_progress(row), "red" if is_bad else "green" if row["state"] == "done" else "")
    if is_bad and row["state"] != "running":
        raise typer.Exit(1)


def cancel(text: str, actor: str, reason: str | None) -> None:
    """End a running replay. Repaired records stay repaired. Raises Outage, Exit(3)."""
    with connect(settings()) as conn:
        row = _find(conn, text)
        intent = Intent("cancel", actor, reason, {"replay": str(row["id"])})
        is_ended = replay_jobs.end(conn, row["id"], "cancelled", None, intent)
    notice("cancelled" if is_ended else "the replay has ended already", "green" if is_ended else "")


def _find(conn: Connection, text: str) -> dict[str, Any]:
    row: dict[str, Any] | None = find_by_prefix(text, replay_jobs.between, conn)
    if row is None:
        raise failed(f"there is no replay {text!r}", 3)
    return row


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"equal": row["evaluations"] - row["different"]}


def _progress(row: dict[str, Any]) -> str:
    of_all = f" of about {row['total']:,}" if row["state"] == "running" else ""
    parts = [f"{row['state']}, {row['evaluations']:,}{of_all} evaluations, {row['different']:,} different"]
    if row["unrepairable"]:
        parts.append(f"{row['unrepairable']:,} without an event in the log")
    return ", ".join([*parts, *([row["error"]] if row["error"] else [])])
