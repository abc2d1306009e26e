"""Redrives: dead letters that an operator sends again, and the outcome of each letter.

Each transaction that settles letters first locks their redrives by `id`, and then the letters by `id`. So the counts are exact,
and workers, operators and sweeps cannot deadlock.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, Literal, NamedTuple
from uuid import UUID

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from sqlalchemy import Connection

from evalstore.storage import database, operator_actions
from evalstore.storage.operator_actions import Intent

Outcome = Literal["stored", "died", "returned"]
Ended = Literal["stopped", "cancelled", "failed"]
# The prefix of the queue of a sink's dead letters.
SINK_QUEUES: Final = "sink:"
_CHUNK: Final = 500
_CHUNK_BYTES: Final = 8 * 1024 * 1024
_LONGEST_S: Final = 1.0
_CANARY_WAIT_S: Final = 0.5


class Pace(NamedTuple):
    """The pace of a redrive: at most `rate` letters a second, and first a canary of `canary` letters."""

    rate: float | None = None
    canary: int | None = None


class DeadLetterRef(NamedTuple):
    """A letter to put in its queue."""

    id: UUID
    queue: str
    message: bytes


_NEW: Final = "INSERT INTO redrives (id, actor, reason, filter, rate, canary, total) VALUES (%s, %s, %s, %s, %s, %s, %s)"
_CLAIM: Final = """
UPDATE dead_letters SET state = 'redriving', redrive = %s, sent_at = NULL WHERE id = ANY(%s) AND state = 'dead'
"""


def begin(cursor: psycopg.Cursor[Any], redrive_id: UUID, ids: Sequence[UUID], intent: Intent, pace: Pace) -> None:
    """Claim letters for a new redrive. The transaction of `cursor` has locked the letters, and the caller commits."""
    values = [redrive_id, intent.actor, intent.reason, Jsonb(dict(intent.filter)), pace.rate, pace.canary, len(ids)]
    cursor.execute(_NEW, values)
    cursor.execute(_CLAIM, [redrive_id, list(ids)])


class Step(NamedTuple):
    """The number of letters that one step sent, and the seconds until the next step. `wait_s` is None if no step remains."""

    sent: int
    wait_s: float | None


_LOCK: Final = "SELECT *, clock_timestamp() AS now FROM redrives WHERE id = %s FOR UPDATE"
_START: Final = "UPDATE redrives SET started_at = clock_timestamp() WHERE id = %s AND started_at IS NULL"
# The canary should contain every kind of error: order by rank within each signature first.
_WAITING: Final = """
SELECT id, octet_length(message) AS size FROM dead_letters
WHERE redrive = %s AND state = 'redriving' AND sent_at IS NULL ORDER BY {} first_at, id LIMIT %s
"""
_SPREAD: Final = "row_number() OVER (PARTITION BY signature ORDER BY first_at, id),"
_TAKE: Final = """
SELECT id, queue, message FROM dead_letters
WHERE id = ANY(%s) AND redrive = %s AND state = 'redriving' AND sent_at IS NULL ORDER BY id FOR UPDATE
"""
_SENT: Final = "UPDATE dead_letters SET sent_at = clock_timestamp(), redrives = redrives + 1 WHERE id = ANY(%s)"
_COUNT_SENT: Final = "UPDATE redrives SET sent = sent + %s, paced_until = %s WHERE id = %s"


def step(conn: Connection, redrive_id: UUID, send: Callable[[Sequence[DeadLetterRef]], object]) -> Step:
    """Hand the next letters to `send`, as many as the pace allows, and mark them as sent. Commit.

    The letters are locked while `send` runs, so a worker cannot record an outcome before the mark. If `send` raises, or the
    process dies before the commit, the same letters are handed over again: `send` must be idempotent.

    Raises DatabaseOutage (retry) and the errors of `send`.
    """
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=dict_row) as cursor:
        redrive = cursor.execute(_LOCK, [redrive_id]).fetchone()
        if redrive is None or redrive["state"] != "running":
            return Step(0, None)
        cursor.execute(_START, [redrive_id])
        most, wait_s, paced_until = _due(redrive)
        if _canary_is_out(redrive):
            if redrive["died"] + redrive["returned"]:
                _end(cursor, redrive_id, "stopped", "a letter of the canary died again")
                return Step(0, None)
            if redrive["stored"] < redrive["sent"]:
                return Step(0, _CANARY_WAIT_S)
        canary_left = (redrive["canary"] or 0) - redrive["sent"]
        if canary_left > 0:
            most = min(most, canary_left)
        waiting = cursor.execute(_WAITING.format(_SPREAD if canary_left > 0 else ""), [redrive_id, most or 1]).fetchall()
        if not waiting or not most:
            return Step(0, wait_s if waiting else None)
        taken = cursor.execute(_TAKE, [_within(waiting, _CHUNK_BYTES), redrive_id]).fetchall()
        send([DeadLetterRef(**row) for row in taken])
        cursor.execute(_SENT, [[row["id"] for row in taken]])
        cursor.execute(_COUNT_SENT, [len(taken), paced_until(len(taken)), redrive_id])
        return Step(len(taken), 0)


def _due(redrive: Mapping[str, Any]) -> tuple[int, float, Callable[[int], datetime | None]]:
    """Return how many letters the rate allows now, and the seconds until the next letter.

    The third value is a function: it returns the time from which the rate allows more, after this number of letters.
    """
    rate, now = redrive["rate"], redrive["now"]
    if rate is None:
        return _CHUNK, 0, lambda _: None
    every_s = 1 / rate
    # Unused time counts for one second at most, so a pause is not followed by a burst.
    begin: datetime = max(redrive["paced_until"] or now, now - timedelta(seconds=_LONGEST_S))
    ahead_s = (begin - now).total_seconds()
    most = 0 if ahead_s > 0 else min(_CHUNK, 1 + int(-ahead_s / every_s))
    return most, max(0, ahead_s), lambda sent: begin + timedelta(seconds=sent * every_s)


def _canary_is_out(redrive: Mapping[str, Any]) -> bool:
    return redrive["canary"] is not None and 0 < redrive["sent"] <= redrive["canary"] < redrive["total"]


def _within(letters: Sequence[Mapping[str, Any]], most_bytes: int) -> list[UUID]:
    """Return the first letters whose sizes add up to at most `most_bytes`, and at least one letter."""
    ids: list[UUID] = []
    for row in letters:
        most_bytes -= row["size"]
        if ids and most_bytes < 0:
            break
        ids.append(row["id"])
    return ids


_END: Final = "UPDATE redrives SET state = %s, error = %s WHERE id = %s"
_RETURN: Final = """
UPDATE dead_letters SET state = 'dead' WHERE redrive = %s AND state = 'redriving' AND sent_at IS NULL
"""


def _end(cursor: psycopg.Cursor[Any], redrive_id: UUID, state: Ended, error: str | None) -> int:
    """End a locked redrive and return its unsent letters to the dead letters. Return their number."""
    cursor.execute(_END, [state, error, redrive_id])
    returned = cursor.execute(_RETURN, [redrive_id]).rowcount
    _add(cursor, redrive_id, "returned", returned)
    return returned


def end(conn: Connection, redrive_id: UUID, state: Ended, error: str | None = None, intent: Intent | None = None) -> int | None:
    """End a redrive and return its unsent letters to the dead letters. Return their number, or None if it had already ended.

    Raises DatabaseOutage (retry).
    """
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=dict_row) as cursor:
        redrive = cursor.execute(_LOCK, [redrive_id]).fetchone()
        if redrive is None or redrive["state"] != "running":
            return None
        returned = _end(cursor, redrive_id, state, error)
        if intent:
            operator_actions.write(cursor, intent, returned, redrive=redrive_id)
        return returned


_LOCK_OF_LETTERS: Final = """
SELECT id FROM redrives WHERE id IN (SELECT redrive FROM dead_letters WHERE id = ANY(%s) AND state = 'redriving')
ORDER BY id FOR UPDATE
"""
_LOCK_LETTERS: Final = "SELECT id, redrive, sent_at, last_at FROM dead_letters WHERE id = ANY(%s) AND {} ORDER BY id FOR UPDATE"
_ADD: Final = """
UPDATE redrives SET {0} = {0} + %(number)s, sent = sent + %(sent)s,
    state = CASE WHEN stored + died + returned + %(number)s >= total AND state = 'running' THEN 'done' ELSE state END,
    finished_at = CASE WHEN stored + died + returned + %(number)s >= total THEN clock_timestamp() END
WHERE id = %(id)s
"""


class Redriven(NamedTuple):
    """A locked letter that is being redriven."""

    id: UUID
    redrive: UUID
    sent_at: datetime | None
    last_at: datetime


def lock(cursor: psycopg.Cursor[Any], ids: Sequence[UUID]) -> list[Redriven]:
    """Lock the letters among `ids` that are being redriven, and before them their redrives."""
    cursor.execute(_LOCK_OF_LETTERS, [list(ids)])
    return [Redriven(*row) for row in cursor.execute(_LOCK_LETTERS.format("state = 'redriving'"), [list(ids)])]


def count(cursor: psycopg.Cursor[Any], letters: Sequence[Redriven], outcome: Outcome) -> None:
    """Add the outcome of locked letters to the counts of their redrives."""
    settled = Counter(letter.redrive for letter in letters)
    # A worker sent these letters and died before it set `sent_at`: count them as sent now.
    unsaid = Counter(letter.redrive for letter in letters if letter.sent_at is None)
    for redrive_id, number in sorted(settled.items()):
        _add(cursor, redrive_id, outcome, number, unsaid[redrive_id])


def _add(cursor: psycopg.Cursor[Any], redrive_id: UUID, outcome: Outcome, number: int, sent: int = 0) -> None:
    cursor.execute(_ADD.format(outcome), {"number": number, "sent": sent, "id": redrive_id})


_STORED: Final = """
UPDATE dead_letters SET state = 'stored', redrives = redrives + (sent_at IS NULL)::int,
    sent_at = coalesce(sent_at, clock_timestamp())
WHERE id = ANY(%s)
"""


def stored(conn: Connection, ids: Sequence[UUID]) -> None:
    """Mark the letters as stored. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        letters = lock(cursor, ids)
        # This includes letters that were returned meanwhile: a worker sent them and died before it could set `sent_at`.
        unstored = [row[0] for row in cursor.execute(_LOCK_LETTERS.format("state <> 'stored'"), [list(ids)])]
        cursor.execute(_STORED, [unstored])
        count(cursor, letters, "stored")


_LOST: Final = "UPDATE dead_letters SET state = 'dead' WHERE id = ANY(%s)"


def lost(conn: Connection, sent: Mapping[UUID, datetime]) -> int:
    """Return sent letters that are in no queue to the dead letters. `sent` has the expected `sent_at` of each letter.

    Letters with another `sent_at` are unchanged. Return the number of returned letters. Raises DatabaseOutage (retry).
    """
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        letters = [letter for letter in lock(cursor, list(sent)) if letter.sent_at == sent[letter.id]]
        cursor.execute(_LOST, [[letter.id for letter in letters]])
        count(cursor, letters, "returned")
        return len(letters)


_IN_QUESTION: Final = """
SELECT id, queue, sent_at FROM dead_letters
WHERE state = 'redriving' AND queue NOT LIKE 'sink:%%' AND sent_at < now() - make_interval(secs => %s) AND id > %s
ORDER BY id LIMIT %s
"""


class Sent(NamedTuple):
    """A letter that was sent and has no outcome yet."""

    id: UUID
    queue: str
    sent_at: datetime


def in_question(conn: Connection, *, after: UUID, older_than_s: float, limit: int) -> list[Sent]:
    """Return letters sent more than `older_than_s` ago that have no outcome yet, by `id`. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        return [Sent(*row) for row in cursor.execute(_IN_QUESTION, [older_than_s, after, limit])]


# Those of a sink wait here: its runner takes them up by itself.
_TO_SINK: Final = """
SELECT id, eval_id, event_id, message FROM dead_letters
WHERE state = 'redriving' AND queue = %s AND sent_at IS NOT NULL ORDER BY first_at, id LIMIT %s
"""


class SinkLetter(NamedTuple):
    """A letter to give to its sink again."""

    id: UUID
    eval_id: str
    event_id: UUID | None
    message: bytes


def to_sink(conn: Connection, queue: str, limit: int) -> list[SinkLetter]:
    """Letters of a sink's queue that are to be given to it. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        return [SinkLetter(*row) for row in cursor.execute(_TO_SINK, [queue, limit])]


_UNSENT: Final = """
SELECT id FROM redrives r WHERE finished_at IS NULL AND state = 'running' AND EXISTS (
    SELECT FROM dead_letters d WHERE d.redrive = r.id AND d.state = 'redriving' AND d.sent_at IS NULL)
"""


def unsent(conn: Connection) -> list[UUID]:
    """Return the redrives that have letters to send. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        return [redrive_id for (redrive_id,) in cursor.execute(_UNSENT)]


_COUNTS: Final = "total, sent, stored, died, returned"
_SHOWN: Final = f"id, asked_at, actor, reason, filter, rate, canary, state, error, {_COUNTS}, started_at, finished_at"
_LIST: Final = f"SELECT {_SHOWN} FROM redrives ORDER BY asked_at DESC, id LIMIT %s"
_GET: Final = f"SELECT {_SHOWN} FROM redrives WHERE id BETWEEN %s AND %s LIMIT 2"


def latest(conn: Connection, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the newest redrives first. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=dict_row) as cursor:
        return cursor.execute(_LIST, [limit]).fetchall()


def between(conn: Connection, first: UUID, last: UUID) -> list[dict[str, Any]]:
    """Return up to two redrives whose ids lie between these two. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=dict_row) as cursor:
        return cursor.execute(_GET, [first, last]).fetchall()
