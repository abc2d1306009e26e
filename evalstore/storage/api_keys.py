"""Keep the keys of the HTTP service.

The database holds the SHA-256 of each key. A reader of the database cannot use the keys.
"""

import hashlib
import secrets
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection

from evalstore.storage import database
from evalstore.storage.visibility import EVERYTHING, Visibility

SCOPES: Final = ("read", "write", "admin")


class Rate(NamedTuple):
    """A number of requests in a period."""

    requests: int
    period_s: int


class Key(NamedTuple):
    """A key as the database holds it. `visibility`: the evaluations that it may see and write."""

    key_id: str
    name: str
    digest: bytes
    scopes: frozenset[str]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    visibility: Visibility = EVERYTHING
    rate: Rate | None = None


def digest(key: str) -> bytes:
    """Return the hash to store for a key.

    A key is long and random. So one SHA-256 is enough: no salt, no slow hash.
    """
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def including(scopes: Collection[str]) -> frozenset[str]:
    """Return all that a key of these scopes may do: admin includes the others."""
    return frozenset(SCOPES if "admin" in scopes else scopes)


_CREATE: Final = """
INSERT INTO api_keys (key_id, name, digest, expires_at, submitter, run_prefix, rate_requests, rate_period_s, scopes,
    restricted_scopes)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s) RETURNING created_at
"""


def create(
    conn: Connection,
    name: str,
    scopes: Sequence[str],
    expires_at: datetime | None = None,
    *,
    visibility: Visibility = EVERYTHING,
    rate: Rate | None = None,
) -> tuple[str, Key]:
    """Create a key. Return the key and the row stored for it. Commit.

    The key itself cannot be read again later. Raises ValueError for a restricted key with the scope admin, whose requests
    concern everything. Raises DatabaseOutage (retry).
    """
    if visibility.is_restricted and "admin" in scopes:
        raise ValueError("a key with the scope admin cannot be restricted")
    key_id = secrets.token_hex(6)
    key = f"evs_{key_id}_{secrets.token_hex(32)}"
    kept, granted = digest(key), sorted(scopes)
    # A service of the release before ignores restrictions. So it must find no scope in the row.
    places: list[Any] = [[], granted] if visibility.is_restricted else [granted, None]
    values = [key_id, name, kept, expires_at, visibility.submitter, visibility.run_prefix, *(rate or (None, None)), *places]
    with database.errors(), conn.begin():
        ((created_at,),) = database.driver(conn).execute(_CREATE, values).fetchall()
    return key, Key(key_id, name, kept, frozenset(scopes), created_at, expires_at, None, visibility, rate)


_ALL: Final = """
SELECT key_id, name, digest, coalesce(restricted_scopes, scopes), created_at, expires_at, revoked_at,
    submitter, run_prefix, rate_requests, rate_period_s
FROM api_keys
"""
_USABLE: Final = f"{_ALL} WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())"


def usable(conn: Connection) -> list[Key]:
    """Return the keys that are neither revoked nor expired. Raises DatabaseOutage (retry)."""
    return _keys(conn, _USABLE)


def all_keys(conn: Connection) -> list[Key]:
    """Return all keys, also revoked and expired keys, oldest first. Raises DatabaseOutage (retry)."""
    return _keys(conn, f"{_ALL} ORDER BY created_at, key_id")


def _keys(conn: Connection, query: str) -> list[Key]:
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        rows = cursor.execute(query.encode()).fetchall()
    return [
        Key._make((*row[:3], frozenset(row[3]), *row[4:7], Visibility(*row[7:9]), Rate(*row[9:]) if row[9] else None))
        for row in rows
    ]


_REVOKE: Final = "UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE key_id = ANY(%s) RETURNING key_id"


def revoke(conn: Connection, key_ids: Sequence[str]) -> set[str]:
    """Revoke keys for good. Return the keys among them that exist. Commit. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        return {key_id for (key_id,) in database.driver(conn).execute(_REVOKE, [list(key_ids)]).fetchall()}
