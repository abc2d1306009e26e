"""The tables of the lake, and commits to them."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Self

from sqlalchemy import Engine

from evalstore.lake import catalog, files
from evalstore.lake.catalog import errors
from evalstore.lake.files import Files, LakeFile
from evalstore.lake.schema import TABLES, LakeTable
from evalstore.storage import database
from models.settings import Settings

if TYPE_CHECKING:
    import pyarrow as pa
    from pyiceberg.manifest import DataFile
    from pyiceberg.table import Table

_CURSOR: Final = "evalstore.cursor"
_ATTEMPTS: Final = 20
_LOCK: Final = "SELECT pg_advisory_xact_lock{}(%s)"


class LakeTables:
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
        summary = {} if cursor is None else {_CURSOR: json.dumps(cursor, sort_keys=True)}
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


class Attempt:
    """Suppresses a lost race."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        from pyiceberg.exceptions import CommitFailedException, ValidationException  # noqa: PLC0415 - as above

        return isinstance(error, (CommitFailedException, ValidationException))


def cursor_of(found: "Table") -> dict[str, Any] | None:
    """Return the cursor of the newest snapshot that has one: another program's snapshots have none."""
    snapshot = found.current_snapshot()
    while snapshot is not None:
        summary = snapshot.summary.additional_properties if snapshot.summary else {}
        if _CURSOR in summary:
            cursor: dict[str, Any] = json.loads(summary[_CURSOR])
            return cursor
        parent = snapshot.parent_snapshot_id
        snapshot = None if parent is None else found.snapshot_by_id(parent)
    return None
