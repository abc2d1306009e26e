"""`evalstore archive`: show, move, check, restore and sweep content."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from sqlalchemy import Connection

from evalstore.cli.dlq_options import ActorOption, ReasonOption, YesOption, confirm, connect, operator
from evalstore.cli.output import Format, OutputOption, failed, notice, progress_bar, show, write_json
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
    """Show where content is stored, what is due to move, and what failed to move and why.

    Content up to 4 KiB is stored in its event's row and is not counted.
    """
    loaded = settings()
    try:
        at = Archive.of(loaded)
    except InvalidSettings:
        at = None
    with connect(loaded) as conn:
        report = inventory.status(conn, at, datetime.now(UTC))
    addresses = {"objects": loaded.object_store_url, "archive": loaded.archive_url or loaded.object_store_url}
    for place in report["places"]:
        place["address"] = addresses.get(place["place"])
    if output_format is not Format.table:
        write_json({"archive": addresses["archive"], **report})
        return
    columns = ["place", "contents", "bytes", "address"]
    show(report["places"], columns, output_format, nothing="there is no content above 4 KiB")
    if at is None:
        notice("there is no archive: neither EVALSTORE_OBJECT_STORE_URL nor EVALSTORE_ARCHIVE_URL is set", "yellow")
    due = report["due"]
    oldest = f", the oldest stored at {due['oldest']:%Y-%m-%dT%H:%M:%SZ}" if due["oldest"] else ""
    notice(f"due to move: {due['contents']:,} contents, {due['bytes']:,} bytes{oldest}")
    if report["failures"]:
        notice(f"could not be moved: {report['failing']:,}", "red")
        columns = ["eval_id", "kind", "size", "failures", "retry_at", "failure"]
        show(report["failures"][:_TABLE_ROWS], columns, output_format)


@app.command()
def run(
    *,
    retry: Annotated[
        bool, typer.Option("--retry", help="Also content that failed before and waits for its next attempt.")
    ] = False,
    reason: ReasonOption = None,
    actor: ActorOption = "",
    output_format: OutputOption = Format.table,
) -> None:
    """Move all due content to the archive now. Workers do the same every minute; both may run at once.

    Exit status 4 if some could not be moved, 1 if none could.
    """
    loaded = settings()
    at, now = Archive.of(loaded), datetime.now(UTC)
    done = Moved()
    with connect(loaded) as conn:
        if retry:
            moving.retry_failed(conn, now)
        due = inventory.status(conn, at, now)["due"]
        try:
            with progress_bar("moving", due["bytes"], is_bytes=True, shown=output_format is Format.table) as advance:
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
            f"{_contents(done.failed)} could not be moved: `evalstore archive status` shows why", 4 if done.moved else 1
        )


@app.command()
def verify(
    *,
    sample: Annotated[int | None, typer.Option(min=1, help="Check only N objects, chosen at random.", metavar="N")] = None,
    output_format: OutputOption = Format.table,
) -> None:
    """Read every object that content refers to, and compare it with its hash. Changes nothing.

    Prints the damaged and missing objects. Exit status 4 if there are any, 1 if all are.
    """
    loaded = settings()
    stores = Stores(loaded)
    bad: list[dict[str, Any]] = []
    checked = 0
    with connect(loaded) as conn:
        total = inventory.count_objects(conn)
        shown = output_format is Format.table
        with progress_bar("checking", min(total, sample or total), is_bytes=False, shown=shown) as advance:
            for named in inventory.named_objects(conn, sample):
                state, problem = inventory.verify(stores, named)
                checked += 1
                advance(1)
                if state != "intact":
                    rows = inventory.rows_naming(conn, named)
                    contents = [{"eval_id": row[0], "event_id": row[1], "kind": row[2]} for row in rows]
                    problem_row = {"state": state, "store": named.place, "key": named.reference.key, "problem": problem}
                    bad.append(problem_row | {"contents": contents})
    if bad or output_format is not Format.table:
        show(bad, ["state", "store", "key", "contents"], output_format)
    if bad:
        raise failed(f"{len(bad):,} of {checked:,} objects are damaged or missing", 4 if len(bad) < checked else 1)
    notice(f"{checked:,} objects checked, all are intact", "green")


@app.command()
def restore(
    eval_ids: Annotated[
        list[str] | None, typer.Argument(metavar="EVAL_ID", help="Evaluations whose content is restored.")
    ] = None,
    *,
    all_: Annotated[bool, typer.Option("--all", help="All evaluations.")] = False,
    days: Annotated[float, typer.Option(min=0, max=36_500, help="Days before it may be archived again.")] = 30,
    reason: ReasonOption = None,
    actor: ActorOption = "",
    yes: YesOption = False,
    output_format: OutputOption = Format.table,
) -> None:
    """Restore content into the database. Its objects stay until the sweep removes them.

    Exit status 3 if nothing matches, 4 if some could not be restored, 1 if none could.
    """
    if bool(eval_ids) == all_:
        raise typer.BadParameter("name evaluations, or give --all")
    loaded = settings()
    stores, until = Stores(loaded), datetime.now(UTC) + timedelta(days=days)
    restored = size = 0
    bad: list[dict[str, Any]] = []
    with connect(loaded) as conn:
        total, total_bytes = content_restore.count(conn, eval_ids)
        if not total:
            raise failed("none of the content is in the object store or the archive", 3)
        if all_:
            confirm(f"Restore {_contents(total)}, {total_bytes:,} bytes, into the database", total, yes=yes)
        try:
            with progress_bar("restoring", total_bytes, is_bytes=True, shown=output_format is Format.table) as advance:
                for row in content_restore.find(conn, eval_ids):
                    try:
                        if content_restore.restore(conn, stores, row, until):
                            restored, size = restored + 1, size + row.size
                    except (ObjectDamaged, ObjectMissing) as error:
                        bad.append({"eval_id": row.eval_id, "kind": row.kind, "problem": f"{type(error).__name__}: {error}"})
                    advance(row.size)
        finally:
            intent = Intent("archive restore", operator(actor), reason, {"all": True} if all_ else {"eval_ids": eval_ids})
            operator_actions.note(conn, intent, restored, details={"bytes": size, "failed": len(bad), "days": days})
    if bad:
        show(bad, ["eval_id", "kind", "problem"], output_format)
    elif output_format is not Format.table:
        write_json({"restored": restored, "bytes": size})
    notice(f"{_contents(restored)} restored, {size:,} bytes", "green")
    if bad:
        raise failed(f"{_contents(len(bad))} could not be restored", 4 if restored else 1)


@app.command("sweep")
def sweep_objects(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the objects that would be removed.")] = False,
    reason: ReasonOption = None,
    actor: ActorOption = "",
    yes: YesOption = False,
    output_format: OutputOption = Format.table,
) -> None:
    """Remove objects older than EVALSTORE_SWEEP_GRACE_DAYS that no content, message or dead letter refers to.

    Workers do the same every day. Nothing is removed while a message has waited for more than a quarter of that time.
    """
    loaded = settings()
    targets = garbage_collect.targets(loaded)
    if not targets:
        raise InvalidSettings("EVALSTORE_OBJECT_STORE_URL: not set, so there is nothing to sweep")
    removable: list[dict[str, Any]] = []
    grace = timedelta(days=loaded.sweep_grace_days)
    with connect(loaded) as conn:
        for target in targets:
            _refuse_paused(_sweep(conn, target, grace, lambda listed: removable.append(listed._asdict()), remove=False))
        total = sum(listed["size"] for listed in removable)
        objects = f"{len(removable):,} objects, {total:,} bytes,"
        if dry_run or not removable:
            show(removable, ["key", "size", "modified_at"], output_format, nothing="there is nothing to remove")
            if removable:
                notice(f"{objects} would be removed")
            return
        confirm(f"Remove {objects} without references", len(removable), yes=yes)
        operator_actions.note(
            conn, Intent("archive sweep", operator(actor), reason, {}), len(removable), details={"bytes": total}
        )
        done = [_sweep(conn, target, grace, lambda _: None, remove=True) for target in targets]
    removed, size = sum(swept.removed for swept in done), sum(swept.bytes for swept in done)
    if output_format is not Format.table:
        write_json({"removed": removed, "bytes": size})
    notice(f"{removed:,} objects removed, {size:,} bytes", "green")
    for swept in done:
        _refuse_paused(swept)


def _sweep(conn: Connection, target: Target, grace: timedelta, watch: Callable[[Listed], None], *, remove: bool) -> Collected:
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


def _contents(count: int) -> str:
    return f"{count:,} content{'' if count == 1 else 's'}"
