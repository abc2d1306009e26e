"""The lake as other rooms use it: append, look up, erase. Each event and each record is in it once.

Every write looks at the current snapshot, leaves out rows that are there, and commits only if no other snapshot came in
between. So a write may be repeated after any failure. docs/decisions/0049
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from sqlalchemy import Engine

from evalstore.lake import catalog, files, rows
from evalstore.lake.catalog import errors
from evalstore.lake.errors import LakeOutage
from evalstore.lake.files import Files, LakeFile, Range
from evalstore.lake.schema import EVALUATIONS, EVENTS, TABLES, LakeTable
from evalstore.storage import database
from evalstore.storage.event_reader import StoredEvent
from models.settings import Settings

if TYPE_CHECKING:
    import pyarrow as pa
    from pyiceberg.manifest import DataFile
    from pyiceberg.table import Table

CURSOR: Final = "evalstore.cursor"
_ATTEMPTS: Final = 20
_LOCK: Final = "SELECT pg_advisory_xact_lock{}(%s)"


class HasFields(Protocol):
    """A StoredEvent, or an event of a sink."""

    @property
    def fields(self) -> dict[str, Any]: ...


class Lake:
    """The tables of one evalstore. For one thread. A process that forks opens its own."""

    def __init__(self, settings: Settings, engine: Engine, *, create: bool = True) -> None:
        self.settings, self.location = settings, catalog.warehouse(settings)
        self.engine = engine
        self._owner = catalog.evalstore_id(engine)
        self._catalog = catalog.open_catalog(settings, engine)
        self._create = create
        self.files = {table: Files(table) for table in TABLES}
        self._tables = {table: self._open(table) for table in TABLES}

    @classmethod
    def open(cls, settings: Settings, *, create: bool = True) -> Self:
        """Open the lake at EVALSTORE_LAKE_URL, and create its tables with `create`.

        Raises LakeOutage, DatabaseOutage (retry); LakeMismatch for another evalstore's warehouse or a newer release's;
        InvalidSettings without EVALSTORE_LAKE_URL or without the extra `lake`.
        """
        engine = database.connect(settings, pool_size=2)
        try:
            return cls(settings, engine, create=create)
        except BaseException:
            engine.dispose()
            raise

    def close(self) -> None:
        """Close the connections to the database."""
        self.engine.dispose()

    def _open(self, table: LakeTable) -> "Table":
        return catalog.open_table(self._catalog, table, self._owner, self.location, create=self._create)

    def load(self, table: LakeTable) -> "Table":
        """Return a table with its current snapshot. Raises LakeOutage."""
        with errors():
            return self._tables[table].refresh()

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
        from evalstore.lake import erasing  # noqa: PLC0415 - which uses this module

        return erasing.erase(self, sorted(set(eval_ids)))

    def _find(self, table: LakeTable, eval_ids: Iterable[str], within: Range | None) -> "pa.Table | None":
        import pyarrow as pa  # noqa: PLC0415 - only processes with a lake load this

        wanted = sorted(set(eval_ids))
        if not wanted:
            return None
        found = self.load(table)
        ids = pa.array(wanted, pa.string())
        parts = [
            part
            for file in self.files[table].of_snapshot(found)
            if file.may_hold(wanted, within) and (part := self.files[table].read(found.io, file, ids)) is not None
        ]
        return pa.concat_tables(parts) if parts else None

    @contextmanager
    def writing(self, *, alone: bool = False) -> Iterator[None]:
        """Hold the lock of writers, or with `alone` the lock that excludes all of them: then no file is yet to be committed.

        Raises DatabaseTimeout (retry).
        """
        key = int.from_bytes(hashlib.sha256(f"evalstore:lake:{self._owner}".encode()).digest()[:8], signed=True)
        with self.engine.connect() as conn, database.errors(), conn.begin():
            raw = database.driver(conn)
            raw.execute(_LOCK.format("" if alone else "_shared").encode(), [key])
            yield
            raw.execute("SELECT")  # raises if the lock was lost meanwhile

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

    def attempts(self) -> Iterator["Attempt"]:
        """Yield attempts at a commit; an attempt that lost a race is followed by another one after a moment."""
        for number in range(_ATTEMPTS):
            yield Attempt()
            time.sleep(min(0.05 * 2**number, 2.0))

    def commit(
        self,
        found: "Table",
        added: Sequence["DataFile"],
        removed: Sequence["DataFile"],
        cursor: Mapping[str, Any] | None = None,
        *,
        keep_files: bool = False,
    ) -> None:
        """Commit a snapshot on top of `found`, with its cursor or a newer one.

        Raises LakeOutage: it may be committed or not. A lost race raises CommitFailedException, and removes `added` unless
        `keep_files`.
        """
        from pyiceberg.exceptions import CommitFailedException  # noqa: PLC0415 - as above

        cursor = cursor if cursor is not None else cursor_of(found)
        summary = {} if cursor is None else {CURSOR: json.dumps(cursor, sort_keys=True)}
        try:
            with errors(), found.transaction() as transaction:
                update = transaction.update_snapshot(snapshot_properties=summary)
                with update.overwrite() if removed else update.merge_append() if added else update.fast_append() as producer:
                    for entry in removed:
                        producer.delete_data_file(entry)
                    for entry in added:
                        producer.append_data_file(entry)
        except CommitFailedException:
            if not keep_files:
                files.remove(found.io, [entry.file_path for entry in added])
            raise

    def replace(self, table: LakeTable, removed: Sequence[LakeFile], added: Sequence["DataFile"]) -> bool:
        """Commit new files in place of others, which have the same rows or fewer. False if another program was first.

        Raises LakeOutage: it may be committed or not.
        """
        gone = {file.path for file in removed}
        found = self._tables[table]
        for attempt in self.attempts():
            with attempt:
                found = self.load(table)
                if not gone <= {file.path for file in self.files[table].of_snapshot(found)}:
                    break
                self.commit(found, added, [file.entry for file in removed], keep_files=True)
                return True
        files.remove(found.io, [entry.file_path for entry in added])
        return False

    def rewritten(self, found: "Table", table: LakeTable, file: LakeFile, without: Sequence[str]) -> list["DataFile"]:
        """Write the rows of a file again without some evaluations; nothing if no rows are left."""
        import pyarrow as pa  # noqa: PLC0415 - as above
        import pyarrow.compute as pc  # noqa: PLC0415

        ids = pa.array(list(without), pa.string())

        def kept() -> Iterator["pa.Table"]:
            with files.opened(found.io, file.path) as parquet:
                for group in range(parquet.num_row_groups):
                    part = files.aligned(parquet.read_row_group(group, use_threads=False), table)
                    part = part.filter(pc.invert(pc.is_in(part.column("eval_id"), value_set=ids)))
                    if part.num_rows:
                        yield part

        written = files.write(found, table, file.day, kept())
        return [] if written is None else [written]

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


class Attempt:
    """Suppresses a lost race."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        from pyiceberg.exceptions import CommitFailedException, ValidationException  # noqa: PLC0415 - as above

        return isinstance(error, (CommitFailedException, ValidationException))


def overlaps(file: LakeFile, within: Range, low: str, high: str) -> bool:
    """Tell whether the file may hold rows of these times and ids."""
    if within.last < file.times.first or within.first > file.times.last:
        return False
    return file.low <= high and (file.high is None or low <= file.high)


def cursor_of(found: "Table") -> dict[str, Any] | None:
    """Return the cursor of the newest snapshot that has one: another program's snapshots have none."""
    snapshot = found.current_snapshot()
    while snapshot is not None:
        summary = snapshot.summary.additional_properties if snapshot.summary else {}
        if CURSOR in summary:
            cursor: dict[str, Any] = json.loads(summary[CURSOR])
            return cursor
        parent = snapshot.parent_snapshot_id
        snapshot = None if parent is None else found.snapshot_by_id(parent)
    return None
