"""`evalstore keys`: manage the keys of the HTTP service."""

import re
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

import typer
from sqlalchemy import Engine

from evalstore.cli.output import Format, OutputOption, failed, notice, show, write_json
from evalstore.storage import api_keys, database
from evalstore.storage.api_keys import Rate
from evalstore.storage.visibility import Visibility
from models.events import identity
from models.settings import settings

app = typer.Typer(help="Create, list and revoke keys of the HTTP service.", no_args_is_help=True)

_UNITS = {"m": "minutes", "h": "hours", "d": "days"}
_PERIODS_S = {"s": 1, "m": 60, "h": 3600}


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


def _rate(text: str) -> Rate:
    match = re.fullmatch(r"([1-9]\d{0,6})/([smh])", text, re.ASCII)
    if match is None:
        raise typer.BadParameter("expected a number of requests a second, minute or hour, like 100/s")
    return Rate(int(match[1]), _PERIODS_S[match[2]])


def _run_prefix(text: str) -> str:
    if identity({"eval_id": text})[0] is None and text not in {".", ".."}:
        raise typer.BadParameter("expected the beginning of run ids: 1 to 200 of A-Z a-z 0-9 . _ ~ : @ + = -")
    return text


def _submitter(text: str) -> str:
    if not 1 <= len(text) <= 1000 or "\0" in text:
        raise typer.BadParameter("expected 1 to 1,000 characters without NUL")
    return text


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Name of the key's owner, shown in lists.")],
    scope: Annotated[
        list[Scope] | None, typer.Option("--scope", help="What the key may do. May be repeated. admin includes the others.")
    ] = None,
    expires_in: Annotated[
        timedelta | None, typer.Option(parser=_duration, metavar="90d|12h|30m", help="Time after which the key expires.")
    ] = None,
    submitter: Annotated[
        str | None,
        typer.Option(parser=_submitter, metavar="NAME", help="Only evaluations of this submitter exist for the key."),
    ] = None,
    run_prefix: Annotated[
        str | None,
        typer.Option(
            parser=_run_prefix, metavar="TEXT", help="Only evaluations of runs whose ids begin like this exist for it."
        ),
    ] = None,
    rate: Annotated[
        Rate | None, typer.Option(parser=_rate, metavar="100/s|50/m|9/h", help="Requests that all services together answer.")
    ] = None,
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
    with _engine().connect() as conn:
        key, stored = api_keys.create(conn, name, sorted(set(scope)), expires_at, visibility=visibility, rate=rate)
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
            prefix = f"{row['run_prefix']}*" if row["run_prefix"] else None
            limits = ", ".join(filter(None, (row["submitter"], prefix, row["rate"])))
            row["name"] += f" ({limits})" if limits else ""
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
        "submitter": key.visibility.submitter,
        "run_prefix": key.visibility.run_prefix,
        "rate": _shown(key.rate) if key.rate else None,
        "state": "revoked" if key.revoked_at else "expired" if expired else "usable",
        "created_at": key.created_at,
        "expires_at": key.expires_at,
    }


def _shown(rate: Rate) -> str:
    units = {seconds: unit for unit, seconds in _PERIODS_S.items()}
    return f"{rate.requests}/{units.get(rate.period_s, f'{rate.period_s}s')}"
