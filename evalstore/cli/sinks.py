"""`evalstore sinks`: how far other systems have come, and running, pausing and rewinding them."""

from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from sqlalchemy import Connection

from evalstore.cli.dlq_options import ActorOption, ReasonOption, operator, parse_time
from evalstore.cli.output import Format, OutputOption, age, escaped, failed, notice, show, write_json
from evalstore.storage import database, sink_cursors
from evalstore.storage.operator_actions import Intent
from evalstore.storage.sink_cursors import SinkStatus
from models.settings import settings

app = typer.Typer(help="Run, list, pause, resume and rewind sinks: systems that get all events.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="As `ls` shows it.")]
_COLUMNS = ("name", "type", "state", "position", "lag_events", "lag_s", "delivered", "dead", "last_error")
_FIRST = datetime(2000, 1, 1, tzinfo=UTC)  # before the first event of any installation


def _connect() -> Connection:
    return database.connect(settings(), pool_size=1).connect()


@app.command()
def run() -> None:
    """Keep runs and statistics, and pass events on to the sinks of EVALSTORE_SINKS_FILE, until SIGTERM or Ctrl-C.

    Any number of copies may run. Each sink is worked on by one of them at a time; another one takes over within 15 seconds when
    that one ends.
    """
    from evalstore.sinks import runner  # noqa: PLC0415 - the other verbs need neither sinks nor what they load

    runner.main()


@app.command()
def ls(output_format: OutputOption = Format.table) -> None:
    """List the sinks: state, position, lag, what was delivered, and the last error. `statistics` keeps runs and statistics."""
    with _connect() as conn:
        rows = [_row(sink) for sink in sink_cursors.statuses(conn)]
    nothing = "there are no sinks: start `evalstore sinks run`, with EVALSTORE_SINKS_FILE for sinks of your own"
    show(rows, _COLUMNS, output_format, wrapped="last_error", nothing=nothing)


@app.command("show")
def show_sink(name: NameArgument, output_format: OutputOption = Format.table) -> None:
    """Show all that is known of a sink, and what it will miss where it is paused for too long."""
    with _connect() as conn:
        found = sink_cursors.statuses(conn, name)
    if not found:
        raise _missing(name)
    (sink,) = found
    row = {**_row(sink), **{key: value for key, value in sink._asdict().items() if key not in _COLUMNS}}
    if output_format is not Format.table:
        write_json(row)
        return
    show([{"what": key.replace("_", " "), "value": value} for key, value in row.items()], ["what", "value"], output_format)
    if sink.state == "paused":
        notice(
            f"it is behind by {age(sink.lag_s)}. While it is paused the outbox does not wait for it: {sink.missed:,} changes"
            " left the outbox already. On `resume` their events come from the event log. Events that are retired or erased by"
            " then, and the erasures themselves, do not come.",
            "yellow",
        )


@app.command()
def pause(name: NameArgument, reason: ReasonOption = None, actor: ActorOption = "") -> None:
    """Pass nothing on to a sink until `resume`. What is being written to it is finished."""
    with _connect() as conn:
        intent = Intent("sinks pause", operator(actor), reason, {"sink": name})
        if not sink_cursors.set_state(conn, name, "paused", intent):
            raise _missing(name)
        (sink,) = sink_cursors.statuses(conn, name)
    notice(f"{escaped(name)} is paused at {sink.position:,}; the outbox keeps what it needs no longer", "yellow")


@app.command()
def resume(name: NameArgument, reason: ReasonOption = None, actor: ActorOption = "") -> None:
    """Go on with a paused sink, from where it was. What the outbox no longer holds comes from the event log."""
    with _connect() as conn:
        if not sink_cursors.set_state(conn, name, "running", Intent("sinks resume", operator(actor), reason, {"sink": name})):
            raise _missing(name)
    notice(f"{escaped(name)} goes on", "green")


@app.command()
def rewind(
    name: NameArgument,
    to: Annotated[str, typer.Option("--to", metavar="TIME|start", help="RFC 3339, an age like 2h or 7d, or `start`.")],
    reason: ReasonOption = None,
    actor: ActorOption = "",
) -> None:
    """Pass on again what was stored since a time, from the event log, and then go on with what is new."""
    when = _FIRST if to == "start" else parse_time(to)
    with _connect() as conn:
        intent = Intent("sinks rewind", operator(actor), reason, {"sink": name, "to": to})
        if not sink_cursors.rewind(conn, name, when, intent):
            raise _missing(name)
    notice(
        f"{escaped(name)} is filled from the event log, beginning with {'the first event' if to == 'start' else when}", "green"
    )


def _row(sink: SinkStatus) -> dict[str, Any]:
    return {name: getattr(sink, name) for name in _COLUMNS} | {"lag_s": round(sink.lag_s, 3)}


def _missing(name: str) -> typer.Exit:
    return failed(f"there is no sink {escaped(name)!r}; `evalstore sinks ls` lists them", 3)
