"""Erasing evaluations: record, events, content, dead letters and objects, for good.

Each step may be repeated, and a crash between two of them loses nothing but objects that the sweep then takes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import psycopg
from sqlalchemy import Connection

from evalstore.objects.frames import Listed
from evalstore.objects.object_store import Store
from evalstore.storage import (
    anomalies,
    database,
    dead_letters,
    event_store,
    event_writer,
    garbage_collect,
    operator_actions,
    tombstones,
)
from evalstore.storage.garbage_collect import Target
from evalstore.storage.operator_actions import Intent
from models.errors import ObjectMissing, ObjectUnavailable


class Selection(NamedTuple):
    """Which evaluations: those that fulfil all that is not None."""

    submitter: str | None = None
    run_id: str | None = None


_CHOSEN: Final = """
SELECT eval_id FROM evaluations WHERE (%(submitter)s::text IS NULL OR submitter = %(submitter)s::text)
    AND (%(run_id)s::text IS NULL OR run_id = %(run_id)s::text) ORDER BY eval_id
"""


def find(conn: Connection, chosen: Selection) -> list[str]:
    """Return the evaluations that there are now. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        return [eval_id for (eval_id,) in database.driver(conn).execute(_CHOSEN, chosen._asdict()).fetchall()]


_KNOWN: Final = """
SELECT wanted.eval_id FROM unnest(%s::text[]) AS wanted (eval_id)
WHERE EXISTS (SELECT FROM evaluations e WHERE e.eval_id = wanted.eval_id)
    OR EXISTS (SELECT FROM evaluation_events e WHERE e.eval_id = wanted.eval_id)
    OR EXISTS (SELECT FROM dead_letters d WHERE d.eval_id = wanted.eval_id)
"""


def known(conn: Connection, eval_ids: Sequence[str]) -> set[str]:
    """Return those of `eval_ids` of which something is stored, or that were erased. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        found = database.driver(conn).execute(_KNOWN, [list(eval_ids)]).fetchall()
    return {eval_id for (eval_id,) in found} | tombstones.erased(conn, eval_ids)


@dataclass
class Erased:
    """The outcome of erasing one evaluation or several. The sweep removes `objects_left` later."""

    evaluations: int = 0
    events: int = 0
    dead_letters: int = 0
    objects: int = 0
    objects_left: int = 0

    def add(self, other: "Erased") -> None:
        """Count another's."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Surroundings(NamedTuple):
    """The services that erasing needs besides the database.

    `needed` gives the objects that waiting messages name, and the age of the oldest message in seconds. `forget_dead_letters`
    removes the dead letters in Redis, and returns how many and the objects that they named. `forget` removes all else that
    Redis holds of an evaluation and its events. `grace` is that of the sweep.
    """

    targets: Sequence[Target]
    needed: Callable[[], tuple[set[bytes], float]]
    forget_dead_letters: Callable[[str], tuple[int, set[bytes]]]
    forget: Callable[[str, Iterable[str]], object]
    grace: timedelta


def begin(conn: Connection, targets: Sequence[Target]) -> None:
    """Keep the key in the object store, where there is one. Raises OtherKey, ObjectStoreOutage, DatabaseOutage (retry)."""
    if targets:
        tombstones.keep_key(conn, targets[0].store)


def erase(conn: Connection, eval_id: str, intent: Intent, around: Surroundings) -> Erased:
    """Erase an evaluation; commits. Repeat it after a crash or an outage.

    Raises DatabaseOutage, RedisOutage, ObjectStoreOutage (retry).
    """
    digest = tombstones.digests(conn, [eval_id])[eval_id]
    if around.targets:
        tombstones.keep(around.targets[0].store, [digest])
    # Committed before anything is deleted: from now on nobody creates the evaluation anew.
    tombstones.add(conn, [digest])
    event_ids = _event_ids(conn, eval_id)
    in_redis, objects = around.forget_dead_letters(eval_id)
    in_table, of_table = dead_letters.erase(conn, eval_id)
    # Before the rows, which name the keys: a repetition after a crash could not find them.
    around.forget(eval_id, event_ids)
    done, of_rows = _delete(conn, eval_id, in_redis + in_table, intent)
    # After the rows as well: a reader may have filled the cache again.
    around.forget(eval_id, ())
    objects |= of_table | of_rows
    if objects:
        done.objects, done.objects_left = _delete_objects(conn, objects, around)
    return done


# Only requests without a time of their own have left one in Redis, for a day.
_EVENT_IDS: Final = """
SELECT event_id::text FROM evaluation_events WHERE eval_id = %s AND recorded_at > now() - interval '2 days' LIMIT 100000
"""


def _event_ids(conn: Connection, eval_id: str) -> list[str]:
    with database.errors(), conn.begin():
        return [event_id for (event_id,) in database.driver(conn).execute(_EVENT_IDS, [eval_id]).fetchall()]


# Waits for whoever creates the record at this moment, and has not seen the tombstone.
_HOLD_PLACE: Final = """
INSERT INTO evaluations (eval_id, status, attempt, version, metadata) VALUES (%s, 'queued', 1, 1, '{}') ON CONFLICT DO NOTHING
"""
_OBJECTS: Final = "SELECT DISTINCT sha256 FROM contents WHERE eval_id = %s AND store IS NOT NULL"


def _delete(conn: Connection, eval_id: str, letters: int, intent: Intent) -> tuple[Erased, set[bytes]]:
    """Delete the rows, with the confirmation and the operator's action; returns the objects that the rows named."""
    with database.errors(), conn.begin():
        raw = database.driver(conn)
        is_new = raw.execute(_HOLD_PLACE, [eval_id]).rowcount == 1
        record = event_writer.records(event_writer.lock(raw, [eval_id]))[eval_id].record
        objects = {bytes(sha256) for (sha256,) in raw.cursor(binary=True).execute(_OBJECTS, [eval_id])}
        counts = {
            table: raw.execute(f"DELETE FROM {table} WHERE eval_id = %s".encode(), [eval_id]).rowcount
            for table in ("contents", "evaluation_events", "evaluations")
        }
        anomalies.erase(raw, eval_id)
        if not is_new:
            event_store.confirm_change(raw, "storage:evaluation:erased", record)
        done = Erased(0 if is_new and not letters else 1, counts["evaluation_events"], letters)
        if done.evaluations:
            _note(raw, intent, eval_id, done)
    return done, objects


def _note(raw: psycopg.Connection[Any], intent: Intent, eval_id: str, done: Erased) -> None:
    details = {"eval_id": eval_id, "events": done.events, "dead_letters": done.dead_letters}
    with raw.cursor() as cursor:
        operator_actions.write(cursor, intent, 1, details=details)


_GRANTED: Final = "SELECT sha256 FROM content_grants WHERE sha256 = ANY(%s)"


def _delete_objects(conn: Connection, objects: set[bytes], around: Surroundings) -> tuple[int, int]:
    """Delete the objects that nothing else may name; returns how many, and how many are left to the sweep."""
    # A sender touches an object that it finds, if it is older than half the grace. The rest is its time to send the event.
    before = datetime.now(UTC) - around.grace * 3 / 4
    there = [(target, listed) for target in around.targets for sha256 in objects for listed in _listed(target.store, sha256)]
    free = [
        (target, one)
        for target, one in there
        if one.modified_at < before and garbage_collect.unnamed(conn, target.places, [one])
    ]
    if not free:
        return 0, _left(conn, there)
    with database.errors(), conn.begin():
        found = database.driver(conn).cursor(binary=True).execute(_GRANTED, [list(objects)]).fetchall()
    waiting, oldest_age_s = around.needed()
    kept = {bytes(sha256) for (sha256,) in found} | waiting
    is_clear = oldest_age_s <= garbage_collect.longest_wait(around.grace).total_seconds()
    gone = [
        (target, one)
        for target, one in free
        if is_clear and garbage_collect.sha256_of(one) not in kept and _is_deleted(target.store, one, before)
    ]
    return len(gone), _left(conn, [one for one in there if one not in gone])


def _left(conn: Connection, there: Sequence[tuple[Target, Listed]]) -> int:
    """Count the objects that no row and no dead letter names. Other evaluations keep an object that they share."""
    return sum(bool(garbage_collect.unnamed(conn, target.places, [one])) for target, one in there)


def _is_deleted(store: Store, one: Listed, before: datetime) -> bool:
    try:
        return store.delete(one.key, unmodified_since=before)
    except ObjectUnavailable:  # locked, for example
        return False


def _listed(store: Store, sha256: bytes) -> list[Listed]:
    found = []
    for key in (sha256.hex(), f"{sha256.hex()}.zst"):
        try:
            with store.open(key, -1) as stream:
                found.append(stream.listed)
        except ObjectMissing:
            continue
    return found


def reapply(conn: Connection, intent: Intent, around: Surroundings) -> tuple[int, Erased]:
    """Apply all tombstones again, such as after a restore; returns how many there are, and what was erased.

    Raises OtherKey, DatabaseOutage, RedisOutage, ObjectStoreOutage (retry).
    """
    total = tombstones.restore(conn, around.targets[0].store) if around.targets else 0
    done = Erased()
    for eval_id in tombstones.present(conn):
        done.add(erase(conn, eval_id, intent, around))
    return total, done
