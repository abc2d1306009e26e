"""How a worker of the release before merge states stores events, beside workers of this one."""

from collections import defaultdict
from typing import Any
from uuid import UUID

import msgspec
import psycopg
from psycopg.types.json import Jsonb
from sqlalchemy import Connection

from evalstore.storage import database, event_store, rebuild
from evalstore.storage.event_store import Confirmation, Stored
from evalstore.storage.event_writer import CopyWriter
from models import Event
from models.fold import Folded, fold
from models.record import EventRow, RecordRow, to_row

BEFORE = [name for name in RecordRow._fields if name != "metadata_truncated"]


def store_as_before(conn: Connection, events: list[Event]) -> Stored:
    """As a worker before merge states: it creates records first, folds the whole log, and leaves the merge state as it is."""
    raw = database.driver(conn)
    by_evaluation: dict[str, dict[UUID, EventRow]] = defaultdict(dict)
    for one in map(to_row, events):
        by_evaluation[one.eval_id].setdefault(one.event_id, one)
    names, values = ", ".join(BEFORE), ", ".join(["%s"] * len(BEFORE))
    while True:
        confirmed: list[Confirmation] = []
        conflicts = 0
        try:
            with conn.begin():
                created = {
                    eval_id: raw.execute(
                        f"INSERT INTO evaluations ({names}) VALUES ({values}) ON CONFLICT DO NOTHING".encode(),
                        before_row(fold(None, list(by_evaluation[eval_id].values()))),
                    ).rowcount
                    for eval_id in sorted(by_evaluation)
                }
                raw.execute(
                    "SELECT FROM evaluations WHERE eval_id = ANY(%s) ORDER BY eval_id FOR NO KEY UPDATE", [[*by_evaluation]]
                )
                logged = rebuild.fold_logs(raw, dict.fromkeys(by_evaluation, 1))
                ids = raw.execute(
                    "SELECT eval_id, event_id FROM evaluation_events WHERE eval_id = ANY(%s)", [[*by_evaluation]]
                ).fetchall()
                new = {
                    eval_id: of_one
                    for eval_id, by_id in by_evaluation.items()
                    if (of_one := [one for event_id, one in by_id.items() if (eval_id, event_id) not in ids])
                }
                contents: list[Any] = []
                rows = [event_store._without_large(one, contents) for of_one in new.values() for one in of_one]
                CopyWriter(raw, {}).log(rows, contents)
                for eval_id, of_one in new.items():
                    folded = fold(logged.get(eval_id), of_one)
                    conflicts += folded.conflicting_results
                    made = folded.record
                    raw.execute(
                        f"UPDATE evaluations SET ({names}) = ({values}), updated_at = statement_timestamp() "
                        "WHERE eval_id = %s".encode(),
                        [*before_row(folded), eval_id],
                    )
                    kind: Any = f"storage:evaluation:{'created' if created[eval_id] else 'updated'}"
                    ids_of_one = [one.event_id for one in of_one]
                    confirmed.append(
                        Confirmation(kind, eval_id, made.version, made.status, made.run_id or msgspec.UNSET, ids_of_one, "")
                    )
                if confirmed:
                    body = msgspec.json.Encoder().encode_lines(confirmed)[:-1].decode()
                    raw.execute("INSERT INTO confirmations (count, body) VALUES (%s, %s)", [len(confirmed), body])
        except psycopg.errors.DeadlockDetected:
            continue
        outcomes: list[Any] = []
        told: set[tuple[str, UUID]] = set()
        for one in map(to_row, events):
            key = one.eval_id, one.event_id
            is_new = one.eval_id in new and one in new[one.eval_id] and key not in told
            told.add(key)
            outcomes.append("applied" if is_new else "duplicate")
        return Stored(outcomes, confirmed, conflicts)


def before_row(folded: Folded) -> list[Any]:
    record = folded.record._asdict()
    return [Jsonb(record[name]) if name == "metadata" else record[name] for name in BEFORE]
