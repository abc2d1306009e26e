"""Keep dead letters: messages that will not be stored unless an operator acts."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID, uuid4

import psycopg
from psycopg.rows import dict_row
from sqlalchemy import Connection

from evalstore.storage import database, operator_actions, redrives, tombstones
from evalstore.storage.operator_actions import Intent
from evalstore.storage.redrives import Pace
from models.content import objects_named
from models.errors import printable


class DeadLetterInsert(NamedTuple):
    """A dead message with its error. Writing the same dead letter twice leaves one row."""

    id: UUID
    queue: str
    actor: str | None
    eval_id: str | None
    event_id: UUID | None
    message: bytes
    error_class: str
    error_message: str
    traceback: str
    signature: str
    attempts: int
    died_at: datetime
    host: str | None
    release: str | None


# A letter that dies again after a redrive keeps its row and takes the newest error.
_WRITE: Final = """
INSERT INTO dead_letters (id, queue, actor, eval_id, event_id, message, error_class, error_message, traceback, signature,
    deliveries, attempts, first_at, last_at, host, release, objects)
VALUES (%s, %s, %s, %s, %s, %b, %s, %s, %s, %s, 1, %s, %s, %s, %s, %s, %s)
ON CONFLICT (id) DO UPDATE SET state = 'dead', error_class = excluded.error_class, error_message = excluded.error_message,
    traceback = excluded.traceback, signature = excluded.signature, deliveries = dead_letters.deliveries + 1,
    attempts = least(dead_letters.attempts::bigint + excluded.attempts, 2147483647), last_at = excluded.last_at,
    host = excluded.host, release = excluded.release
WHERE dead_letters.last_at < excluded.last_at
"""
# Writers hold the lock together, and an eraser alone: it waits for writers that have not seen its tombstone.
_SHARED: Final = "SELECT pg_advisory_xact_lock_shared(hashtextextended('evalstore:dead_letters:' || current_schema(), 0))"
_ALONE: Final = _SHARED.replace("_shared", "")
_MOST_ATTEMPTS: Final = 2**31 - 1


def write(conn: Connection, inserts: Sequence[DeadLetterInsert]) -> None:
    """Write dead letters in one transaction, whatever their texts hold. Mark redriven letters as dead again.

    Those of erased evaluations are not kept.

    Raises DatabaseOutage (retry).
    """
    with database.errors(), conn.begin():
        insert(database.driver(conn), inserts)


def insert(raw: psycopg.Connection[Any], inserts: Sequence[DeadLetterInsert]) -> None:
    """Insert as `write` does, within a transaction of the caller."""
    ordered = sorted(inserts)  # All writers lock letters by id, so they cannot deadlock.
    rows = [
        (
            *insert[:10],
            max(1, min(insert.attempts, _MOST_ATTEMPTS)),  # A sender may have put any number into the message.
            *(insert.died_at, insert.died_at, insert.host, insert.release),
            sorted(objects_named(insert.message)),
        )
        for insert in ordered
    ]
    died_at = {insert.id: insert.died_at for insert in inserts}
    with raw.cursor() as cursor:
        cursor.execute(_SHARED)
        erased = {row[0] for row in tombstones.ask(raw, {insert.eval_id for insert in inserts if insert.eval_id})}
        rows = [row for row in rows if row[3] not in erased]
        redriven = redrives.lock(cursor, list(died_at))
        cursor.executemany(_WRITE, [[_storable(value) for value in row] for row in rows])
        redrives.count(cursor, [letter for letter in redriven if letter.last_at < died_at[letter.id]], "died")


def _storable(value: object) -> object:
    """Replace the characters that PostgreSQL refuses. Dead letters must accept every text."""
    return printable(value).replace("\0", "\\x00") if isinstance(value, str) else value


_VARIES: Final = re.compile(
    r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
    # quoted text, but not the text between two apostrophes in words
    r"|(?<!\w)(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")(?!\w)"
    r"|\bmetadata(?:\.[^\s:;,.\[]+|\[\d+\])+"  # paths inside metadata, whose keys the sender chooses
    r"|\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{8,}\b"  # hashes and other hexadecimal ids
    r"|0x[0-9a-fA-F]+|\d+(?:[.,]\d+)*"
)


def signature(error_class: str, error_message: str) -> str:
    """Return a signature that ignores ids, numbers, paths and quoted texts in the error message."""
    template = _VARIES.sub("~", error_message.partition("\n")[0][:2000])[:500]
    return hashlib.sha256(f"{error_class}\n{template}".encode(errors="backslashreplace")).hexdigest()[:16]


_AMONG: Final = """
SELECT d.eval_id, d.event_id FROM unnest(%s::text[], %s::uuid[]) AS wanted (eval_id, event_id)
JOIN dead_letters d ON d.eval_id = wanted.eval_id AND d.event_id = wanted.event_id WHERE d.state <> 'stored'
"""


def among(conn: Connection, keys: Sequence[tuple[str, UUID]]) -> set[tuple[str, UUID]]:
    """Return those of `keys` (eval_id, event_id) that are dead letters. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        cursor.execute(_AMONG, [[eval_id for eval_id, _ in keys], [event_id for _, event_id in keys]])
        return set(cursor.fetchall())


_COUNT: Final = "SELECT count(*) FROM dead_letters WHERE state <> 'stored'"


def count(conn: Connection) -> int:
    """Return the number of dead letters. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        ((number,),) = database.driver(conn).execute(_COUNT).fetchall()
    return int(number)


class Selection(NamedTuple):
    """A filter for dead letters.

    Fields that are None do not filter. `since` and `until` apply to the last time a letter died.
    """

    states: tuple[str, ...] = ("dead", "redriving")
    ids: tuple[UUID, ...] | None = None
    queue: str | None = None
    error_class: str | None = None
    signature: str | None = None
    eval_id: str | None = None
    match: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    fewer_redrives_than: int | None = None
    limit: int | None = None


_TESTS: Final = {
    "states": "state = ANY(%s::text[])",
    "ids": "id = ANY(%s::uuid[])",
    "queue": "queue = %s",
    "error_class": "error_class = %s",
    "signature": "signature = %s",
    "eval_id": "eval_id = %s",
    "since": "last_at >= %s",
    "until": "last_at < %s",
    "fewer_redrives_than": "redrives < %s",
}


def _where(chosen: Selection) -> tuple[str, list[Any]]:
    """Return the SQL condition and its parameters."""
    tests, values = [], []
    for name, test in _TESTS.items():
        value = getattr(chosen, name)
        if value is not None:
            tests.append(test)
            values.append(list(value) if isinstance(value, tuple) else value)
    if chosen.match is not None:
        text = chosen.match
        pattern = re.sub(r"([\\%_])", r"\\\1", text)
        # In the message the text may stand as it is, or as JSON with non-ASCII characters escaped or not.
        forms = {
            form.encode(errors="surrogatepass")
            for form in (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
        }
        tests.append(f"(error_message ILIKE %s OR error_class ILIKE %s{' OR position(%s::bytea IN message) > 0' * len(forms)})")
        values += [f"%{pattern}%", f"%{pattern}%", *sorted(forms)]
    return " AND ".join(tests), values


COLUMNS: Final = (
    *("id", "state", "queue", "actor", "eval_id", "event_id", "error_class", "error_message", "signature"),
    *("first_at", "last_at", "deliveries", "attempts", "host", "release", "redrives", "redrive", "sent_at"),
)


def find(
    conn: Connection,
    chosen: Selection,
    *,
    whole: bool = False,
    oldest_first: bool = False,
    after: tuple[datetime, UUID] | None = None,
) -> Iterator[dict[str, Any]]:
    """Return the selected letters by the time they last died, the newest first.

    `whole` adds message and traceback. `after` is the `last_at` and the id of the last letter of the page before; it needs the
    newest first. Raises DatabaseOutage (retry).
    """
    condition, values = _where(chosen)
    if after is not None:
        condition += " AND last_at <= %s AND (last_at < %s OR id > %s)"
        values += [after[0], *after]
    columns = (*COLUMNS, "octet_length(message) AS size", *(("message", "traceback") if whole else ()))
    order = "first_at, id" if oldest_first else "last_at DESC, id"
    query = f"SELECT {', '.join(columns)} FROM dead_letters WHERE {condition} ORDER BY {order} LIMIT %s"
    with (
        database.errors(),
        conn.begin(),
        database.driver(conn).cursor(name="letters", row_factory=dict_row, binary=True) as cursor,
    ):
        cursor.itersize = 10 if whole else 1000
        yield from cursor.execute(query, [*values, chosen.limit])


_WHOLE: Final = f"SELECT {', '.join(COLUMNS)}, message, traceback FROM dead_letters WHERE id = ANY(%s) ORDER BY first_at, id"


def get(conn: Connection, letter_id: UUID) -> dict[str, Any] | None:
    """Return a letter with message and traceback. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        return next(_whole(conn, [letter_id]), None)


def groups(conn: Connection, chosen: Selection) -> list[dict[str, Any]]:
    """Count the selected letters by signature, the largest group first, each with an example. Raises DatabaseOutage (retry)."""
    condition, values = _where(chosen)
    query = f"""
WITH grouped AS (
    SELECT signature, count(*) AS count, min(first_at) AS first_at, max(last_at) AS last_at, min(id::text)::uuid AS example
    FROM (SELECT * FROM dead_letters WHERE {condition} ORDER BY first_at, id LIMIT %s) chosen GROUP BY signature)
SELECT g.signature, g.count, g.first_at, g.last_at, d.error_class, d.error_message, d.queue, d.actor, g.example
FROM grouped g JOIN dead_letters d ON d.id = g.example ORDER BY g.count DESC, g.signature
"""
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query, [*values, chosen.limit]).fetchall()


_BETWEEN: Final = "SELECT id FROM dead_letters WHERE id BETWEEN %s AND %s LIMIT 2"


def between(conn: Connection, first: UUID, last: UUID) -> list[UUID]:
    """Return up to two ids between these two. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        return [letter_id for (letter_id,) in cursor.execute(_BETWEEN, [first, last])]


def count_of(conn: Connection, chosen: Selection) -> int:
    """Return the number of selected letters. Raises DatabaseOutage (retry)."""
    condition, values = _where(chosen)
    query = f"SELECT count(*) FROM (SELECT FROM dead_letters WHERE {condition} LIMIT %s) chosen"
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        ((number,),) = cursor.execute(query, [*values, chosen.limit]).fetchall()
    return int(number)


class Edited(NamedTuple):
    """The new message of a letter, and the event that the new message names.

    The edit fails if the message is no longer `before`.
    """

    before: bytes
    message: bytes
    actor: str | None
    eval_id: str | None
    event_id: UUID | None


_EDIT: Final = """
UPDATE dead_letters SET message = %b, actor = %s, eval_id = %s, event_id = %s, objects = %s
WHERE id = ANY(%s) AND message = %b
"""


def _edit(edited: Edited, ids: list[UUID]) -> list[Any]:
    # Keep the objects of the old message too: an operator may restore it from the backup file.
    needed = objects_named(edited.before) | objects_named(edited.message)
    return [*edited[1:], sorted(needed), ids, edited.before]


def redrive(
    conn: Connection,
    chosen: Selection,
    intent: Intent,
    pace: Pace,
    *,
    accept: Callable[[int], bool] = lambda _: True,
    edited: Edited | None = None,
    details: dict[str, Any] | None = None,
) -> tuple[UUID | None, int]:
    """Claim the selected dead letters for a new redrive, in one transaction. Two redrives never claim the same letter.

    Return the redrive and its number of letters. Return no redrive if `accept` refuses the number, if there is no letter, or if
    the letter to edit has changed. Raises DatabaseOutage (retry).
    """
    redrive_id = uuid4()
    with database.errors(), conn.begin() as transaction, database.driver(conn).cursor() as cursor:
        ids = _locked(cursor, chosen._replace(states=("dead",)))
        unchanged = edited is None or cursor.execute(_EDIT, _edit(edited, ids)).rowcount == 1
        if not ids or not unchanged or not accept(len(ids)):
            transaction.rollback()
            return None, len(ids)
        redrives.begin(cursor, redrive_id, ids, intent, pace)
        operator_actions.write(cursor, intent, len(ids), redrive=redrive_id, details=details)
    return redrive_id, len(ids)


_DELETE: Final = "DELETE FROM dead_letters WHERE id = ANY(%s)"


def remove(
    conn: Connection,
    chosen: Selection,
    intent: Intent,
    keep: Callable[[Iterator[dict[str, Any]]], dict[str, Any]],
    *,
    accept: Callable[[int], bool],
) -> int | None:
    """Delete the selected letters that no redrive has sent, after `keep` saved them elsewhere.

    Return their number, or None if `accept` refuses the number. If `keep` raises or the process dies before the commit, nothing
    is deleted. Raises DatabaseOutage (retry) and the errors of `keep`.
    """
    with database.errors(), conn.begin() as transaction, database.driver(conn).cursor() as cursor:
        ids = _locked(cursor, chosen._replace(states=tuple(state for state in chosen.states if state != "redriving")))
        if not ids or not accept(len(ids)):
            transaction.rollback()
            return None if ids else 0
        details = keep(_whole(conn, ids))
        cursor.execute(_DELETE, [ids])
        operator_actions.write(cursor, intent, len(ids), details=details)
    return len(ids)


_OF_EVALUATION: Final = "SELECT id, objects FROM dead_letters WHERE eval_id = %s ORDER BY id"


def erase(conn: Connection, eval_id: str) -> tuple[int, set[bytes]]:
    """Delete all letters of an evaluation that has a tombstone, also those on their way.

    Returns how many, and the SHA-256 of the objects that they named. Commits. Raises DatabaseOutage (retry).
    """
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        cursor.execute(_ALONE)
        found = cursor.execute(_OF_EVALUATION, [eval_id]).fetchall()
        ids = [letter_id for letter_id, _ in found]
        if ids:
            redriven = redrives.lock(cursor, ids)
            cursor.execute(_DELETE, [ids])
            redrives.count(cursor, redriven, "returned")
    return len(ids), {bytes(sha256) for _, objects in found for sha256 in objects}


def _whole(conn: Connection, ids: Sequence[UUID]) -> Iterator[dict[str, Any]]:
    with database.driver(conn).cursor(row_factory=dict_row, binary=True) as cursor:
        for start in range(0, len(ids), 10):
            yield from cursor.execute(_WHOLE, [list(ids[start : start + 10])]).fetchall()


def _locked(cursor: psycopg.Cursor[Any], chosen: Selection) -> list[UUID]:
    """Lock the selected letters by id, as all writers do. Return them oldest first."""
    condition, values = _where(chosen)
    query = f"SELECT id FROM dead_letters WHERE {condition} ORDER BY first_at, id LIMIT %s"
    ids = [row[0] for row in cursor.execute(query, [*values, chosen.limit])]
    still = f"SELECT id FROM dead_letters WHERE id = ANY(%s) AND {_TESTS['states']} ORDER BY id FOR UPDATE"
    locked = {row[0] for row in cursor.execute(still, [ids, list(chosen.states)])}
    return [letter_id for letter_id in ids if letter_id in locked]
