"""Rebuild records from the event log, if their merge state belongs to another version or cannot be decoded.

Workers of releases before merge states change a record and leave its merge state unchanged.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final
from uuid import UUID

import psycopg
from sqlalchemy import Connection

from evalstore.storage import database, event_writer, sessions
from evalstore.storage.event_writer import CONTENTS
from evalstore.storage.row_statements import columns
from models.fold import Folded, fold
from models.metrics import RebuildReason
from models.record import EventRow, promote

# A log of up to one page is read in the transaction of the batch. A longer log is read before, in its own transaction.
PAGE: Final = 1000
_ROWS_AT_ONCE: Final = 5000
_LAST: Final = UUID(int=(1 << 128) - 1)

READ: Final = [name for name in EventRow._fields if name not in CONTENTS]
_BEFORE_CONTENT: Final = EventRow._fields.index(CONTENTS[0])
_PAGES: Final = f"""
SELECT {columns(READ, "logged.{}")} FROM unnest(%s::text[], %s::uuid[]) AS wanted (eval_id, event_id) CROSS JOIN LATERAL (
    SELECT {columns(READ, "e.{}")} FROM evaluation_events e
    WHERE e.eval_id = wanted.eval_id AND e.event_id >= wanted.event_id ORDER BY e.event_id LIMIT %s
) logged
"""
_ONE_PAGE: Final = f"""
SELECT {columns(READ)} FROM evaluation_events WHERE eval_id = %s::text AND event_id >= %s::uuid ORDER BY event_id LIMIT %s
"""


def event_row(columns: Sequence[Any]) -> EventRow:
    """Return an event from the columns `READ`, without its content."""
    return promote(EventRow(*columns[:_BEFORE_CONTENT], None, None, None, *columns[_BEFORE_CONTENT:]))


def fold_logs(
    conn: psycopg.Connection[Any], versions: Mapping[str, int], progress: Callable[[], object] = lambda: None
) -> dict[str, Folded]:
    """Return the records that the logs of these evaluations give. The caller holds the locks of the records.

    `versions` are the records' versions. The logs are read in pages, so memory does not grow with their length. `progress` is
    called after each page.
    """
    folded: dict[str, Folded] = {}
    for eval_ids in _groups(versions):
        after = dict.fromkeys(eval_ids, UUID(int=0))
        while after:
            pages: dict[str, list[EventRow]] = {}
            for row in _pages(conn, after):
                pages.setdefault(row[0], []).append(event_row(row))
            for eval_id, page in pages.items():
                folded[eval_id] = fold(folded.get(eval_id), page)
            after = {
                eval_id: UUID(int=last.int + 1)
                for eval_id, page in pages.items()
                if len(page) == PAGE and (last := max([event.event_id for event in page])) != _LAST
            }
            progress()
    return folded


def _pages(conn: psycopg.Connection[Any], after: Mapping[str, UUID]) -> Iterable[Sequence[Any]]:
    """Return the next events of each evaluation, from the event id that `after` gives. Citus refuses them in one statement."""
    if not sessions.has_citus(conn):
        return conn.cursor(binary=True).execute(_PAGES, [[*after], [*after.values()], PAGE])
    with event_writer.in_pipeline(conn):
        cursors = [conn.cursor(binary=True).execute(_ONE_PAGE, [*first, PAGE]) for first in after.items()]
        return [row for cursor in cursors for row in cursor.fetchall()]


def _groups(versions: Mapping[str, int]) -> Iterable[list[str]]:
    """Group the evaluations so that one page of each fits into _ROWS_AT_ONCE rows."""
    group: list[str] = []
    rows = 0
    for eval_id, version in versions.items():
        if group and rows + min(version, PAGE) > _ROWS_AT_ONCE:
            yield group
            group, rows = [], 0
        group.append(eval_id)
        rows += min(version, PAGE)
    if group:
        yield group


def rebuild(conn: Connection, eval_id: str, progress: Callable[[], object] = lambda: None) -> RebuildReason | None:
    """Rebuild the record of `eval_id` under its lock. Commit.

    Return the reason, or None if the merge state is usable now. Raises DatabaseOutage (retry).
    """
    with database.errors(), conn.begin():
        raw = database.driver(conn)
        stored = event_writer.records(event_writer.lock(raw, [eval_id])).get(eval_id)
        if stored is None or isinstance(reason := stored.add([]), Folded):
            return None
        for folded in fold_logs(raw, {eval_id: stored.record.version}, progress).values():
            event_writer.update(raw, folded)
        return reason
