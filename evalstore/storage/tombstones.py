"""Tombstones: which evaluations were erased, as keyed hashes of their ids, in the database and in the object store.

The hash is HMAC-SHA256. PostgreSQL computes it where a statement needs many: no process holds a key that a restore may replace.
"""

import hmac
from collections.abc import Collection, Iterable, Sequence
from hashlib import sha256
from typing import Any, Final

import psycopg
from sqlalchemy import Connection

from evalstore.objects.object_store import Store
from evalstore.storage import database
from models.errors import EvalstoreError

_BLOCK_BYTES: Final = 64
# The names of notes in the object store: one for each tombstone, and the key.
FOLDER: Final = "erased"
_KEY_NOTE: Final = "key"


class OtherKey(EvalstoreError):
    """The object store holds tombstones under another key than the database does."""


def pads(key: bytes) -> tuple[bytes, bytes]:
    """Return the inner and the outer block of HMAC (RFC 2104) for a key of up to 64 bytes."""
    block = key.ljust(_BLOCK_BYTES, b"\0")
    return bytes(byte ^ 0x36 for byte in block), bytes(byte ^ 0x5C for byte in block)


# Without any tombstone nothing is hashed.
ERASED: Final = """
SELECT wanted.eval_id FROM erasure_key k, unnest(%s::text[]) AS wanted (eval_id)
WHERE EXISTS (SELECT FROM tombstones) AND EXISTS (SELECT FROM tombstones t
    WHERE t.digest = sha256(k.outer_pad || sha256(k.inner_pad || convert_to(wanted.eval_id, 'UTF8'))))
"""


def text_array(texts: Collection[str]) -> str:
    """Return texts as the text of a PostgreSQL array. psycopg converts a list more slowly."""
    joined = "".join(texts)
    if '"' in joined or "\\" in joined:
        texts = [text.replace("\\", "\\\\").replace('"', '\\"') for text in texts]
    return '{"' + '","'.join(texts) + '"}' if texts else "{}"


def ask(conn: psycopg.Connection[Any], eval_ids: Collection[str]) -> psycopg.Cursor[Any]:
    """Look up which of these were erased, in the transaction of `conn`."""
    return conn.cursor(binary=True).execute(ERASED, [text_array(eval_ids)])


def erased(conn: Connection, eval_ids: Collection[str]) -> set[str]:
    """Return those of `eval_ids` that were erased. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        return {eval_id for (eval_id,) in ask(database.driver(conn), eval_ids).fetchall()}


def digests(conn: Connection, eval_ids: Sequence[str]) -> dict[str, bytes]:
    """Return the hash of each id. Raises DatabaseOutage (retry)."""
    key = _key(conn)
    return {eval_id: hmac.digest(key, eval_id.encode(), sha256) for eval_id in eval_ids}


def _key(conn: Connection) -> bytes:
    with database.errors(), conn.begin():
        found = database.driver(conn).cursor(binary=True).execute("SELECT key FROM erasure_key").fetchone()
    if found is None:
        raise OtherKey(
            "the table erasure_key is empty: run `evalstore erase --reapply`, which takes the key of the object store"
        )
    return bytes(found[0])


_ADD: Final = "INSERT INTO tombstones (digest) SELECT unnest(%s::bytea[]) ON CONFLICT DO NOTHING"


def add(conn: Connection, found: Sequence[bytes]) -> None:
    """Write tombstones. Commits. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        database.driver(conn).execute(_ADD, [list(found)])


def keep_key(conn: Connection, store: Store) -> None:
    """Put the key into the object store, unless it is there. Raises OtherKey, ObjectStoreOutage, DatabaseOutage (retry)."""
    key = _key(conn)
    if (kept := store.read_note(FOLDER, _KEY_NOTE)) is None:
        store.write_note(FOLDER, _KEY_NOTE, key.hex().encode())
    elif kept != key.hex().encode():
        raise OtherKey("the object store holds another key for tombstones: run `evalstore erase --reapply` first")


def keep(store: Store, found: Iterable[bytes]) -> None:
    """Write tombstones into the object store. Raises ObjectStoreOutage (retry)."""
    for digest in found:
        store.write_note(FOLDER, digest.hex(), b"")


_REPLACE: Final = """
INSERT INTO erasure_key (id, key, inner_pad, outer_pad) VALUES (1, %s, %s, %s)
ON CONFLICT (id) DO UPDATE SET key = excluded.key, inner_pad = excluded.inner_pad, outer_pad = excluded.outer_pad
"""
_LOST: Final = "LOCK TABLE tombstones IN SHARE ROW EXCLUSIVE MODE"


def restore(conn: Connection, store: Store) -> int:
    """Bring the tombstones of the object store and the database together, in both; returns how many there are.

    The database takes the key of the object store, if it has no tombstone under its own. Raises OtherKey, ObjectStoreOutage,
    DatabaseOutage (retry).
    """
    names = store.notes(FOLDER)
    kept = store.read_note(FOLDER, _KEY_NOTE)
    with database.errors(), conn.begin():
        raw = database.driver(conn)
        raw.execute(_LOST)
        own = {bytes(digest) for (digest,) in raw.cursor(binary=True).execute("SELECT digest FROM tombstones")}
        key = raw.cursor(binary=True).execute("SELECT key FROM erasure_key").fetchone()
        if kept is not None and (key is None or bytes(key[0]).hex().encode() != kept):
            if own:
                raise OtherKey("the object store and the database hold tombstones under different keys: these cannot be joined")
            other = bytes.fromhex(kept.decode())
            raw.execute(_REPLACE, [other, *pads(other)])
        there = {bytes.fromhex(name) for name in names if name != _KEY_NOTE}
        raw.execute(_ADD, [sorted(there - own)])
    keep_key(conn, store)
    keep(store, own - there)
    return len(own | there)


_FOUND: Final = """
SELECT DISTINCT eval_id FROM (
    SELECT eval_id FROM evaluations UNION ALL SELECT eval_id FROM dead_letters WHERE eval_id IS NOT NULL
) known, erasure_key k
WHERE EXISTS (SELECT FROM tombstones t
    WHERE t.digest = sha256(k.outer_pad || sha256(k.inner_pad || convert_to(known.eval_id, 'UTF8'))))
"""


def present(conn: Connection) -> list[str]:
    """Return the erased evaluations of which something is stored. Reads every record. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        return sorted(eval_id for (eval_id,) in database.driver(conn).execute(_FOUND).fetchall())
