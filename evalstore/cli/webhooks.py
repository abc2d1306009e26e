"""`evalstore webhooks`: subscriptions to confirmations over HTTP, and what was sent to them."""

import time
from typing import Annotated, Any, Final
from uuid import UUID

import typer
from sqlalchemy import Connection

from evalstore.cli.dlq_options import ActorOption, ReasonOption, YesOption, confirm, find_by_prefix, operator
from evalstore.cli.output import Format, OutputOption, escaped, failed, notice, show, write_json
from evalstore.storage import database, webhook_deliveries, webhooks
from evalstore.storage.operator_actions import Intent
from evalstore.storage.webhook_deliveries import Delivery
from evalstore.storage.webhooks import Webhook
from models.errors import InvalidEvent
from models.networks import parse_networks
from models.settings import settings
from models.webhooks import now, parse_rotation, parse_subscription

app = typer.Typer(help="Subscribe HTTP receivers to confirmations, and see what they got.", no_args_is_help=True)

WebhookArgument = Annotated[str, typer.Argument(metavar="WEBHOOK_ID", help="An id, or its first 4 or more characters.")]
_COLUMNS: Final = ("id", "url", "state", "pending", "delivered", "failed", "last_error")
_DELIVERY_COLUMNS: Final = ("id", "type", "eval_id", "version", "state", "attempts", "status_code", "created_at", "error")
_LOOK_S: Final = 0.1


def _connect() -> Connection:
    return database.connect(settings(), pool_size=1).connect()


def _id(conn: Connection, text: str) -> UUID:
    found = find_by_prefix(text, webhooks.between, conn)
    if found is None:
        raise failed(f"there is no webhook {escaped(text)!r}; `evalstore webhooks ls` lists them", 3)
    return UUID(str(found))


@app.command()
def ls(output_format: OutputOption = Format.table) -> None:
    """List the subscriptions: where they lead, their state, and what was delivered."""
    with _connect() as conn:
        rows = [one._asdict() for one in webhooks.all_webhooks(conn)]
    show(rows, _COLUMNS, output_format, wrapped="url", nothing="there are no webhooks")


@app.command()
def create(  # noqa: PLR0913, PLR0917 - as many as there are options
    url: Annotated[str, typer.Argument(help="https; http for networks in EVALSTORE_WEBHOOK_ALLOW alone.")],
    event_type: Annotated[
        list[str] | None, typer.Option(help="Only these types, of events or of confirmations; may be repeated.")
    ] = None,
    status: Annotated[list[str] | None, typer.Option(help="Only evaluations in this status; may be repeated.")] = None,
    run_id: Annotated[str | None, typer.Option(help="Only evaluations of this run.")] = None,
    submitter: Annotated[str | None, typer.Option(help="Only evaluations of this submitter.")] = None,
    secret: Annotated[
        str | None, typer.Option(envvar="EVALSTORE_WEBHOOK_SECRET", help="whsec_…; by default a new one is made.")
    ] = None,
    reason: ReasonOption = None,
    actor: ActorOption = "",
    output_format: OutputOption = Format.table,
) -> None:
    """Subscribe an address to confirmations, and print its secret. It is shown this once."""
    given = {"url": url, "run_id": run_id, "submitter": submitter, "secret": secret}
    networks = parse_networks(settings().webhook_allow or "")
    try:
        subscription, kept = parse_subscription(given | {"event_types": event_type or [], "statuses": status or []}, networks)
    except InvalidEvent as error:
        raise typer.BadParameter(str(error)) from error
    with _connect() as conn:
        intent = Intent("webhooks create", operator(actor), reason, {"url": url})
        found = webhooks.get(conn, webhooks.create(conn, subscription, kept, intent))
    _show_secret(found._asdict() if found else {}, kept, output_format)
    notice("a sink of type webhook delivers to it: see `evalstore sinks ls`")


def _show_secret(row: dict[str, Any], secret: str, output_format: Format) -> None:
    notice(f"webhook {row.get('id')}; its secret is shown this once")
    if output_format is Format.table:
        typer.echo(secret)
    else:
        write_json({**row, "secret": secret})


@app.command()
def rm(webhook_id: WebhookArgument, yes: YesOption = False, reason: ReasonOption = None, actor: ActorOption = "") -> None:
    """Remove a subscription, with what is pending for it and its history."""
    with _connect() as conn:
        found = _get(conn, _id(conn, webhook_id))
        confirm(f"remove the webhook {found.id} to {escaped(found.url)}", 1, yes=yes)
        webhooks.delete(conn, found.id, _intent("rm", found.id, reason, actor))
    notice(f"webhook {found.id} is removed", "green")


def _get(conn: Connection, webhook_id: UUID) -> Webhook:
    found = webhooks.get(conn, webhook_id)
    if found is None:
        raise failed(f"there is no webhook {webhook_id}", 3)
    return found


def _intent(verb: str, webhook_id: UUID, reason: str | None, actor: str) -> Intent:
    return Intent(f"webhooks {verb}", operator(actor), reason, {"webhook": str(webhook_id)})


@app.command()
def rotate(
    webhook_id: WebhookArgument,
    overlap_s: Annotated[float, typer.Option(help="Seconds for which the old secret signs, too.")] = 86_400,
    reason: ReasonOption = None,
    actor: ActorOption = "",
    output_format: OutputOption = Format.table,
) -> None:
    """Make a new secret and print it. It is shown this once."""
    try:
        secret, seconds = parse_rotation({"overlap_s": overlap_s})
    except InvalidEvent as error:
        raise typer.BadParameter(str(error)) from error
    with _connect() as conn:
        found = _id(conn, webhook_id)
        until = webhooks.rotate(conn, found, secret, seconds, _intent("rotate", found, reason, actor))
    _show_secret({"id": found, "previous_valid_until": until}, secret, output_format)


@app.command()
def enable(webhook_id: WebhookArgument, reason: ReasonOption = None, actor: ActorOption = "") -> None:
    """Deliver again to a disabled subscription, beginning with what is pending."""
    with _connect() as conn:
        found = _id(conn, webhook_id)
        webhooks.enable(conn, found, _intent("enable", found, reason, actor))
    notice(f"webhook {found} is active", "green")


@app.command("test")
def send_test(
    webhook_id: WebhookArgument,
    wait_s: Annotated[float, typer.Option(min=0, help="Seconds to wait for the outcome.")] = 30,
    reason: ReasonOption = None,
    actor: ActorOption = "",
    output_format: OutputOption = Format.table,
) -> None:
    """Have the sinks process send a test, and wait for its outcome. Exits 1 unless the receiver takes it."""
    with _connect() as conn:
        found = _id(conn, webhook_id)
        delivery_id = webhook_deliveries.queue_test(conn, found, _intent("test", found, reason, actor), now())
        if delivery_id is None:
            raise failed(f"webhook {found} is disabled: `evalstore webhooks enable {found}` first", 1)
        delivery = _wait(conn, found, delivery_id, wait_s)
    show([delivery._asdict()], _DELIVERY_COLUMNS, output_format, wrapped="error")
    if delivery.state == "pending":
        raise failed(f"it was not sent within {wait_s:g} s: does `evalstore sinks run` run, with a sink of type webhook?", 1)
    if delivery.state == "failed":
        raise typer.Exit(1)


def _wait(conn: Connection, webhook_id: UUID, delivery_id: UUID, wait_s: float) -> Delivery:
    give_up = time.monotonic() + wait_s
    while True:
        found = webhook_deliveries.history(conn, webhook_id, limit=1, delivery_id=delivery_id)
        if not found:
            raise failed(f"there is no webhook {webhook_id} any more", 3)
        if found[0].state != "pending" or time.monotonic() > give_up:
            return found[0]
        time.sleep(_LOOK_S)


@app.command()
def deliveries(
    webhook_id: WebhookArgument,
    state: Annotated[str | None, typer.Option(help="pending, delivered or failed.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 100,
    output_format: OutputOption = Format.table,
) -> None:
    """Show the latest deliveries of a subscription, the newest first."""
    if state not in {None, "pending", "delivered", "failed"}:
        raise typer.BadParameter("--state: expected pending, delivered or failed")
    with _connect() as conn:
        found = webhook_deliveries.history(conn, _id(conn, webhook_id), limit=limit, state=state)
    show([one._asdict() for one in found], _DELIVERY_COLUMNS, output_format, wrapped="error", nothing="there are no deliveries")


@app.command()
def redeliver(
    webhook_id: WebhookArgument,
    delivery_ids: Annotated[list[UUID], typer.Argument(metavar="DELIVERY_ID", help="As `deliveries` shows them.")],
    reason: ReasonOption = None,
    actor: ActorOption = "",
) -> None:
    """Send settled deliveries of an active subscription once more."""
    with _connect() as conn:
        found = _id(conn, webhook_id)
        intent = _intent("redeliver", found, reason, actor)
        missing = [one for one in delivery_ids if not webhook_deliveries.redeliver(conn, found, one, intent, now())]
    for one_id in missing:
        notice(f"not sent again: {one_id} is no settled delivery of an active webhook", "red")
    if missing:
        raise typer.Exit(4 if len(missing) < len(delivery_ids) else 3)
