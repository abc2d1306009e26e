"""`evalstore replay`: whether records are what their events give, and repairing those that are not."""

import time
from datetime import datetime
from typing import Annotated, Any

import typer

from evalstore.cli import output, replay_jobs
from evalstore.cli.dlq_options import ActorOption, ReasonOption, connect, operator, parse_time
from evalstore.cli.output import Format, OutputOption, escaped, failed, notice, progress_bar, write_json
from evalstore.storage import replay as replaying
from evalstore.storage.operator_actions import Intent
from evalstore.storage.replay import MAX_DIFFERENCES, Difference, Selection
from models.errors import Outage
from models.settings import settings


def replay(  # noqa: PLR0913 - options
    eval_ids: Annotated[list[str] | None, typer.Argument(metavar="EVAL_ID", help="Evaluations.")] = None,
    *,
    run_id: Annotated[str | None, typer.Option(help="Those of this run.")] = None,
    since: Annotated[
        datetime | None, typer.Option(parser=parse_time, help="Created since: RFC 3339 or 2h, 7d.", metavar="TIME")
    ] = None,
    until: Annotated[
        datetime | None, typer.Option(parser=parse_time, help="Created before: RFC 3339 or 2h, 7d.", metavar="TIME")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="All there are.")] = False,
    write: Annotated[bool, typer.Option("--write/--check", help="Repair the records that differ, or only compare.")] = False,
    after: Annotated[str, typer.Option(help="Only those after this eval_id: go on where another run ended.")] = "",
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.1, help=f"At most so many evaluations a second; in the background {replay_jobs.DEFAULT_RATE:g} by default."
        ),
    ] = None,
    background: Annotated[bool, typer.Option("--background", help="Let the workers do it, and do not wait.")] = False,
    parallel: Annotated[int, typer.Option(min=1, max=16, help="Jobs of --background that run at a time.")] = 2,
    show: Annotated[str, typer.Option(help="Show a replay of the background: its id, or how the id begins.")] = "",
    list_: Annotated[bool, typer.Option("--list", help="List the replays of the background.")] = False,
    cancel: Annotated[str, typer.Option(help="End a replay of the background.")] = "",
    reason: ReasonOption = None,
    actor: ActorOption = "",
    output_format: OutputOption = Format.table,
) -> None:
    """Compute records from their events, and compare them with those that are stored. Storing goes on meanwhile.

    A record that --write repairs keeps its version, gets a new ETag, and is confirmed as storage:evaluation:repaired.

    With --background, jobs of the workers do so. The same command again shows how far they came, and so does --show.

    Exit status of --check: 1 if any record differs. Of --write: 0 if all are repaired, else 1. 3 if nothing matches.
    """
    if list_ or show or cancel:
        _on_background(show, list_=list_, cancel=cancel, intent=(operator(actor), reason), output_format=output_format)
        return
    chosen = Selection(tuple(eval_ids) if eval_ids else None, run_id, since, until)
    if all_ == any(value is not None for value in chosen):
        raise typer.BadParameter("name evaluations by id or by a filter, or say --all")
    intent = Intent("replay", operator(actor), reason, chosen.words())
    if background:
        if after:
            raise typer.BadParameter("--after is for the foreground: a replay in the background goes on by itself")
        replay_jobs.start(chosen, intent, output_format, write=write, rate=rate, parallel=parallel)
        return
    replayed = _Replay(chosen, intent if write else None, after)
    try:
        replayed.run(rate, shown=output_format is Format.table)
    except (Outage, KeyboardInterrupt):
        notice(f"{replayed.evaluations:,} evaluations done; go on with --after {escaped(replayed.after)}", "red")
        raise
    _show(replayed, output_format)
    if not replayed.evaluations and not all_ and not after:
        raise failed("no evaluation matches", 3)
    if replayed.unrepairable:
        names = ", ".join(map(escaped, replayed.unrepairable[:20]))
        notice(f"{len(replayed.unrepairable):,} have no event in the log, and are left as they are: {names}", "red")
    if replayed.unrepairable if write else replayed.different:
        raise typer.Exit(1)


def _on_background(show: str, *, list_: bool, cancel: str, intent: tuple[str, str | None], output_format: Format) -> None:
    if list_ + bool(show) + bool(cancel) > 1:
        raise typer.BadParameter("say only one of --list, --show and --cancel")
    if list_:
        replay_jobs.list_all(output_format)
    elif show:
        replay_jobs.show_one(show, output_format)
    else:
        replay_jobs.cancel(cancel, *intent)


class _Replay:
    """A run of replay, as far as it has come."""

    def __init__(self, chosen: Selection, intent: Intent | None, after: str) -> None:
        self._chosen, self._intent = chosen, intent
        self.after = after
        self.evaluations = self.different = 0
        self.differences: list[Difference] = []
        self.unrepairable: list[str] = []

    def run(self, rate: float | None, *, shown: bool) -> None:
        """Compare the chosen records after `self.after`, and repair them. Raises DatabaseOutage."""
        started, limit = time.monotonic(), max(1, min(500, int(rate or 500)))
        with connect(settings()) as conn:
            total = replaying.count(conn, self._chosen, self.after)
            chosen = self._chosen._replace(last=replaying.last_id(conn))
            with progress_bar("replaying", total, shown=shown) as advance:
                while compared := replaying.compare(conn, chosen, self.after, limit):
                    for eval_id, differences in compared.different.items():
                        if self._intent and replaying.repair(conn, eval_id, self._intent) is None:
                            self.unrepairable.append(eval_id)
                        self.different += 1
                        self.differences += differences[: MAX_DIFFERENCES - len(self.differences)]
                    self.evaluations += compared.evaluations
                    self.after = compared.last
                    advance(compared.evaluations)
                    if rate:
                        time.sleep(max(0.0, started + self.evaluations / rate - time.monotonic()))


def _show(replayed: _Replay, output_format: Format) -> None:
    differences: list[dict[str, Any]] = [one._asdict() for one in replayed.differences]
    if output_format is Format.json:
        write_json(
            {
                "evaluations": replayed.evaluations,
                "equal": replayed.evaluations - replayed.different,
                "different": replayed.different,
                "differences": differences,
            }
        )
    elif differences or output_format is Format.jsonl:
        output.show(differences, ["eval_id", "field", "stored", "replayed"], output_format)
    notice(f"{replayed.evaluations:,} evaluations, {replayed.different:,} different", "red" if replayed.different else "green")
