"""The lake as other rooms use it: append, look up, erase. Each event and each record is in it once.

Every write looks at the current snapshot, leaves out rows that are there, and commits only if no other snapshot came in
between. So a write may be repeated after any failure. docs/decisions/0049
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from evalstore.lake import erasing, files, rows
from evalstore.lake.errors import LakeDamaged, LakeOutage
from evalstore.lake.files import LakeFile, Range
from evalstore.lake.schema import EVALUATIONS, EVENTS, LakeTable
from evalstore.lake.tables import LakeTables, cursor_of
from evalstore.storage.event_reader import StoredEvent

if TYPE_CHECKING:
    import pyarrow as pa
    from pyiceberg.table import Table


class HasFields(Protocol):
    """A StoredEvent, or an event of a sink."""

    @property
    def fields(self) -> dict[str, Any]: ...


class Lake(LakeTables):
    """The lake of one evalstore. For one thread. A process that forks opens its own."""

    def cursor(self) -> dict[str, Any] | None:
        """Return the cursor of the last `append_events` that had one; None in a new lake. Raises LakeOutage."""
        return cursor_of(self.load(EVENTS))

    def append_events(self, events: Sequence[HasFields], cursor: Mapping[str, Any] | None = None) -> int:
        """Append those events that are not there, and set the cursor in the same commit. Returns how many were appended.

        Raises LakeOutage, LakeDamaged; it may be repeated.
        """
        return self._append(EVENTS, rows.event_rows(events), cursor)

    def append_records(self, records: Sequence[Mapping[str, Any]]) -> int:
        """Write records of retired evaluations: a record that is there is replaced if it differs. Returns how many changed.

        A record has the columns of `evaluations` (`created_at` included) and may have `code`, `output`, `error`, or their
        `_sha256`, `_size`, `_encoding`. Raises LakeOutage, LakeDamaged; it may be repeated.
        """
        unique = {record["eval_id"]: record for record in records}
        return self._append(EVALUATIONS, rows.to_table(EVALUATIONS, map(rows.record_row, unique.values())), None)

    def events_of(self, eval_ids: Iterable[str], within: Range | None = None) -> dict[str, list[StoredEvent]]:
        """Return the events of these evaluations by (`occurred_at`, `event_id`); ids without events are left out.

        `within`: between which times (`recorded_at`) all of them were stored; without it every day is looked at.
        Raises LakeOutage, LakeDamaged, which names the file.
        """
        found: dict[str, list[StoredEvent]] = {}
        if (read := self._find(EVENTS, eval_ids, within)) is not None:
            for row in rows.ordered(EVENTS, read).to_pylist():
                found.setdefault(row["eval_id"], []).append(rows.event_of(row))
        return found

    def records_of(self, eval_ids: Iterable[str], within: Range | None = None) -> dict[str, dict[str, Any]]:
        """Return the records of those evaluations that have one. `within` is about `created_at`. Raises as `events_of`."""
        read = self._find(EVALUATIONS, eval_ids, within)
        return {} if read is None else {row["eval_id"]: rows.record_of(row) for row in read.to_pylist()}

    def erase(self, eval_ids: Iterable[str]) -> int:
        """Remove everything of these evaluations from all files of the lake. Returns how many files were rewritten.

        Raises LakeOutage, LakeDamaged; repeat it then.
        """
        return erasing.erase(self, sorted(set(eval_ids)))

    def _find(self, table: LakeTable, eval_ids: Iterable[str], within: Range | None) -> "pa.Table | None":
        import pyarrow as pa  # noqa: PLC0415 - only processes with a lake load this

        wanted = sorted(set(eval_ids))
        if not wanted:
            return None
        ids, files_of = pa.array(wanted, pa.string()), self.files[table]
        while True:
            found = self.load(table)
            snapshot = found.current_snapshot()
            try:
                parts = [
                    part
                    for file in files_of.of_snapshot(found)
                    if file.may_hold(wanted, within) and (part := files_of.read(found.io, file, ids)) is not None
                ]
            except LakeDamaged:
                if self.load(table).current_snapshot() == snapshot:
                    raise
                continue  # an erasure removed the file meanwhile
            return pa.concat_tables(parts) if parts else None

    def _append(self, table: LakeTable, new: "pa.Table", cursor: Mapping[str, Any] | None) -> int:
        for attempt in self.attempts():
            with attempt, self.writing():
                found = self.load(table)
                present = self.files[table].of_snapshot(found)
                if table is EVENTS:
                    left = self._without_present(found, present, new)
                    replaced = list[LakeFile]()
                else:
                    left, replaced = self._changed(found, present, new)
                if not left.num_rows and (cursor is None or dict(cursor) == cursor_of(found)):
                    return 0
                added = []
                for file in replaced:
                    added += self.rewritten(found, table, file, left.column("eval_id").to_pylist())
                for day, part in files.by_day(left, table).items():
                    added += filter(None, [files.write(found, table, day, [part])])
                self.commit(found, added, [file.entry for file in replaced], cursor)
                return int(left.num_rows)
        raise LakeOutage("other writers of the lake came first each time")

    def _without_present(self, found: "Table", present: Sequence[LakeFile], new: "pa.Table") -> "pa.Table":
        """Return the rows whose key is not in the snapshot. Files of other times are not opened."""
        import pyarrow as pa  # noqa: PLC0415 - as above
        import pyarrow.compute as pc  # noqa: PLC0415

        if not new.num_rows:
            return new
        times, ids = pc.min_max(new.column(EVENTS.time)).as_py(), pc.min_max(new.column("eval_id")).as_py()
        within = Range(times["min"], times["max"])
        event_ids = new.column("event_id").combine_chunks()
        there = set[tuple[str, str]]()
        for file in present:
            if not overlaps(file, within, ids["min"], ids["max"]):
                continue
            for keys in self.files[EVENTS].keys(found.io, file):
                hits = keys.filter(pc.is_in(keys.column("event_id"), value_set=event_ids))
                there.update(zip(hits.column("eval_id").to_pylist(), hits.column("event_id").to_pylist(), strict=True))
        if not there:
            return new
        keys = zip(new.column("eval_id").to_pylist(), new.column("event_id").to_pylist(), strict=True)
        return new.filter(pa.array([key not in there for key in keys]))

    def _changed(self, found: "Table", present: Sequence[LakeFile], new: "pa.Table") -> tuple["pa.Table", list[LakeFile]]:
        """Return the records that are missing or differ, and the files that hold an older one."""
        import pyarrow as pa  # noqa: PLC0415 - as above

        ids = new.column("eval_id").combine_chunks()
        wanted = ids.to_pylist()
        rows_of_id = {row["eval_id"]: row for row in new.to_pylist()}
        same, replaced = set[str](), []
        for file in present:
            if not file.may_hold(wanted, None):
                continue
            read = self.files[EVALUATIONS].read(found.io, file, ids)
            old = [] if read is None else read.to_pylist()
            same |= {row["eval_id"] for row in old if row == rows_of_id[row["eval_id"]]}
            if any(row["eval_id"] not in same for row in old):
                replaced.append(file)
        return new.filter(pa.array([eval_id not in same for eval_id in wanted], pa.bool_())), replaced


def overlaps(file: LakeFile, within: Range, low: str, high: str) -> bool:
    """Tell whether the file may hold rows of these times and ids."""
    if within.last < file.times.first or within.first > file.times.last:
        return False
    return file.low <= high and (file.high is None or low <= file.high)
