"""`evalstore erase`: remove evaluations everywhere, for good."""

from typing import Annotated, Any

import typer
from sqlalchemy import Connection

from evalstore.cli.dlq_options import ActorOption, YesOption, confirm, connect, operator
from evalstore.cli.output import Format, OutputOption, escaped, failed, notice, progress_bar, show, write_json
from evalstore.storage import erasure
from evalstore.storage.erasure import Erased, Selection, Surroundings
from evalstore.storage.operator_actions import Intent
from evalstore.telemetry import erasing
from models.settings import settings
from tasks.broker import broker


def erase(  # noqa: PLR0913 - options
    eval_ids: Annotated[list[str] | None, typer.Argument(metavar="EVAL_ID", help="Evaluations.")] = None,
    *,
    submitter: Annotated[str | None, typer.Option(help="All of this submitter that there are now.")] = None,
    run_id: Annotated[str | None, typer.Option(help="All of this run that there are now.")] = None,
    reapply: Annotated[
        bool, typer.Option("--reapply", help="Erase again what was erased before, after a restore of the database.")
    ] = False,
    reason: Annotated[str | None, typer.Option(help="Why; required, and kept with what was done.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the evaluations.")] = False,
    actor: ActorOption = "",
    yes: YesOption = False,
    output_format: OutputOption = Format.table,
) -> None:
    """Erase evaluations: records, events, content, dead letters and objects. Late events of theirs are not stored again.

    An object that something else may still name goes with the sweep. It may be repeated, such as after a crash.

    Exit status 3 if nothing matches, 4 if some ids never were, 1 while a process of an older release runs.
    """
    if sum(map(bool, [eval_ids, submitter is not None or run_id is not None, reapply])) != 1:
        raise typer.BadParameter("name evaluations, or say --submitter or --run-id, or --reapply")
    if not reapply and not dry_run and not (reason or "").strip():
        raise typer.BadParameter("--reason is required: say why")
    around = erasing.surroundings(settings(), broker())
    with connect(settings()) as conn:
        if reapply:
            _reapply(conn, Intent("erase", operator(actor), reason, {"reapply": True}), around, output_format)
            return
        if eval_ids:
            known = erasure.known(conn, eval_ids)
            chosen, missing = sorted(known), sorted({*eval_ids} - known)
        else:
            chosen, missing = erasure.find(conn, Selection(submitter, run_id)), []
        for eval_id in missing:
            notice(f"there is no evaluation {escaped(eval_id)!r}", "red")
        if not chosen:
            raise failed("no evaluation matches", 3)
        if dry_run:
            show([{"eval_id": eval_id} for eval_id in chosen], ["eval_id"], output_format)
            notice(f"{len(chosen):,} evaluations would be erased")
        else:
            erasing.refuse_older_processes(conn, broker())
            confirm(f"Erase {len(chosen):,} evaluations for good", len(chosen), yes=yes)
            given = {"eval_ids": eval_ids, "submitter": submitter, "run_id": run_id}
            words = {name: value for name, value in given.items() if value}
            _erase(conn, chosen, Intent("erase", operator(actor), reason, words), around, output_format)
    if missing:
        raise typer.Exit(4)


def _erase(conn: Connection, chosen: list[str], intent: Intent, around: Surroundings, output_format: Format) -> None:
    erasure.begin(conn, around.targets)
    done = Erased()
    with progress_bar("erasing", len(chosen), shown=output_format is Format.table) as advance:
        for eval_id in chosen:
            done.add(erasure.erase(conn, eval_id, intent, around))
            advance(1)
    _tell(done, around, output_format)


def _reapply(conn: Connection, intent: Intent, around: Surroundings, output_format: Format) -> None:
    erasing.refuse_older_processes(conn, broker())
    total, done = erasure.reapply(conn, intent, around)
    _tell(done, around, output_format, tombstones=total)


def _tell(done: Erased, around: Surroundings, output_format: Format, **more: Any) -> None:
    if output_format is not Format.table:
        write_json(vars(done) | more)
    notice(f"{done.evaluations:,} evaluations erased, with {done.events:,} events and {done.objects:,} objects", "green")
    if done.objects_left:
        notice(f"{done.objects_left:,} objects may still be named by something else, and go with the sweep", "yellow")
    if not around.targets:
        notice(
            "without an object store the tombstones are in the database alone: a restore brings erased evaluations back",
            "yellow",
        )
