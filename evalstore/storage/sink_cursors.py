"""The cursor and the lease of each sink, in the table `sinks`.

One process at a time works on a sink, under a lease by the database's clock. Each taking of the lease has a token, and every
write checks the token: a process whose lease was taken over changes nothing any more.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

import psycopg
from psycopg.rows import class_row, dict_row
from psycopg.types.json import Jsonb
from sqlalchemy import Connection

from evalstore.storage import database, dead_letters, operator_actions, sink_ranges
from evalstore.storage.dead_letters import DeadLetterInsert
from evalstore.storage.operator_actions import Intent
from evalstore.storage.sink_ranges import OF_SINK
from models.errors import EvalstoreError, printable

LEASE_S: Final = 15.0
# Two servers' clocks may differ, and an event's transaction may have begun some time before its row in the outbox.
MARGIN_S: Final = 300.0


class LeaseLost(EvalstoreError):
    """Another process works on the sink, or an operator moved its cursor: read the cursor again."""


class Place(NamedTuple):
    """A position in the outbox: all rows up to `id` are done, and the first `offset` events of the row after it."""

    id: int
    offset: int
    recorded_at: datetime


class ReplayKey(NamedTuple):
    """The last event that a replay of the log passed on, in the order of the replay."""

    recorded_at: datetime
    eval_id: str
    occurred_at: datetime
    event_id: str


class Cursor(NamedTuple):
    """How far a sink has come. `replay_until`: the log is passed on up to this time, and then the outbox from `place` on.

    `generation` counts how often the cursor was set to another place.
    """

    place: Place
    generation: int
    timeline: int
    replay_until: datetime | None = None
    replay_at: ReplayKey | None = None


class Lease(NamedTuple):
    """A sink that this process works on, and from where.

    `limit`: the cursor at the end of a batch that was begun, as a JSON object. `state`: the object that the sink keeps.
    `replayed_until`: events that were stored before this time may be in the sink already, wherever the cursor stands.
    """

    name: str
    token: int
    cursor: Cursor
    limit: dict[str, Any] | None = None
    state: dict[str, Any] | None = None
    replayed_until: datetime | None = None


# A new sink begins with what the outbox still holds. Where that is nothing, it begins before all ids that are being stored.
_CREATE: Final = """
INSERT INTO sinks (name, type, missed, position, recorded_at, timeline)
SELECT %s, %s, %s, coalesce(first.id - 1, greatest(0, last.id - 1000)), coalesce(first.recorded_at, now()), {timeline}
FROM (SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence('confirmations', 'id')), 0) AS id) last
LEFT JOIN (SELECT id, recorded_at FROM confirmations ORDER BY id LIMIT 1) first ON true
ON CONFLICT (name) DO UPDATE SET type = excluded.type
"""
# The name of a WAL file begins with the timeline, which is another one after each promotion.
_TIMELINE: Final = "('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::bigint"


def create(conn: Connection, name: str, type_: str, *, replay: bool = False) -> None:
    """Make sure that the sink has a row. A new one begins with a replay if `replay`. Commits. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        database.driver(conn).execute(_CREATE.format(timeline=_TIMELINE).encode(), [name, type_, int(replay)])


_CLAIM: Final = f"""
UPDATE sinks SET lease_owner = %(owner)s, lease_token = lease_token + 1,
    lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s)
WHERE name = %(name)s AND state = 'running' AND coalesce(lease_until < clock_timestamp(), true)
RETURNING lease_token, position, position_offset, recorded_at, generation, timeline, replay_until, replay_at, replay_eval_id,
    replay_occurred_at, replay_event_id, missed, {_TIMELINE}, batch_limit, sink_state, replayed_until
"""
# The rows that the outbox lost are in the log. A replay that runs is extended, or it might begin again for ever.
_REPLAY: Final = """
UPDATE sinks SET replay_until = clock_timestamp(), replayed_until = clock_timestamp() + interval '1 s', missed = 0,
    timeline = %(timeline)s, generation = generation + 1,
    replay_at = CASE WHEN replay_until IS NULL THEN recorded_at - make_interval(secs => %(margin_s)s) ELSE replay_at END
WHERE name = %(name)s AND lease_token = %(token)s
RETURNING generation, replay_until, replay_at, replayed_until
"""


def claim(conn: Connection, name: str, owner: str) -> Lease | None:
    """Take the lease of a sink that nobody works on; None where somebody does, or the sink is paused. Commits.

    A cursor of another timeline (the server was promoted), and one whose rows the outbox no longer holds, go back by MARGIN_S
    and are replayed from the log. Raises DatabaseOutage (retry).
    """
    values = {"name": name, "owner": owner, "lease_s": LEASE_S}
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        row = cursor.execute(_CLAIM.encode(), values).fetchone()
        if row is None:
            return None
        token, position, offset, recorded_at, generation, then, until, *at, missed, timeline, limit, state, replayed = row
        if missed or then != timeline:
            values = {"name": name, "token": token, "margin_s": MARGIN_S, "timeline": timeline}
            ((generation, until, at[0], replayed),) = cursor.execute(_REPLAY, values).fetchall()
    key = None if until is None else ReplayKey(at[0], at[1] or "", at[2] or at[0], str(at[3] or UUID(int=0)))
    found = Cursor(Place(position, offset, recorded_at), generation, timeline, until, key)
    return Lease(name, token, found, limit, state, replayed)


_ADVANCE: Final = """
UPDATE sinks SET position = %(id)s, position_offset = %(offset)s, recorded_at = %(recorded_at)s,
    replay_until = %(replay_until)s, replay_at = %(replay_at)s, replay_eval_id = %(replay_eval_id)s,
    replay_occurred_at = %(replay_occurred_at)s, replay_event_id = %(replay_event_id)s, delivered = delivered + %(delivered)s,
    dead = dead + %(dead)s, delivered_at = CASE WHEN %(delivered)s > 0 THEN clock_timestamp() ELSE delivered_at END,
    last_error = %(error)s, failing_since = NULL, gap_since = NULL, batch_limit = NULL,
    lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s)
WHERE name = %(name)s AND lease_token = %(token)s AND generation = %(generation)s
"""


def advance(
    conn: Connection, lease: Lease, cursor: Cursor, delivered: int = 0, letters: list[DeadLetterInsert] | None = None
) -> None:
    """Note that the sink confirmed everything up to `cursor`, and keep what it refused as dead letters, in one transaction.

    Raises LeaseLost, DatabaseOutage (the sink may be given the same again).
    """
    with database.errors(), conn.begin():
        raw = database.driver(conn)
        move(raw, lease, cursor, delivered, letters or [])
        if letters:
            dead_letters.insert(raw, letters)


def move(
    raw: psycopg.Connection[Any], lease: Lease, cursor: Cursor, delivered: int, letters: Sequence[DeadLetterInsert] = ()
) -> None:
    """Do as `advance` does, in the caller's transaction and without keeping `letters`. Locks the row of the sink."""
    key = cursor.replay_at
    values = {
        **cursor.place._asdict(),
        "replay_until": cursor.replay_until,
        "replay_at": key and key.recorded_at,
        "replay_eval_id": key and key.eval_id,
        "replay_occurred_at": key and key.occurred_at,
        "replay_event_id": key and UUID(key.event_id),
        "delivered": delivered,
        "dead": len(letters),
        "lease_s": LEASE_S,
        "name": lease.name,
        "token": lease.token,
        "generation": cursor.generation,
        "error": f"{letters[-1].error_class}: {letters[-1].error_message}"[:1000] if letters else None,
    }
    if raw.execute(_ADVANCE, values).rowcount != 1:
        raise LeaseLost(f"sink {lease.name}: the lease was taken over, or the cursor was moved")


_BEGIN_BATCH: Final = "UPDATE sinks SET batch_limit = %s WHERE name = %s AND lease_token = %s AND generation = %s"
_KEEP_STATE: Final = "UPDATE sinks SET sink_state = %s WHERE name = %s AND lease_token = %s AND generation = %s"


def begin_batch(conn: Connection, lease: Lease, limit: dict[str, Any]) -> None:
    """Store the cursor at the end of a batch, as JSON, before the sink gets the batch: a retry then sends the same batch.

    Commits. Raises LeaseLost, DatabaseOutage (retry).
    """
    _store(conn, _BEGIN_BATCH, lease, limit)


def keep_state(conn: Connection, lease: Lease) -> None:
    """Store the object that the sink keeps. Commits. Raises LeaseLost, DatabaseOutage (retry)."""
    _store(conn, _KEEP_STATE, lease, lease.state)


def _store(conn: Connection, statement: str, lease: Lease, document: dict[str, Any] | None) -> None:
    values = [Jsonb(document), lease.name, lease.token, lease.cursor.generation]
    with database.errors(), conn.begin():
        if database.driver(conn).execute(statement.encode(), values).rowcount != 1:
            raise LeaseLost(f"sink {lease.name}: the lease was taken over, or the cursor was moved")


_RENEW: Final = """
UPDATE sinks SET lease_until = clock_timestamp() + make_interval(secs => %s) WHERE name = %s AND lease_token = %s
"""
_RELEASE: Final = "UPDATE sinks SET lease_until = NULL WHERE name = %s AND lease_token = %s"
_FAILING: Final = """
UPDATE sinks SET last_error = %s, failing_since = coalesce(failing_since, clock_timestamp())
WHERE name = %s AND lease_token = %s
"""
_GAP: Final = "UPDATE sinks SET gap_since = clock_timestamp() - make_interval(secs => %s) WHERE name = %s AND lease_token = %s"


def renew(conn: Connection, lease: Lease) -> None:
    """Keep the lease for LEASE_S from now. Commits. Raises DatabaseOutage."""
    _write(conn, _RENEW, [LEASE_S, lease.name, lease.token])


def release(conn: Connection, lease: Lease) -> None:
    """Let others take the lease. Commits. Raises DatabaseOutage (the lease runs out by itself)."""
    _write(conn, _RELEASE, [lease.name, lease.token])


def note_failure(conn: Connection, lease: Lease, error: str) -> None:
    """Show operators why the sink takes nothing. Commits. Raises DatabaseOutage."""
    _write(conn, _FAILING, [printable(error).replace("\0", "\\x00")[:1000], lease.name, lease.token])


def note_gap(conn: Connection, lease: Lease, age_s: float) -> None:
    """Show operators for how long a transaction has held up the sink. Commits. Raises DatabaseOutage."""
    _write(conn, _GAP, [age_s, lease.name, lease.token])


_CHECK: Final = "SELECT FROM sinks WHERE name = %s AND lease_token = %s AND generation = %s AND state = 'running'"


def check(conn: Connection, lease: Lease) -> None:
    """Raise LeaseLost where the sink was paused, moved or taken over. Raises DatabaseOutage."""
    with database.errors(), conn.begin():
        _check(database.driver(conn), _CHECK, lease)


def hold(raw: psycopg.Connection[Any], lease: Lease) -> None:
    """Do as `check` does, in the caller's transaction, and keep other processes out until it ends."""
    _check(raw, _CHECK + " FOR NO KEY UPDATE", lease)


def _check(raw: psycopg.Connection[Any], statement: str, lease: Lease) -> None:
    if raw.execute(statement.encode(), [lease.name, lease.token, lease.cursor.generation]).rowcount != 1:
        raise LeaseLost(f"sink {lease.name}: it was paused or moved, or another process works on it")


def _write(conn: Connection, statement: str, values: list[Any]) -> None:
    with database.errors(), conn.begin():
        database.driver(conn).execute(statement.encode(), values)


class SinkStatus(NamedTuple):
    """The state of a sink for operators. `missed`: confirmations that left the outbox before the sink read them."""

    name: str
    type: str
    state: str
    position: int
    lag_events: int
    lag_s: float
    delivered: int
    dead: int
    missed: int
    last_error: str | None
    failing_since: datetime | None
    gap_s: float
    replay_at: datetime | None
    replay_until: datetime | None
    recorded_at: datetime
    delivered_at: datetime | None
    owner: str | None


# The lag is that of the outbox; of a replay, the age of the oldest event to come. Counting stops where a number says no more.
_STATUS: Final = f"""
SELECT name, type, CASE WHEN state = 'running' AND replay_until IS NOT NULL THEN 'replaying' ELSE state END AS state, position,
    waiting.events + replay.events AS lag_events,
    greatest(0, extract(epoch FROM clock_timestamp() - coalesce(replay.oldest, waiting.oldest)))::float8 AS lag_s,
    delivered, dead, missed, last_error, failing_since,
    coalesce(extract(epoch FROM clock_timestamp() - gap_since), 0)::float8 AS gap_s,
    replay_at, replay_until, sinks.recorded_at, delivered_at,
    CASE WHEN lease_until > clock_timestamp() THEN lease_owner END AS owner
FROM sinks
CROSS JOIN LATERAL (
    SELECT coalesce(sum(count), 0)::bigint AS events, min(recorded_at) AS oldest
    FROM (SELECT count, recorded_at FROM confirmations WHERE id > position ORDER BY id LIMIT 100000) c
) waiting
CROSS JOIN LATERAL (
    SELECT count(*) AS events, min(recorded_at) AS oldest FROM (
        SELECT recorded_at FROM evaluation_events e
        WHERE replay_until IS NOT NULL AND e.recorded_at > replay_at AND e.recorded_at <= replay_until LIMIT 100000) l
) replay
WHERE %(name)s::text IS NULL OR {OF_SINK} = %(name)s::text ORDER BY name
"""


def statuses(conn: Connection, name: str | None = None) -> list[SinkStatus]:
    """All sinks, each with all its ranges, or the one of that name. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=class_row(SinkStatus)) as cursor:
        rows = cursor.execute(_STATUS.encode(), {"name": name}).fetchall()
    ranges: dict[str, list[SinkStatus]] = {}
    for row in rows:
        ranges.setdefault(sink_ranges.of_row(row.name).sink, []).append(row)
    return [_together(sink, found) for sink, found in ranges.items()]


def _together(sink: str, rows: list[SinkStatus]) -> SinkStatus:
    """Return the status of a sink from those of its ranges. Each range's lag counts the events of all ranges."""
    last = min(rows, key=lambda row: row.position)
    states = {row.state for row in rows}
    errors = [row.last_error for row in rows if row.last_error]
    failing = [row.failing_since for row in rows if row.failing_since]
    delivered_at = [row.delivered_at for row in rows if row.delivered_at]
    return last._replace(
        name=sink,
        state=next(state for state in ("paused", "replaying", "running") if state in states),
        lag_events=max(row.lag_events for row in rows),
        lag_s=max(row.lag_s for row in rows),
        delivered=sum(row.delivered for row in rows),
        dead=sum(row.dead for row in rows),
        missed=max(row.missed for row in rows),
        last_error=errors[0] if errors else None,
        failing_since=min(failing, default=None),
        gap_s=max(row.gap_s for row in rows),
        delivered_at=max(delivered_at, default=None),
        owner=", ".join(sorted({row.owner for row in rows if row.owner})) or None,
    )


_SET_STATE: Final = f"UPDATE sinks SET state = %(state)s WHERE {OF_SINK} = %(name)s RETURNING to_jsonb(sinks) - 'lease_owner'"
_REWIND: Final = f"""
UPDATE sinks SET replay_until = clock_timestamp(), replayed_until = clock_timestamp() + interval '1 s',
    replay_eval_id = NULL, replay_occurred_at = NULL, replay_event_id = NULL, generation = generation + 1, missed = 0,
    last_error = NULL,
    replay_at = CASE WHEN missed > 0 THEN least(%(to)s, recorded_at - make_interval(secs => %(margin_s)s)) ELSE %(to)s END
WHERE {OF_SINK} = %(name)s RETURNING to_jsonb(sinks) - 'lease_owner'
"""


def set_state(conn: Connection, name: str, state: str, intent: Intent) -> bool:
    """Pause a sink or let it go on; False where there is none of that name. Commits. Raises DatabaseOutage (retry)."""
    return _change(conn, _SET_STATE, {"name": name, "state": state}, intent)


def rewind(conn: Connection, name: str, to: datetime, intent: Intent) -> bool:
    """Have the log replayed from a time on, and then the outbox from where the sink was. False where there is no such sink.

    Commits. Raises DatabaseOutage (retry).
    """
    return _change(conn, _REWIND, {"name": name, "to": to, "margin_s": MARGIN_S}, intent)


def _change(conn: Connection, statement: str, values: Mapping[str, Any], intent: Intent) -> bool:
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(statement.encode(), values).fetchall()
        if found:
            operator_actions.write(cursor, intent, 1)
    return bool(found)
