"""Data files: writing them, finding those that may hold an evaluation, and reading few row groups of them."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import uuid4

from evalstore.lake.catalog import errors
from evalstore.lake.errors import LakeDamaged, LakeOutage
from evalstore.lake.schema import LakeTable, arrow_schema

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile
    from pyiceberg.io.pyarrow import PyArrowFileIO
    from pyiceberg.manifest import DataFile
    from pyiceberg.table import Table
    from pyiceberg.table.snapshots import Snapshot

ROW_GROUP: Final = 5000
_ROW_GROUP_BYTES: Final = 16 * 1024 * 1024
_FOOTERS: Final = 256
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Range(NamedTuple):
    """Times between which all wanted rows were stored, both included."""

    first: datetime
    last: datetime


class LakeFile(NamedTuple):
    """A data file of a snapshot, and the bounds of what it holds."""

    path: str
    day: int
    low: str
    high: str | None
    times: Range
    rows: int
    size: int
    entry: "DataFile"

    def may_hold(self, eval_ids: Sequence[str], within: Range | None) -> bool:
        """Tell whether the file may hold one of these sorted ids."""
        if within is not None and (within.last < self.times.first or within.first > self.times.last):
            return False
        return any(self.low <= eval_id and (self.high is None or eval_id <= self.high) for eval_id in eval_ids)


class Files:
    """The data files of one table. Keeps what it read of manifests and footers, which never change. For one thread."""

    def __init__(self, table: LakeTable) -> None:
        self.table = table
        self._manifests: dict[str, list[LakeFile]] = {}
        self._footers = OrderedDict[str, Any]()

    def of_snapshot(self, found: "Table", snapshot: "Snapshot | None" = None) -> list[LakeFile]:
        """Return the files of a snapshot, by default of the current one. Raises LakeOutage, LakeDamaged."""
        snapshot = snapshot or found.current_snapshot()
        if snapshot is None:
            return []
        with errors():
            manifests = {manifest.manifest_path: manifest for manifest in snapshot.manifests(found.io)}
            self._manifests = {
                path: self._manifests.get(path) or self._entries(found, manifest) for path, manifest in manifests.items()
            }
        return [file for files in self._manifests.values() for file in files]

    def _entries(self, found: "Table", manifest: Any) -> list[LakeFile]:
        return [self._file(entry.data_file) for entry in manifest.fetch_manifest_entry(found.io, discard_deleted=True)]

    def _file(self, entry: "DataFile") -> LakeFile:
        if entry.content != 0:
            raise LakeDamaged(
                f"{entry.file_path}: another program deleted rows without rewriting files; compact the table with it"
            )
        eval_id, time = self.table.id_of("eval_id"), self.table.id_of(self.table.time)
        lower, upper = entry.lower_bounds or {}, entry.upper_bounds or {}
        high = upper.get(eval_id)
        times = Range(
            _time(lower[time]) if time in lower else _EPOCH,
            _time(upper[time]) if time in upper else datetime.max.replace(tzinfo=UTC),
        )
        return LakeFile(
            entry.file_path,
            entry.partition[0],
            lower.get(eval_id, b"").decode(),
            None if high is None else high.decode(),
            times,
            entry.record_count,
            entry.file_size_in_bytes,
            entry,
        )

    def read(self, io: "PyArrowFileIO", file: LakeFile, eval_ids: "pa.Array") -> "pa.Table | None":
        """Return the rows of these evaluations in a file, or None. Raises LakeDamaged, LakeOutage."""
        import pyarrow as pa  # noqa: PLC0415 - see Lake.open
        import pyarrow.compute as pc  # noqa: PLC0415

        wanted, found = eval_ids.to_pylist(), []
        with opened(io, file.path, self._footers.get(file.path)) as parquet:
            self._keep_footer(file.path, parquet.metadata)
            for group in groups_of(parquet, wanted):
                ids = parquet.read_row_group(group, columns=["eval_id"], use_threads=False).column(0)
                mask = pc.is_in(ids, value_set=eval_ids)
                if pc.any(mask).as_py():
                    found.append(parquet.read_row_group(group, use_threads=False).filter(mask))
        return aligned(pa.concat_tables(found), self.table) if found else None

    def keys(self, io: "PyArrowFileIO", file: LakeFile) -> Iterator["pa.Table"]:
        """Yield the key columns of a file, a row group at a time."""
        with opened(io, file.path, self._footers.get(file.path)) as parquet:
            self._keep_footer(file.path, parquet.metadata)
            for group in range(parquet.num_row_groups):
                yield parquet.read_row_group(group, columns=list(self.table.key), use_threads=False)

    def _keep_footer(self, path: str, footer: Any) -> None:
        self._footers[path] = footer
        self._footers.move_to_end(path)
        if len(self._footers) > _FOOTERS:
            self._footers.popitem(last=False)


def aligned(rows: "pa.Table", table: LakeTable) -> "pa.Table":
    """Return rows of an older file with the columns that were added since."""
    import pyarrow as pa  # noqa: PLC0415 - see Lake.open

    schema = arrow_schema(table)
    columns = [
        rows.column(field.name).cast(field.type) if field.name in rows.column_names else pa.nulls(rows.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


class opened:  # noqa: N801 - a context manager
    """Open a data file; whatever fails inside names it: LakeDamaged, or LakeOutage where the store fails."""

    def __init__(self, io: "PyArrowFileIO", path: str, footer: Any = None) -> None:
        self._io, self._path, self._footer = io, path, footer

    def __enter__(self) -> "ParquetFile":
        import pyarrow.parquet as pq  # noqa: PLC0415 - see Lake.open

        scheme, netloc, path = self._io.parse_location(self._path)
        try:
            self._stream = self._io.fs_by_scheme(scheme, netloc).open_input_file(path)
        except OSError as error:
            raise self._translated(error) from error
        try:
            return pq.ParquetFile(self._stream, metadata=self._footer, page_checksum_verification=True)
        except (OSError, ValueError) as error:
            self._stream.close()
            raise self._translated(error) from error

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._stream.close()
        if isinstance(error, (OSError, ValueError)):
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> LakeDamaged | LakeOutage:
        text = f"{self._path}: {type(error).__name__}: {error}"
        is_away = (
            isinstance(error, OSError)
            and not isinstance(error, FileNotFoundError)
            and (error.errno is not None or "AWS Error" in str(error))
        )
        return LakeOutage(text) if is_away and "NO_SUCH_KEY" not in str(error).upper() else LakeDamaged(text)


def groups_of(parquet: "ParquetFile", eval_ids: Sequence[str]) -> list[int]:
    """Return the row groups that may hold one of these ids."""
    found = []
    for group in range(parquet.num_row_groups):
        statistics = parquet.metadata.row_group(group).column(0).statistics
        is_unknown = statistics is None or not statistics.has_min_max
        if is_unknown or any(statistics.min <= eval_id <= statistics.max for eval_id in eval_ids):
            found.append(group)
    return found


def _time(bound: bytes) -> datetime:
    return _EPOCH + timedelta(microseconds=int.from_bytes(bound, "little", signed=True))


def by_day(rows: "pa.Table", table: LakeTable) -> dict[int, "pa.Table"]:
    """Divide rows by the partition."""
    import pyarrow as pa  # noqa: PLC0415 - see Lake.open
    import pyarrow.compute as pc  # noqa: PLC0415

    days = pc.floor_temporal(rows.column(table.time), unit="day").cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
    days = pc.divide(days, 86_400_000_000)
    return {day: rows.filter(pc.equal(days, day)) for day in sorted(pc.unique(days).to_pylist())}


def write(found: "Table", table: LakeTable, day: int, batches: Iterable["pa.Table"]) -> "DataFile | None":
    """Write rows of a day, which come in order, as one data file; None if there are none. Raises LakeOutage."""
    import pyarrow.parquet as pq  # noqa: PLC0415 - see Lake.open

    path = f"{found.location().rstrip('/')}/data/{table.time}_day={_EPOCH.date() + timedelta(days=day)}/{uuid4()}.parquet"
    scheme, netloc, place = found.io.parse_location(path)
    writer, stream = None, None
    try:
        with errors():
            for batch in _regrouped(batches):
                if writer is None:
                    stream = found.io.new_output(path).create(overwrite=True)
                    writer = pq.ParquetWriter(stream, arrow_schema(table), **_options(table))
                size = max(1, batch.nbytes // max(1, batch.num_rows))
                writer.write_table(batch, row_group_size=max(100, min(ROW_GROUP, _ROW_GROUP_BYTES // size)))
            if writer is None or stream is None:
                return None
            writer.close()
            stream.close()
            file_size = found.io.fs_by_scheme(scheme, netloc).get_file_info(place).size
    except BaseException:
        remove(found.io, [path])
        raise
    return _data_file(found, path, day, file_size, writer.writer.metadata)


def _regrouped(batches: Iterable["pa.Table"]) -> Iterator["pa.Table"]:
    """Join small parts, so that row groups are not small."""
    import pyarrow as pa  # noqa: PLC0415 - see Lake.open

    held: list[pa.Table] = []
    for batch in batches:
        held.append(batch)
        if sum(part.num_rows for part in held) >= ROW_GROUP or sum(part.nbytes for part in held) >= _ROW_GROUP_BYTES:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _options(table: LakeTable) -> dict[str, Any]:
    return {
        "compression": "zstd",
        "compression_level": 6,
        "use_dictionary": True,
        "write_statistics": list(table.statistics),
        "write_page_checksum": True,
        "bloom_filter_options": {"eval_id": {"ndv": ROW_GROUP, "fpp": 0.01}},
    }


def _data_file(found: "Table", path: str, day: int, size: int, footer: Any) -> "DataFile":
    from pyiceberg.io import pyarrow as arrow_io  # noqa: PLC0415 - see Lake.open
    from pyiceberg.manifest import DataFile, DataFileContent, FileFormat  # noqa: PLC0415
    from pyiceberg.typedef import Record  # noqa: PLC0415

    schema = found.schema()
    statistics = arrow_io.data_file_statistics_from_parquet_metadata(
        footer,
        arrow_io.compute_statistics_plan(schema, found.properties),
        arrow_io.parquet_path_to_id_mapping(schema),
    )
    return DataFile.from_args(
        content=DataFileContent.DATA,
        file_path=path,
        file_format=FileFormat.PARQUET,
        partition=Record(day),
        file_size_in_bytes=size,
        sort_order_id=None,
        spec_id=found.metadata.default_spec_id,
        equality_ids=None,
        key_metadata=None,
        **statistics.to_serialized_dict(),
    )


def remove(io: "PyArrowFileIO", paths: Iterable[str]) -> None:
    """Remove files that no snapshot names, as far as the store lets: maintenance removes others later."""
    for path in paths:
        scheme, netloc, place = io.parse_location(path)
        try:
            io.fs_by_scheme(scheme, netloc).delete_file(place)
        except OSError:
            continue
