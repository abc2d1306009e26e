"""Findings of the anomaly detector: the table `anomalies`.

One row is one episode: the same of the same group is added to it until nothing was unusual for a while. It keeps the first and
the last evaluations that show it.
"""

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import NAMESPACE_URL, UUID, uuid5

import psycopg
from psycopg.rows import class_row
from sqlalchemy import Connection

from evalstore.storage import database, event_writer, operator_actions
from evalstore.storage.operator_actions import Intent
from models.anomalies import ANOMALY_DIMENSIONS, group_key
from models.confirmations import ANOMALY_DETECTED
from models.record import rfc3339

# The first and the last evaluations of a finding: so many of each.
_KEPT_IDS: Final = 10
# A group is quiet for so long before the next of the same is a finding of its own.
_QUIET: Final = timedelta(hours=1)
COUNT_LIMIT: Final = 100_000


class Detection(NamedTuple):
    """Something unusual that a batch shows. `at`: when the evaluation that completed the sign was recorded."""

    dimension: str
    value: str
    group_key: str
    metric: str
    kind: str
    expected: float
    observed: float
    eval_ids: tuple[str, ...]
    event_id: str
    at: datetime
    occurrences: int = 1


class Anomaly(NamedTuple):
    """A finding. `occurrences`: how often it was seen; `eval_ids`: the first and the last evaluations that show it."""

    id: UUID
    sink: str
    kind: str
    dimension: str
    value: str
    metric: str
    expected: float
    observed: float
    occurrences: int
    eval_ids: list[str]
    detected_at: datetime
    first_at: datetime
    last_at: datetime
    state: str
    acknowledged_by: str | None
    acknowledged_at: datetime | None
    reason: str | None


class Filter(NamedTuple):
    """Which findings; None: all."""

    state: str | None = None
    kind: str | None = None
    dimension: str | None = None
    value: str | None = None
    metric: str | None = None


_LATEST: Final = """
SELECT id, eval_ids FROM anomalies
WHERE group_key = %(group_key)s AND metric = %(metric)s AND kind = %(kind)s AND sink = %(sink)s AND last_at >= %(since)s
ORDER BY last_at DESC LIMIT 1 FOR UPDATE
"""
_EXTEND: Final = """
UPDATE anomalies SET observed = %(observed)s, occurrences = occurrences + %(occurrences)s, eval_ids = %(eval_ids)s,
    last_at = greatest(last_at, %(at)s)
WHERE id = %(id)s
"""
_INSERT: Final = """
INSERT INTO anomalies (id, sink, kind, dimension, value, group_key, metric, expected, observed, occurrences, eval_ids, first_at,
    last_at)
VALUES (%(id)s, %(sink)s, %(kind)s, %(dimension)s, %(value)s, %(group_key)s, %(metric)s, %(expected)s, %(observed)s,
    %(occurrences)s, %(eval_ids)s, %(at)s, %(at)s)
ON CONFLICT (id) DO NOTHING RETURNING detected_at
"""


def record(conn: psycopg.Connection[Any], sink: str, detections: Sequence[Detection]) -> list[UUID]:
    """Write findings, and a confirmation of each new one, in the caller's transaction. Return the ids of new ones.

    The id of a finding is made of what it is about, so that the same one is written once.
    """
    found, lines = [], []
    for one in detections:
        values = {**one._asdict(), "sink": sink, "since": one.at - _QUIET}
        row = conn.execute(_LATEST, values).fetchone()
        if row is not None:
            conn.execute(_EXTEND, {**values, "id": row[0], "eval_ids": _joined(row[1], one.eval_ids)})
            continue
        name = f"{sink}:{one.group_key}:{one.metric}:{one.kind}:{one.event_id}"
        values |= {"id": uuid5(NAMESPACE_URL, f"evalstore:anomaly:{name}"), "eval_ids": _joined([], one.eval_ids)}
        for (detected_at,) in conn.execute(_INSERT, values).fetchall():
            found.append(values["id"])
            lines.append(_line(values["id"], one, detected_at))
    if lines:
        event_writer.confirm(conn, [len(lines), "\n".join(lines), None])
    return found


def _joined(before: Sequence[str], after: Sequence[str]) -> list[str]:
    found = list(dict.fromkeys([*before, *after]))
    return found if len(found) <= 2 * _KEPT_IDS else found[:_KEPT_IDS] + found[-_KEPT_IDS:]


def _line(anomaly_id: UUID, one: Detection, detected_at: datetime) -> str:
    """The confirmation. It names no evaluation, so nothing has to be erased from it."""
    names = ("kind", "dimension", "value", "metric", "expected", "observed")
    told = {"type": ANOMALY_DETECTED, "anomaly_id": str(anomaly_id), **{name: getattr(one, name) for name in names}}
    return json.dumps({**told, "recorded_at": rfc3339(detected_at)}, separators=(",", ":"), ensure_ascii=False)


_ERASE: Final = """
UPDATE anomalies SET eval_ids = array_remove(eval_ids, %(eval_id)s) WHERE eval_ids @> ARRAY[%(eval_id)s::text] COLLATE "C"
"""
# The name of a submitter goes with the last of its evaluations.
_FORGET: Final = "DELETE FROM anomalies WHERE id = ANY(%s) AND dimension = 'submitter' AND eval_ids = '{}'"


def erase(conn: psycopg.Connection[Any], eval_id: str) -> None:
    """Name an evaluation in no finding any more, in the caller's transaction."""
    found = [row[0] for row in conn.execute(f"{_ERASE} RETURNING id".encode(), {"eval_id": eval_id})]
    if found:
        conn.execute(_FORGET, [found])


_COLUMNS: Final = ", ".join(Anomaly._fields)
_ORDER: Final = "ORDER BY detected_at DESC, id DESC LIMIT %(limit)s"
_BEFORE: Final = "(detected_at, id) < (%(detected_at)s, %(id)s)"


def page(conn: Connection, chosen: Filter, limit: int = 100, before: tuple[datetime, UUID] | None = None) -> list[Anomaly]:
    """The newest findings first, or those before a position. Raises DatabaseOutage (retry)."""
    values: dict[str, Any] = {name: value for name, value in chosen._asdict().items() if value is not None}
    conditions = [f"{name} = %({name})s" for name in values]
    if chosen.value is not None:
        dimensions = ANOMALY_DIMENSIONS if chosen.dimension is None else [chosen.dimension]
        values["keys"] = [group_key(dimension, chosen.value) for dimension in dimensions]
        conditions.append("group_key = ANY(%(keys)s)")
    if before is not None:
        values["detected_at"], values["id"] = before
        conditions.append(_BEFORE)
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    return _read(conn, f"SELECT {_COLUMNS} FROM anomalies {where} {_ORDER}", {**values, "limit": limit})


def get(conn: Connection, anomaly_id: UUID) -> Anomaly | None:
    """The finding of an id. Raises DatabaseOutage (retry)."""
    return next(iter(_read(conn, f"SELECT {_COLUMNS} FROM anomalies WHERE id = %(id)s", {"id": anomaly_id})), None)


_BETWEEN: Final = "SELECT id FROM anomalies WHERE id BETWEEN %s AND %s ORDER BY id LIMIT 2"


def between(conn: Connection, low: UUID, high: UUID) -> list[UUID]:
    """The first two ids of a range. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        return [row[0] for row in database.driver(conn).execute(_BETWEEN, [low, high]).fetchall()]


def _read(conn: Connection, query: str, values: dict[str, Any]) -> list[Anomaly]:
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=class_row(Anomaly)) as cursor:
        return cursor.execute(query.encode(), values).fetchall()


_ACKNOWLEDGE: Final = """
UPDATE anomalies SET state = 'acknowledged', acknowledged_by = %(by)s, acknowledged_at = now(), reason = %(reason)s
WHERE id = %(id)s AND state = 'open'
"""


def acknowledge(conn: Connection, anomaly_id: UUID, intent: Intent) -> bool:
    """Note that an operator has seen a finding; False unless it is open. Commits. Raises DatabaseOutage (retry)."""
    values = {"id": anomaly_id, "by": intent.actor, "reason": intent.reason}
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        if cursor.execute(_ACKNOWLEDGE, values).rowcount != 1:
            return False
        operator_actions.write(cursor, intent, 1)
    return True


_OPEN: Final = """
SELECT metric, kind, count(*) FROM (SELECT metric, kind FROM anomalies WHERE state = 'open' LIMIT %s) counted
GROUP BY metric, kind
"""


def count_open(conn: Connection) -> dict[tuple[str, str], int]:
    """Open findings by metric and kind, counted up to COUNT_LIMIT. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        found = database.driver(conn).execute(_OPEN, [COUNT_LIMIT]).fetchall()
    return {(metric, kind): count for metric, kind, count in found}
