"""`evalstore anomalies`: what the anomaly detector found."""

from typing import Annotated, Final
from uuid import UUID

import typer
from sqlalchemy import Connection

from evalstore.cli.dlq_options import ActorOption, ReasonOption, find_by_prefix, operator
from evalstore.cli.output import Format, OutputOption, escaped, failed, notice, show, write_json
from evalstore.storage import anomalies, database
from evalstore.storage.anomalies import Anomaly, Filter
from evalstore.storage.operator_actions import Intent
from models.anomalies import ANOMALY_DIMENSIONS, ANOMALY_KINDS, ANOMALY_METRICS
from models.settings import settings

app = typer.Typer(help="See what the anomaly detector found, and acknowledge it.", no_args_is_help=True)

_COLUMNS: Final = ("id", "detected_at", "state", "kind", "dimension", "value", "metric", "expected", "observed", "occurrences")
_STATES: Final = ("open", "acknowledged")


def _connect() -> Connection:
    return database.connect(settings(), pool_size=1).connect()


@app.command()
def ls(
    state: Annotated[str | None, typer.Option(help="open or acknowledged.")] = None,
    kind: Annotated[str | None, typer.Option(help="drift or outlier.")] = None,
    dimension: Annotated[str | None, typer.Option(help="language, submitter or executor.")] = None,
    value: Annotated[str | None, typer.Option(help="The language, submitter or executor.")] = None,
    metric: Annotated[str | None, typer.Option(help=f"{', '.join(ANOMALY_METRICS[:-1])} or {ANOMALY_METRICS[-1]}.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 100,
    output_format: OutputOption = Format.table,
) -> None:
    """List findings, the newest first. Exits 3 if a filter matches nothing."""
    chosen = Filter(state, kind, dimension, value, metric)
    known = {"state": _STATES, "kind": ANOMALY_KINDS, "dimension": ANOMALY_DIMENSIONS, "metric": ANOMALY_METRICS}
    for name, values in known.items():
        if getattr(chosen, name) not in {None, *values}:
            raise typer.BadParameter(f"--{name}: expected {', '.join(values)}")
    with _connect() as conn:
        rows = [one._asdict() for one in anomalies.page(conn, chosen, limit)]
    show(rows, _COLUMNS, output_format, wrapped="value", nothing="there are no anomalies")
    if not rows and any(chosen):
        raise typer.Exit(3)


AnomalyArgument = Annotated[str, typer.Argument(metavar="ANOMALY_ID", help="An id, or its first 4 or more characters.")]


@app.command("show")
def show_anomaly(anomaly_id: AnomalyArgument, output_format: OutputOption = Format.table) -> None:
    """Show a finding with the evaluations that show it, and who acknowledged it."""
    with _connect() as conn:
        found = _find(conn, anomaly_id)
    if found is None:
        raise _missing(anomaly_id)
    row = found._asdict()
    if output_format is not Format.table:
        write_json(row)
        return
    values = row | {"eval_ids": "\n".join(found.eval_ids)}
    show([{"what": key.replace("_", " "), "value": value} for key, value in values.items()], ["what", "value"], output_format)


@app.command()
def ack(
    anomaly_ids: Annotated[list[str], typer.Argument(metavar="ANOMALY_ID…", help="Ids, or their first characters.")],
    reason: ReasonOption = None,
    actor: ActorOption = "",
) -> None:
    """Note that somebody has seen findings, and why they need nothing more. The alert ends when none is open."""
    done = 0
    with _connect() as conn:
        for text in anomaly_ids:
            found = _find(conn, text)
            intent = Intent("anomalies ack", operator(actor), reason, {"anomaly": str(found.id if found else text)})
            if found is None:
                notice(f"there is no anomaly {escaped(text)!r}", "red")
            elif anomalies.acknowledge(conn, found.id, intent):
                notice(f"anomaly {found.id} is acknowledged", "green")
                done += 1
            else:
                notice(f"anomaly {found.id} was acknowledged by {escaped(found.acknowledged_by)} already", "yellow")
                done += 1
    if done < len(anomaly_ids):
        raise typer.Exit(4 if done else 3)


def _find(conn: Connection, text: str) -> Anomaly | None:
    found: UUID | None = find_by_prefix(text, anomalies.between, conn)
    return None if found is None else anomalies.get(conn, UUID(str(found)))


def _missing(text: str) -> typer.Exit:
    return failed(f"there is no anomaly {escaped(text)!r}; `evalstore anomalies ls` lists them", 3)
