"""Merge sorted data files in bounded memory."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from evalstore.lake import files
from evalstore.lake.files import LakeFile
from evalstore.lake.rows import ordered
from evalstore.lake.schema import LakeTable

if TYPE_CHECKING:
    import pyarrow as pa
    from pyiceberg.table import Table

# So many rows are in memory, uncompressed: a group that is sorted, or the heads of the files that are merged.
MEMORY_BYTES: Final = 96 * 1024 * 1024
_HEADS: Final = 16


def merged(found: "Table", table: LakeTable, chosen: Sequence[LakeFile]) -> Iterator["pa.Table"]:
    """Yield the rows of the files in the table's order. Raises LakeDamaged, LakeOutage."""
    with tempfile.TemporaryDirectory(prefix="evalstore-lake-") as folder:
        runs = [path for path in _runs(found, table, chosen, Path(folder)) if path.exists()]
        while len(runs) > _HEADS:
            group, runs = runs[:_HEADS], runs[_HEADS:]
            path = group[0].with_suffix(".merged")
            _spill(path, _merge(table, map(_read, group)))
            for done in group:
                done.unlink()
            runs.append(path)
        yield from _merge(table, [_read(path) for path in runs])


def _runs(found: "Table", table: LakeTable, chosen: Sequence[LakeFile], folder: Path) -> Iterator[Path]:
    """Write sorted runs of the rows into local files."""
    import pyarrow as pa  # noqa: PLC0415 - only processes with a lake load this

    held: list[pa.Table] = []
    number = 0
    for file in chosen:
        with files.opened(found.io, file.path) as parquet:
            for group in range(parquet.num_row_groups):
                held.append(files.aligned(parquet.read_row_group(group, use_threads=False), table))
                if sum(part.nbytes for part in held) > MEMORY_BYTES:
                    yield _sorted_run(table, held, folder / f"{number}.run")
                    held, number = [], number + 1
    if held:
        yield _sorted_run(table, held, folder / f"{number}.run")


def _sorted_run(table: LakeTable, held: Sequence["pa.Table"], path: Path) -> Path:
    import pyarrow as pa  # noqa: PLC0415 - as above

    rows = ordered(table, pa.concat_tables(held))
    size = max(1, rows.nbytes // rows.num_rows)
    step = max(1, MEMORY_BYTES // _HEADS // size)
    _spill(path, (rows.slice(at, step) for at in range(0, rows.num_rows, step)))
    return path


def _spill(path: Path, batches: Iterable["pa.Table"]) -> None:
    import pyarrow as pa  # noqa: PLC0415 - as above

    writer = None
    for batch in batches:
        if writer is None:
            writer = pa.ipc.new_file(str(path), batch.schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))
        writer.write_table(batch.combine_chunks())
    if writer is not None:
        writer.close()


def _read(path: Path) -> Iterator["pa.Table"]:
    import pyarrow as pa  # noqa: PLC0415 - as above

    with pa.OSFile(str(path)) as stream:
        reader = pa.ipc.open_file(stream)
        for number in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(number)])


def _merge(table: LakeTable, runs: Iterable[Iterator["pa.Table"]]) -> Iterator["pa.Table"]:
    """Merge sorted runs by `eval_id`: rows that no later part of a run comes before are sorted and passed on."""
    import pyarrow as pa  # noqa: PLC0415 - as above
    import pyarrow.compute as pc  # noqa: PLC0415

    heads = [(part, run) for run in runs if (part := next(run, None)) is not None]
    while heads:
        bound = min(part.column("eval_id")[-1].as_py() for part, _ in heads)
        passed, left = [], []
        for part, run in heads:
            count = pc.sum(pc.less_equal(part.column("eval_id"), bound)).as_py()
            passed.append(part.slice(0, count))
            rest = part.slice(count) if count < part.num_rows else next(run, None)
            if rest is not None:
                left.append((rest, run))
        heads = left
        yield ordered(table, pa.concat_tables(passed))
