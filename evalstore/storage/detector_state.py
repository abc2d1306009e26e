"""The state of anomaly detectors: the tables `anomaly_detectors` and `anomaly_groups`.

A batch's findings, the state after it and the cursor behind it are one transaction, so each event counts once. One process
works on a detector at a time: each write names the process that opened it last.
"""

from collections.abc import Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any, Final, NamedTuple
from uuid import UUID

from psycopg.rows import class_row
from psycopg.types.json import Jsonb
from sqlalchemy import Connection

from evalstore.storage import anomalies, database
from evalstore.storage.anomalies import Detection
from models.errors import Outage


class Progress(NamedTuple):
    """How far a detector has come.

    `latest`: the latest event that it has seen. In a replay of the log it skips events up to `skip_until`, which it has
    learned, and reports nothing up to `silent_until`, which was reported before.
    """

    library: str
    cursor: dict[str, Any] | None = None
    latest: datetime | None = None
    skip_until: datetime | None = None
    silent_until: datetime | None = None


class SavedGroup(NamedTuple):
    """The state of a group. `used`: its place in the order of use."""

    dimension: str
    key: str
    used: int
    state: bytes
    digest: bytes

    @property
    def is_whole(self) -> bool:
        """Whether the bytes are those that were written."""
        return sha256(self.state).digest() == self.digest


_OPEN: Final = """
INSERT INTO anomaly_detectors (name, owner, library) VALUES (%s, %s, %s)
ON CONFLICT (name) DO UPDATE SET owner = excluded.owner
RETURNING library, cursor, latest, skip_until, silent_until
"""


def open_(conn: Connection, name: str, owner: UUID, library: str) -> Progress:
    """Take over a detector from any other process. Commits. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=class_row(Progress)) as cursor:
        (found,) = cursor.execute(_OPEN, [name, owner, library]).fetchall()
    return found


_READ: Final = "SELECT library, cursor, latest, skip_until, silent_until FROM anomaly_detectors WHERE name = %s AND owner = %s"


def progress(conn: Connection, name: str, owner: UUID) -> Progress:
    """Read the progress again. Raises DatabaseOutage (retry), and Outage where another process took over."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=class_row(Progress)) as cursor:
        found = cursor.execute(_READ, [name, owner]).fetchone()
    if found is None:
        raise _taken_over(name)
    return found


def _taken_over(name: str) -> Outage:
    return Outage(f"another process works on the detector {name}")


_GROUPS: Final = "SELECT dimension, key, used, state, digest FROM anomaly_groups WHERE name = %s ORDER BY used"


def groups(conn: Connection, name: str) -> list[SavedGroup]:
    """All groups, those used last at the end. Raises DatabaseOutage (retry)."""
    with (
        database.errors(),
        conn.begin(),
        database.driver(conn).cursor(row_factory=class_row(SavedGroup), binary=True) as cursor,
    ):
        return cursor.execute(_GROUPS, [name]).fetchall()


_RECORDS: Final = "SELECT eval_id, language, submitter, executor_id FROM evaluations WHERE eval_id = ANY(%s::text[])"


class Known(NamedTuple):
    """What is known of an evaluation."""

    language: str | None
    submitter: str | None
    executor: str | None


def records(conn: Connection, eval_ids: Sequence[str]) -> dict[str, Known]:
    """The groups of evaluations. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        found = database.driver(conn).execute(_RECORDS, [list(eval_ids)]).fetchall()
    return {eval_id: Known(*rest) for eval_id, *rest in found}


_PROGRESS: Final = """
UPDATE anomaly_detectors SET library = %(library)s, cursor = %(cursor)s, latest = %(latest)s, skip_until = %(skip_until)s,
    silent_until = %(silent_until)s
WHERE name = %(name)s AND owner = %(owner)s
"""
_CLEAR: Final = "DELETE FROM anomaly_groups WHERE name = %s"
_REMOVE: Final = """
DELETE FROM anomaly_groups g USING unnest(%s::text[], %s::text[]) AS gone (dimension, key)
WHERE g.name = %s AND g.dimension = gone.dimension AND g.key = gone.key
"""
_WRITE: Final = """
INSERT INTO anomaly_groups (name, dimension, key, used, state, digest)
SELECT %s, * FROM unnest(%s::text[], %s::text[], %s::bigint[], %s::bytea[], %s::bytea[])
ON CONFLICT (name, dimension, key) DO UPDATE SET used = excluded.used, state = excluded.state, digest = excluded.digest
"""


class Step(NamedTuple):
    """What a batch changes: groups, which are all groups where `is_new`, groups that are gone, and detections."""

    changed: Sequence[SavedGroup] = ()
    removed: Sequence[tuple[str, str]] = ()
    detections: Sequence[Detection] = ()
    is_new: bool = False


def save(conn: Connection, name: str, owner: UUID, after: Progress, step: Step) -> list[UUID]:
    """Write a step; return the ids of new findings. Commits.

    Raises DatabaseOutage (the step may be written: read the progress), and Outage where another process took over.
    """
    cursor = None if after.cursor is None else Jsonb(after.cursor)
    values = {**after._asdict(), "cursor": cursor, "name": name, "owner": owner}
    with database.errors(), conn.begin():
        raw = database.driver(conn)
        if raw.execute(_PROGRESS, values).rowcount != 1:
            raise _taken_over(name)
        if step.is_new:
            raw.execute(_CLEAR, [name])
        if step.removed:
            raw.execute(_REMOVE, [[one[0] for one in step.removed], [one[1] for one in step.removed], name])
        if step.changed:
            raw.execute(_WRITE, [name, *map(list, zip(*step.changed, strict=True))])
        return anomalies.record(raw, name, step.detections)


def saved(dimension: str, key: str, used: int, state: bytes) -> SavedGroup:
    """The state of a group, with its digest."""
    return SavedGroup(dimension, key, used, state, sha256(state).digest())
