"""`evalstore keys`: who may use the HTTP service."""

import re
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

import typer
from sqlalchemy import Engine

from evalstore.cli.output import Format, OutputOption, failed, notice, show, write_json
from evalstore.storage import api_keys, database
from models.settings import settings

app = typer.Typer(help="Keys of the HTTP service: create, list and revoke them.", no_args_is_help=True)

_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


class Scope(StrEnum):
    """What a key may do."""

    read = "read"
    write = "write"


def _engine() -> Engine:
    return database.connect(settings())


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"([1-9]\d{0,5})([mhd])", text, re.ASCII)
    if match is None:
        raise typer.BadParameter("expected a number of minutes, hours or days, like 90d")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose it is; shown in lists.")],
    scope: Annotated[list[Scope] | None, typer.Option("--scope", help="What it may do; may be repeated.")] = None,
    expires_in: Annotated[
        timedelta | None, typer.Option(parser=_duration, metavar="90d|12h|30m", help="When it ends by itself.")
    ] = None,
    output_format: OutputOption = Format.table,
) -> None:
    """Make a key and print it. It is shown this once: only a hash of it is kept."""
    if not scope:
        raise typer.BadParameter("give --scope read, --scope write, or both")
    if not name.strip() or "\0" in name:
        raise typer.BadParameter("give it a name")
    expires_at = datetime.now(UTC) + expires_in if expires_in else None
    with _engine().connect() as conn:
        key, kept = api_keys.create(conn, name, sorted(set(scope)), expires_at)
    notice(f"key {kept.key_id}, {' and '.join(sorted(kept.scopes))}; it is shown this once")
    if output_format is Format.table:
        typer.echo(key)
    else:
        write_json({"key": key, **_row(kept)})


@app.command("list")
def list_keys(output_format: OutputOption = Format.table) -> None:
    """Show all keys ever made, and what has become of them."""
    with _engine().connect() as conn:
        rows = [_row(key) for key in api_keys.all_keys(conn)]
    if output_format is Format.table:
        for row in rows:
            row |= {name: f"{row[name]:%Y-%m-%d %H:%MZ}" for name in ("created_at", "expires_at") if row[name]}
    columns = ["key_id", "name", "scopes", "state", "created_at", "expires_at"]
    nothing = "there are no keys but those of EVALSTORE_READ_API_KEYS and EVALSTORE_WRITE_API_KEYS, which are not listed"
    show(rows, columns, output_format, wrapped="name", nothing=nothing)


@app.command()
def revoke(key_ids: Annotated[list[str], typer.Argument(metavar="KEY_ID", help="As `list` shows them.")]) -> None:
    """Make keys worthless, for good. A running service knows within 2 seconds."""
    with _engine().connect() as conn:
        found = api_keys.revoke(conn, key_ids)
    for key_id in sorted(found):
        notice(f"key {key_id} is revoked", "green")
    if missing := sorted(set(key_ids) - found):
        raise failed(f"there is no key {', '.join(missing)}", 4 if found else 3)


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
