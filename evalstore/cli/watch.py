"""`evalstore watch`."""

import sys
import time
from typing import Annotated, Any, Final

import typer

from evalstore.cli.output import Format, OutputOption, escaped, failed, notice, write_json
from evalstore.storage import database, records
from models.errors import DatabaseOutage
from models.events import identity
from models.settings import settings

_POLL_S: Final = 0.2
_SHOWN: Final = ("eval_id", "version", "status", "attempt", "executor_id", "exit_code", "duration_ms", "score", "updated_at")
_UNFINISHED: Final = ("queued", "running")


def watch(
    eval_id: Annotated[str, typer.Argument(help="Id of the evaluation.")],
    timeout_s: Annotated[
        float | None, typer.Option("--timeout", min=0, metavar="SECONDS", help="Exit with status 1 if it is not finished then.")
    ] = None,
    output_format: OutputOption = Format.table,
) -> None:
    """Show each change of an evaluation until it is finished.

    Changes within a fifth of a second show as one. Exit status: 0 it is finished or lost, 1 not in time, 3 there is none.
    """
    engine = database.connect(settings())
    give_up = None if timeout_s is None else time.monotonic() + timeout_s
    seen, is_away = "", False
    is_possible = identity({"eval_id": eval_id})[0] is not None  # Other ids cannot be stored.
    while True:
        try:
            with engine.connect() as conn:
                row_version = records.row_versions(conn, [eval_id]).get(eval_id) if is_possible else None
                record = records.load(conn, eval_id) if row_version not in {None, seen} else None
            is_away = False
        except DatabaseOutage as error:
            if not seen:
                raise
            if not is_away:
                notice(f"PostgreSQL is away; watching goes on: {error}", "yellow")
            is_away, row_version, record = True, seen, None
        if row_version is None:
            raise failed(f"there is no evaluation {eval_id!r}", 3)
        if record is not None:
            seen = row_version
            _show({name: record.fields[name] for name in _SHOWN}, output_format)
            if record.fields["status"] not in _UNFINISHED:
                return
        if give_up is not None and time.monotonic() >= give_up:
            raise failed(f"evaluation {eval_id!r} is not finished after {timeout_s:g} s", 1)
        time.sleep(_POLL_S)


def _show(state: dict[str, Any], output_format: Format) -> None:
    if output_format is not Format.table:
        write_json(state)
        sys.stdout.flush()
        return
    known = [f"{name} {escaped(state[name])}" for name in _SHOWN[3:-1] if state[name] is not None]
    typer.echo(f"{state['updated_at']:%H:%M:%S}  {state['status']:<10} version {state['version']}  {'  '.join(known)}".rstrip())
