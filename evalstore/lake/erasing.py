"""Erase evaluations from the lake: from data files, from older snapshots, and from files that no snapshot names.

Each step may be repeated. Before the last step nothing of other evaluations changes, so a crash loses nothing.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from evalstore.lake import catalog, maintenance
from evalstore.lake.errors import LakeOutage
from evalstore.lake.files import Files, LakeFile
from evalstore.lake.schema import TABLES, LakeTable
from evalstore.lake.tables import LakeTables

if TYPE_CHECKING:
    from pyiceberg.table import Table

_ROUNDS: Final = 10
# Another program's commit may be about to name these.
_METADATA_GRACE: Final = timedelta(minutes=10)


def erase(lake: LakeTables, eval_ids: Sequence[str]) -> int:
    """Remove all rows of these evaluations, and all files that held them. Returns how many files were rewritten.

    Raises LakeOutage, LakeDamaged; repeat it then.
    """
    return sum(_erase(lake, table, eval_ids) for table in TABLES) if eval_ids else 0


def _erase(lake: LakeTables, table: LakeTable, eval_ids: Sequence[str]) -> int:
    rewritten = 0
    for _ in range(_ROUNDS):
        with lake.writing():
            found = lake.load(table)
            for file in _holding(lake, table, found, lake.files[table].of_snapshot(found), eval_ids):
                rewritten += lake.replace(table, [file], lake.rewritten(found, table, file, eval_ids))
        with lake.writing(alone=True):
            found = lake.load(table)
            if not _holding(lake, table, found, lake.files[table].of_snapshot(found), eval_ids):
                _forget(lake, table, eval_ids)
                return rewritten
    raise LakeOutage("other programs write the erased evaluations again")


def _holding(
    lake: LakeTables, table: LakeTable, found: "Table", files: Sequence[LakeFile], eval_ids: Sequence[str]
) -> list[LakeFile]:
    import pyarrow as pa  # noqa: PLC0415 - only processes with a lake load this

    ids = pa.array(eval_ids, pa.string())
    reader = lake.files[table]
    return [file for file in files if file.may_hold(eval_ids, None) and reader.read(found.io, file, ids) is not None]


def _forget(lake: LakeTables, table: LakeTable, eval_ids: Sequence[str]) -> None:
    """Expire the snapshots whose files hold these evaluations, and remove the files. No other writer may be at work."""
    found = lake.load(table)
    current = found.current_snapshot()
    if current is None:
        return
    older = [snapshot for snapshot in found.snapshots() if snapshot.snapshot_id != current.snapshot_id]
    dirty = []
    known: dict[str, bool] = {}
    for snapshot in older:
        for file in Files(table).of_snapshot(found, snapshot):
            if file.path not in known:
                known[file.path] = bool(_holding(lake, table, found, [file], eval_ids))
        if any(known[file.path] for file in Files(table).of_snapshot(found, snapshot)):
            dirty.append(snapshot.snapshot_id)
    if dirty:
        # The current snapshot still lists the removed files, with their lowest and highest id. The next one does not.
        with catalog.errors():
            lake.commit(found, [], [])
            dirty.append(current.snapshot_id)
            maintenance.expire(lake.load(table), dirty)
    maintenance.remove_orphans(lake.load(table), data_grace=timedelta(0), metadata_grace=_METADATA_GRACE)
