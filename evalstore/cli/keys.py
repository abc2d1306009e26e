"""`evalstore keys`: manage the keys of the HTTP service."""

import re
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

import typer
from sqlalchemy import Engine

from evalstore.cli.output import Format, OutputOption, failed, notice, show, write_json
from evalstore.storage import api_keys, database
from models.settings import settings

app = typer.Typer(help="Create, list and revoke keys of the HTTP service.", no_args_is_help=True)

_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


class Scope(StrEnum):
    """A permission of a key."""

    read = "read"
    write = "write"
    admin = "admin"


def _engine() -> Engine:
    return database.connect(settings())


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"([1-9]\d{0,5})([mhd])", text, re.ASCII)
    if match is None:
        raise typer.BadParameter("expected a number of minutes, hours or days, like 90d")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Name of the key's owner, shown in lists.")],
    scope: Annotated[
        list[Scope] | None, typer.Option("--scope", help="What the key may do. May be repeated. admin includes the others.")
    ] = None,
    expires_in: Annotated[
        timedelta | None, typer.Option(parser=_duration, metavar="90d|12h|30m", help="Time after which the key expires.")
    ] = None,
    output_format: OutputOption = Format.table,
) -> None:
    """Create a key and print it. It cannot be shown again: only its hash is stored."""
    if not scope:
        raise typer.BadParameter("give --scope read, --scope write or --scope admin")
    if not name.strip() or "\0" in name:
        raise typer.BadParameter("the name is empty")
    expires_at = datetime.now(UTC) + expires_in if expires_in else None
    with _engine().connect() as conn:
        key, stored = api_keys.create(conn, name, sorted(set(scope)), expires_at)
    notice(f"key {stored.key_id}, {' and '.join(sorted(stored.scopes))}; it cannot be shown again")
    if output_format is Format.table:
        typer.echo(key)
    else:
        write_json({"key": key, **_row(stored)})


@app.command("list")
def list_keys(output_format: OutputOption = Format.table) -> None:
    """List all keys and their states, also expired and revoked keys."""
    with _engine().connect() as conn:
        rows = [_row(key) for key in api_keys.all_keys(conn)]
    if output_format is Format.table:
        for row in rows:
            row |= {name: f"{row[name]:%Y-%m-%d %H:%MZ}" for name in ("created_at", "expires_at") if row[name]}
    columns = ["key_id", "name", "scopes", "state", "created_at", "expires_at"]
    nothing = "there are no keys; those of EVALSTORE_READ_API_KEYS and of the other settings are not listed"
    show(rows, columns, output_format, wrapped="name", nothing=nothing)


@app.command()
def revoke(key_ids: Annotated[list[str], typer.Argument(metavar="KEY_ID", help="Ids of keys, as `list` shows them.")]) -> None:
    """Revoke keys for good. A running service refuses them within 2 seconds."""
    with _engine().connect() as conn:
        revoked = api_keys.revoke(conn, key_ids)
    for key_id in sorted(revoked):
        notice(f"key {key_id} is revoked", "green")
    if missing := sorted(set(key_ids) - revoked):
        raise failed(f"there is no key {', '.join(missing)}", 4 if revoked else 3)


def _row(key: api_keys.Key) -> dict[str, Any]:
    expired = key.expires_at is not None and key.expires_at <= datetime.now(UTC)
    return {
        "key_id": key.key_id,
        "name": key.name,
        "scopes": ",".join(sorted(key.scopes)),
        "state": "revoked" if key.revoked_at else "expired" if expired else "usable",
        "created_at": key.created_at,
        "expires_at": key.expires_at,
    }
