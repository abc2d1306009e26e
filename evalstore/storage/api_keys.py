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

SCOPES: Final = ("read", "write", "admin")


class Key(NamedTuple):
    """A key as the database holds it."""

    key_id: str
    name: str
    digest: bytes
    scopes: frozenset[str]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


def digest(key: str) -> bytes:
    """Return the hash to store for a key.

    A key is long and random. So one SHA-256 is enough: no salt, no slow hash.
    """
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def including(scopes: Collection[str]) -> frozenset[str]:
    """Return all that a key of these scopes may do: admin includes the others."""
    return frozenset(SCOPES if "admin" in scopes else scopes)


_CREATE: Final = """
INSERT INTO api_keys (key_id, name, digest, scopes, expires_at) VALUES (%s, %s, %s, %s, %s) RETURNING created_at
"""


def create(conn: Connection, name: str, scopes: Sequence[str], expires_at: datetime | None = None) -> tuple[str, Key]:
    """Create a key. Return the key and the row stored for it. Commit.

    The key itself cannot be read again later. Raises DatabaseOutage (retry).
    """
    key_id = secrets.token_hex(6)
    key = f"evs_{key_id}_{secrets.token_hex(32)}"
    kept = digest(key)
    with database.errors(), conn.begin():
        values: list[Any] = [key_id, name, kept, sorted(scopes), expires_at]
        ((created_at,),) = database.driver(conn).execute(_CREATE, values).fetchall()
    return key, Key(key_id, name, kept, frozenset(scopes), created_at, expires_at, None)


_ALL: Final = "SELECT key_id, name, digest, scopes, created_at, expires_at, revoked_at FROM api_keys"
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
    return [Key._make((*row[:3], frozenset(row[3]), *row[4:])) for row in rows]


_REVOKE: Final = "UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE key_id = ANY(%s) RETURNING key_id"


def revoke(conn: Connection, key_ids: Sequence[str]) -> set[str]:
    """Revoke keys for good. Return the keys among them that exist. Commit. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        return {key_id for (key_id,) in database.driver(conn).execute(_REVOKE, [list(key_ids)]).fetchall()}
