"""Keys of the HTTP service. The database holds their SHA-256: who reads it cannot use them."""

import hashlib
import secrets
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection

from evalstore.storage import database

SCOPES: Final = ("read", "write", "admin")


class Key(NamedTuple):
    """A key as it is kept."""

    key_id: str
    name: str
    digest: bytes
    scopes: frozenset[str]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


def digest(key: str) -> bytes:
    """What is kept of a key. It is random and long, so one SHA-256 is all it needs."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def including(scopes: Collection[str]) -> frozenset[str]:
    """Return all that a key of these scopes may do: admin includes the others."""
    return frozenset(SCOPES if "admin" in scopes else scopes)


_CREATE: Final = """
INSERT INTO api_keys (key_id, name, digest, scopes, expires_at) VALUES (%s, %s, %s, %s, %s) RETURNING created_at
"""


def create(conn: Connection, name: str, scopes: Sequence[str], expires_at: datetime | None = None) -> tuple[str, Key]:
    """A new key and what is kept of it; the key itself cannot be shown again. Commits. Raises DatabaseOutage (retry)."""
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
    """Those neither revoked nor expired. Raises DatabaseOutage (retry)."""
    return _keys(conn, _USABLE)


def all_keys(conn: Connection) -> list[Key]:
    """Every key ever created, oldest first. Raises DatabaseOutage (retry)."""
    return _keys(conn, f"{_ALL} ORDER BY created_at, key_id")


def _keys(conn: Connection, query: str) -> list[Key]:
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        rows = cursor.execute(query.encode()).fetchall()
    return [Key._make((*row[:3], frozenset(row[3]), *row[4:])) for row in rows]


_REVOKE: Final = "UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE key_id = ANY(%s) RETURNING key_id"


def revoke(conn: Connection, key_ids: Sequence[str]) -> set[str]:
    """Make these keys worthless for good; returns those of them that exist. Commits. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        return {key_id for (key_id,) in database.driver(conn).execute(_REVOKE, [list(key_ids)]).fetchall()}
