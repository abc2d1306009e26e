"""Sessions of the console, and links that sign in once.

A session belongs to a key: the caller checks at each request that the key is still valid. The database holds the SHA-256 of
cookies and links, so that a reader of the database cannot use them.
"""

import secrets
from datetime import timedelta
from typing import Final

from sqlalchemy import Connection

from evalstore.storage import database
from evalstore.storage.api_keys import digest

IDLE: Final = timedelta(hours=1)
LONGEST: Final = timedelta(hours=12)
LINK: Final = timedelta(hours=1)
_TOUCHED: Final = timedelta(minutes=1)  # a session notes its use this often

_PRUNE: Final = "DELETE FROM console_sessions WHERE used_at < now() - %s OR created_at < now() - %s"
_BEGIN: Final = "INSERT INTO console_sessions (digest, key_id) VALUES (%s, %s)"


def begin(conn: Connection, key_id: str) -> str:
    """Begin a session of a key. Return its token, and remove sessions that are over. Commit. Raises DatabaseOutage (retry)."""
    token = secrets.token_urlsafe(32)
    with database.errors(), conn.begin():
        raw = database.driver(conn)
        raw.execute(_PRUNE, [IDLE, LONGEST])
        raw.execute(_BEGIN, [digest(token), key_id])
    return token


_FIND: Final = """
SELECT key_id, used_at < now() - %s FROM console_sessions
WHERE digest = %s AND used_at > now() - %s AND created_at > now() - %s
"""
_TOUCH: Final = "UPDATE console_sessions SET used_at = now() WHERE digest = %s"


def find(conn: Connection, token: str) -> str | None:
    """Return the id of the key of a session, None if the session is over. Commit. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        raw = database.driver(conn)
        row = raw.execute(_FIND, [_TOUCHED, digest(token), IDLE, LONGEST]).fetchone()
        if row is None:
            return None
        key_id, is_old = row
        if is_old:
            raw.execute(_TOUCH, [digest(token)])
    return str(key_id)


def end(conn: Connection, token: str) -> None:
    """End a session. Commit. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        database.driver(conn).execute("DELETE FROM console_sessions WHERE digest = %s", [digest(token)])


def create_link(conn: Connection, key_id: str) -> str:
    """Return the token of a link that signs in once as a key, within LINK. Commit. Raises DatabaseOutage (retry)."""
    token = secrets.token_urlsafe(32)
    with database.errors(), conn.begin():
        raw = database.driver(conn)
        raw.execute("DELETE FROM console_links WHERE expires_at < now()")
        raw.execute(
            "INSERT INTO console_links (digest, key_id, expires_at) VALUES (%s, %s, now() + %s)", [digest(token), key_id, LINK]
        )
    return token


def follow_link(conn: Connection, token: str) -> str | None:
    """Use up a link. Return the id of its key, None if the link was used or has expired. Commit.

    Raises DatabaseOutage (retry).
    """
    query = "DELETE FROM console_links WHERE digest = %s RETURNING key_id, expires_at > now()"
    with database.errors(), conn.begin():
        row = database.driver(conn).execute(query, [digest(token)]).fetchone()
    return str(row[0]) if row is not None and row[1] else None
