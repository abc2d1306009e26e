"""Record which HTTP key may refer to which content: an event may only name content that its key uploaded.

A reference is a hash. Without grants, a writer who knows a hash could read the content of others through an own evaluation.
"""

from collections.abc import Iterable
from datetime import timedelta
from typing import Final

from sqlalchemy import Connection

from evalstore.storage import database
from models.content import Reference

_GRANT: Final = """
INSERT INTO content_grants (key_id, sha256, size, encoding) VALUES (%s, %s, %s, %s)
ON CONFLICT (key_id, sha256) DO UPDATE SET size = excluded.size, encoding = excluded.encoding, granted_at = now()
"""
# Each upload deletes a few expired grants, so no periodic job is needed.
_FORGET: Final = """
DELETE FROM content_grants WHERE (key_id, sha256) IN (
    SELECT key_id, sha256 FROM content_grants WHERE granted_at < now() - %s ORDER BY granted_at LIMIT 10
    FOR UPDATE SKIP LOCKED
)
"""


def grant(conn: Connection, key_id: str, reference: Reference, lasting: timedelta) -> None:
    """Let a key refer to this content. Delete some grants older than `lasting`. Commit. Raises DatabaseOutage."""
    with database.errors(), conn.begin():
        raw = database.driver(conn)
        raw.execute(_FORGET, [lasting])
        raw.execute(_GRANT, [key_id, bytes.fromhex(reference.sha256), reference.size, reference.encoding])


_GRANTED: Final = """
SELECT encode(sha256, 'hex'), size, encoding FROM content_grants
WHERE key_id = %s AND sha256 = ANY(%s::bytea[]) AND granted_at > now() - %s
"""


def granted(conn: Connection, key_id: str, references: Iterable[Reference], lasting: timedelta) -> set[Reference]:
    """Return those of `references` that the key may use. Raises DatabaseOutage (retry)."""
    wanted = set(references)
    if not wanted:
        return set()
    hashes = [bytes.fromhex(reference.sha256) for reference in wanted]
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        rows = cursor.execute(_GRANTED, [key_id, hashes, lasting]).fetchall()
    return wanted & {Reference(*row) for row in rows}
