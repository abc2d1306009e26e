"""`evalstore keys`: manage the keys of the HTTP service."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, TypeVar

import typer
from sqlalchemy import Engine

from evalstore.cli.dlq_options import ActorOption, ReasonOption, operator
from evalstore.cli.output import Format, OutputOption, failed, notice, show, write_json
from evalstore.storage import api_keys, database
from evalstore.storage.api_keys import Rate
from evalstore.storage.operator_actions import Intent
from evalstore.storage.visibility import Visibility
from models.settings import settings

app = typer.Typer(help="Create, list and revoke keys of the HTTP service.", no_args_is_help=True)

T = TypeVar("T")


class Scope(StrEnum):
    """A permission of a key."""

    read = "read"
    write = "write"
    admin = "admin"


def _engine() -> Engine:
    return database.connect(settings())


def _parser(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Return a parser of an option that reports ValueError as a wrong option."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    parsed.__name__ = parse.__name__
    return parsed


@app.command()
def create(  # noqa: PLR0913, PLR0917 - options
    name: Annotated[str, typer.Argument(help="Name of the key's owner, shown in lists.")],
    scope: Annotated[
        list[Scope] | None, typer.Option("--scope", help="What the key may do. May be repeated. admin includes the others.")
    ] = None,
    expires_in: Annotated[
        timedelta | None,
        typer.Option(parser=_parser(api_keys.parse_duration), metavar="90d|12h|30m", help="Time after which the key expires."),
    ] = None,
    submitter: Annotated[
        str | None,
        typer.Option(
            parser=_parser(api_keys.parse_submitter),
            metavar="NAME",
            help="Only evaluations of this submitter exist for the key.",
        ),
    ] = None,
    run_prefix: Annotated[
        str | None,
        typer.Option(
            parser=_parser(api_keys.parse_run_prefix),
            metavar="TEXT",
            help="Only evaluations of runs whose ids begin like this exist for it.",
        ),
    ] = None,
    rate: Annotated[
        Rate | None,
        typer.Option(
            parser=_parser(api_keys.parse_rate), metavar="100/s|50/m|9/h", help="Requests that all services together answer."
        ),
    ] = None,
    reason: ReasonOption = None,
    actor: ActorOption = "",
    output_format: OutputOption = Format.table,
) -> None:
    """Create a key and print it. It cannot be shown again: only its hash is stored."""
    if not scope:
        raise typer.BadParameter("give --scope read, --scope write or --scope admin")
    if not name.strip() or "\0" in name:
        raise typer.BadParameter("the name is empty")
    visibility = Visibility(submitter, run_prefix)
    if visibility.is_restricted and Scope.admin in scope:
        raise typer.BadParameter("a key with the scope admin cannot be restricted: leave out --submitter and --run-prefix")
    expires_at = datetime.now(UTC) + expires_in if expires_in else None
    intent = Intent("keys create", operator(actor), reason, {"name": name, "scopes": sorted(set(scope))})
    with _engine().connect() as conn:
        key, stored = api_keys.create(
            conn, name, sorted(set(scope)), expires_at, visibility=visibility, rate=rate, intent=intent
        )
    notice(f"key {stored.key_id}, {' and '.join(sorted(stored.scopes))}; it cannot be shown again")
    if output_format is Format.table:
        typer.echo(key)
    else:
        write_json({"key": key, **api_keys.row(stored)})


@app.command("list")
def list_keys(output_format: OutputOption = Format.table) -> None:
    """List all keys and their states, also expired and revoked keys."""
    with _engine().connect() as conn:
        rows = [api_keys.row(key) for key in api_keys.all_keys(conn)]
    if output_format is Format.table:
        for row in rows:
            prefix = f"{row['run_prefix']}*" if row["run_prefix"] else None
            limits = ", ".join(filter(None, (row["submitter"], prefix, row["rate"])))
            row["name"] += f" ({limits})" if limits else ""
            row |= {name: f"{row[name]:%Y-%m-%d %H:%MZ}" for name in ("created_at", "expires_at") if row[name]}
    columns = ["key_id", "name", "scopes", "state", "created_at", "expires_at"]
    nothing = "there are no keys; those of EVALSTORE_READ_API_KEYS and of the other settings are not listed"
    show(rows, columns, output_format, wrapped="name", nothing=nothing)


@app.command()
def revoke(
    key_ids: Annotated[list[str], typer.Argument(metavar="KEY_ID", help="Ids of keys, as `list` shows them.")],
    reason: ReasonOption = None,
    actor: ActorOption = "",
) -> None:
    """Revoke keys for good. A running service refuses them within 2 seconds."""
    with _engine().connect() as conn:
        revoked = api_keys.revoke(conn, key_ids, Intent("keys revoke", operator(actor), reason, {"key_ids": key_ids}))
    for key_id in sorted(revoked):
        notice(f"key {key_id} is revoked", "green")
    if missing := sorted(set(key_ids) - revoked):
        raise failed(f"there is no key {', '.join(missing)}", 4 if revoked else 3)
