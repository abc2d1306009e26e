"""`evalstore archive`: where content is, moving it, checking it, bringing it back, and removing what nothing refers to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sqlalchemy import Connection

from evalstore.cli.dlq_options import ActorOption, ReasonOption, YesOption, confirm, connect, operator
from evalstore.cli.output import Format, OutputOption, failed, notice, notices, show, write_json
from evalstore.objects.frames import Listed
from evalstore.objects.object_store import Stores
from evalstore.storage import archive as moving
from evalstore.storage import content_restore, garbage_collect, inventory, operator_actions
from evalstore.storage.archive import Archive, Moved
from evalstore.storage.garbage_collect import Collected, Target
from evalstore.storage.operator_actions import Intent
from evalstore.telemetry import backlog
from models.errors import InvalidSettings, ObjectDamaged, ObjectMissing
from models.settings import settings
from tasks.broker import broker

app = typer.Typer(help="Content in the object store and the archive.", no_args_is_help=True)
_TABLE_ROWS = 100


@app.command()
def status(output_format: OutputOption = Format.table) -> None:
    """Show where content is, what is due to move, and what could not be moved and why.

    Content up to 4 KiB is part of its event's own row, and not counted.
    """
    try:
        at = Archive.of(settings())
    except InvalidSettings:
        at = None
    with connect() as conn:
        found = inventory.status(conn, at, datetime.now(UTC))
    names = {"objects": settings().object_store_url, "archive": settings().archive_url or settings().object_store_url}
    for place in found["places"]:
        place["address"] = names.get(place["place"])
    if output_format is not Format.table:
        write_json({"archive": names["archive"], **found})
        return
    columns = ["place", "contents", "bytes", "address"]
    show(found["places"], columns, output_format, nothing="there is no content above 4 KiB")
    if at is None:
        notice("there is no archive: neither EVALSTORE_OBJECT_STORE_URL nor EVALSTORE_ARCHIVE_URL is set", "yellow")
    due = found["due"]
    oldest = f", the oldest stored at {due['oldest']:%Y-%m-%dT%H:%M:%SZ}" if due["oldest"] else ""
    notice(f"due to move: {due['contents']:,} contents, {due['bytes']:,} bytes{oldest}")
    if found["failures"]:
        notice(f"could not be moved: {found['failing']:,}", "red")
        columns = ["eval_id", "kind", "size", "failures", "retry_at", "failure"]
        show(found["failures"][:_TABLE_ROWS], columns, output_format)


@app.command()
def run(
    *,
    retry: Annotated[bool, typer.Option("--retry", help="Also what failed before and waits to be tried again.")] = False,
    reason: ReasonOption = None,
    actor: ActorOption = "",
    output_format: OutputOption = Format.table,
) -> None:
    """Move all that is due to the archive now, as workers do every minute. It may run beside them.

    Exit status 4 if some could not be moved, 1 if none could.
    """
    at, now = Archive.of(settings()), datetime.now(UTC)
    done = Moved()
    with connect() as conn:
        if retry:
            moving.retry_failed(conn, now)
        due = inventory.status(conn, at, now)["due"]
        try:
            with _bar("moving", due["bytes"], is_bytes=True, shown=output_format is Format.table) as advance:
                done = moving.run_once(
                    conn, at, now, watch=lambda step, row: advance(row.size) if step in {"moved", "failed"} else None
                )
        finally:
            details = {"bytes": done.bytes, "failed": done.failed, "outage": str(done.outage or "")[:500] or None}
            intent = Intent("archive run", operator(actor), reason, {"retry": retry})
            operator_actions.note(conn, intent, done.moved, details=details)
    if output_format is not Format.table:
        write_json({"moved": done.moved, "bytes": done.bytes, "failed": done.failed})
    notice(f"{_contents(done.moved)} moved, {done.bytes:,} bytes", "green")
    if done.outage:
        raise done.outage
    if done.failed:
        raise failed(
            f"{_contents(done.failed)} could not be moved: `evalstore archive status` says why", 4 if done.moved else 1
        )


@app.command()
def verify(
    *,
    sample: Annotated[int | None, typer.Option(min=1, help="Only so many, picked at random.", metavar="N")] = None,
    output_format: OutputOption = Format.table,
) -> None:
    """Read every object that some content is, to its last byte, and compare it with its hash. Changes nothing.

    Prints what is damaged or missing. Exit status 4 if something is, 1 if everything is.
    """
    stores = Stores(settings())
    bad: list[dict[str, Any]] = []
    checked = 0
    with connect() as conn:
        total = inventory.count_objects(conn)
        shown = output_format is Format.table
        with _bar("checking", min(total, sample or total), is_bytes=False, shown=shown) as advance:
            for one in inventory.named_objects(conn, sample):
                state, problem = inventory.verify(stores, one)
                checked += 1
                advance(1)
                if state != "intact":
                    named = [
                        {"eval_id": row[0], "event_id": row[1], "kind": row[2]} for row in inventory.rows_naming(conn, one)
                    ]
                    bad.append(
                        {"state": state, "store": one.place, "key": one.reference.key, "problem": problem, "contents": named}
                    )
    if bad or output_format is not Format.table:
        show(bad, ["state", "store", "key", "contents"], output_format)
    if bad:
        raise failed(f"{len(bad):,} of {checked:,} objects are damaged or missing", 4 if len(bad) < checked else 1)
    notice(f"{checked:,} objects checked, all are right", "green")


@app.command()
def restore(
    eval_ids: Annotated[list[str] | None, typer.Argument(metavar="EVAL_ID", help="Evaluations.")] = None,
    *,
    all_: Annotated[bool, typer.Option("--all", help="All there are.")] = False,
    days: Annotated[float, typer.Option(min=0, max=36_500, help="For how long the archive leaves it there.")] = 30,
    reason: ReasonOption = None,
    actor: ActorOption = "",
    yes: YesOption = False,
    output_format: OutputOption = Format.table,
) -> None:
    """Bring content back into the database. Its objects stay until the sweep takes them.

    Exit status 3 if nothing matches, 4 if some could not be brought back, 1 if none could.
    """
    if bool(eval_ids) == all_:
        raise typer.BadParameter("name evaluations, or say --all")
    stores, until = Stores(settings()), datetime.now(UTC) + timedelta(days=days)
    back = size = 0
    bad: list[dict[str, Any]] = []
    with connect() as conn:
        total, total_bytes = content_restore.count(conn, eval_ids)
        if not total:
            raise failed("none of their content is in the object store or the archive", 3)
        if all_:
            confirm(f"Bring {_contents(total)}, {total_bytes:,} bytes, into the database", total, yes=yes)
        try:
            with _bar("restoring", total_bytes, is_bytes=True, shown=output_format is Format.table) as advance:
                for row in content_restore.find(conn, eval_ids):
                    try:
                        if content_restore.restore(conn, stores, row, until):
                            back, size = back + 1, size + row.size
                    except (ObjectDamaged, ObjectMissing) as error:
                        bad.append({"eval_id": row.eval_id, "kind": row.kind, "problem": f"{type(error).__name__}: {error}"})
                    advance(row.size)
        finally:
            intent = Intent("archive restore", operator(actor), reason, {"all": True} if all_ else {"eval_ids": eval_ids})
            operator_actions.note(conn, intent, back, details={"bytes": size, "failed": len(bad), "days": days})
    if bad:
        show(bad, ["eval_id", "kind", "problem"], output_format)
    elif output_format is not Format.table:
        write_json({"restored": back, "bytes": size})
    notice(f"{_contents(back)} restored, {size:,} bytes", "green")
    if bad:
        raise failed(f"{_contents(len(bad))} could not be restored", 4 if back else 1)


@app.command("sweep")
def sweep_objects(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
    reason: ReasonOption = None,
    actor: ActorOption = "",
    yes: YesOption = False,
    output_format: OutputOption = Format.table,
) -> None:
    """Remove objects older than EVALSTORE_SWEEP_GRACE_DAYS that no content, message or dead letter refers to.

    Workers do so day by day. Nothing is removed while a message has waited for longer than a quarter of that time.
    """
    targets = garbage_collect.targets(settings())
    if not targets:
        raise InvalidSettings("EVALSTORE_OBJECT_STORE_URL: not set, so there is nothing to sweep")
    found: list[dict[str, Any]] = []
    with connect() as conn:
        for target in targets:
            _refuse_paused(_sweep(conn, target, lambda one: found.append(one._asdict()), remove=False))
        total = sum(one["size"] for one in found)
        what = f"{len(found):,} objects, {total:,} bytes,"
        if dry_run or not found:
            show(found, ["key", "size", "modified_at"], output_format, nothing="there is nothing to remove")
            if found:
                notice(f"{what} would be removed")
            return
        confirm(f"Remove {what} to which nothing refers", len(found), yes=yes)
        operator_actions.note(conn, Intent("archive sweep", operator(actor), reason, {}), len(found), details={"bytes": total})
        done = [_sweep(conn, target, lambda _: None, remove=True) for target in targets]
    removed, size = sum(one.removed for one in done), sum(one.bytes for one in done)
    if output_format is not Format.table:
        write_json({"removed": removed, "bytes": size})
    notice(f"{removed:,} objects removed, {size:,} bytes", "green")
    for one in done:
        _refuse_paused(one)


def _sweep(conn: Connection, target: Target, watch: Callable[[Listed], None], *, remove: bool) -> Collected:
    grace = timedelta(days=settings().sweep_grace_days)
    longest_s = garbage_collect.longest_wait(grace).total_seconds()
    return garbage_collect.run_once(
        conn,
        target,
        datetime.now(UTC),
        grace,
        lambda: backlog.snapshot(broker(), broker().spool, longest_s=longest_s),
        remove=remove,
        watch=watch,
    )


def _refuse_paused(done: Collected) -> None:
    if done.paused:
        raise failed(f"not swept: {done.paused}", 1)


@contextmanager
def _bar(what: str, total: int, *, is_bytes: bool, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar for a terminal."""
    if not shown or not notices.is_terminal:
        yield lambda _: None
        return
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn() if is_bytes else MofNCompleteColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=notices) as progress:
        task = progress.add_task(what, total=total)
        yield lambda by: progress.advance(task, by)


def _contents(count: int) -> str:
    return f"{count:,} content{'' if count == 1 else 's'}"
