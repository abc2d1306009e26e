"""A record as it was at a time: the fold of the events that were stored by then."""

from datetime import datetime
from typing import Final, NamedTuple
from uuid import UUID

from sqlalchemy import Connection

from evalstore.storage import database, records
from evalstore.storage.rebuild import PAGE, READ, event_row
from evalstore.storage.records import RecordView
from evalstore.storage.row_statements import columns
from models.fold import Folded, fold

# `recorded_at` is the time at which a storing transaction begins; it is seen when that commits, up to so much later.
LONGEST_TRANSACTION_S: Final = 300

_IS_PROVISIONAL: Final = "SELECT %s > now() - make_interval(secs => %s)"
_PAGE: Final = f"""
SELECT {columns(READ)}, recorded_at FROM evaluation_events
WHERE eval_id = %s AND event_id > %s AND recorded_at <= %s ORDER BY event_id LIMIT {PAGE}
"""
_FIRST: Final = _PAGE.replace("event_id > %s", "event_id >= %s")


class PastRecord(NamedTuple):
    """A record as it was. `is_provisional`: a transaction that is not committed yet may still change it.

    `code_event_id` and `result_event_id` are the events that hold its content.
    """

    view: RecordView
    is_provisional: bool
    code_event_id: UUID | None
    result_event_id: UUID | None


def load(conn: Connection, eval_id: str, at: datetime) -> PastRecord | None:
    """Return the record as it was at `at`, or None where no event was stored by then.

    Reads the log by pages, so that memory does not grow with its length. Content that is an object is left to
    `records.complete`. Raises DatabaseOutage (retry).
    """
    with database.snapshot(conn) as raw, raw.cursor(binary=True) as cursor:
        ((is_provisional,),) = cursor.execute(_IS_PROVISIONAL, [at, LONGEST_TRANSACTION_S]).fetchall()
        folded: Folded | None = None
        first = last = at
        query, after = _FIRST, UUID(int=0)
        while rows := cursor.execute(query, [eval_id, after, at]).fetchall():
            folded = fold(folded, [event_row(row[:-1]) for row in rows])
            times = [row[-1] for row in rows]
            first = min(first, *times)
            last = max(times) if query == _FIRST else max(last, *times)
            query, after = _PAGE, rows[-1][1]
            if len(rows) < PAGE:
                break
        if folded is None:
            return None
        made = folded.record
        view = records.from_row(cursor, made, first, last)
        return PastRecord(view, is_provisional, made.code_event_id, made.result_event_id)
