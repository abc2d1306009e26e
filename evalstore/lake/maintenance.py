"""Keep the lake small and quick: merge small files, expire old snapshots, remove files that no snapshot names."""

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from evalstore.lake import catalog, files, merging
from evalstore.lake.files import LakeFile
from evalstore.lake.schema import TABLES, LakeTable
from evalstore.lake.tables import LakeTables

if TYPE_CHECKING:
    from pyiceberg.table import Table

# Readers that began with an older snapshot have this long.
KEEP: Final = timedelta(hours=3)
GRACE: Final = timedelta(hours=24)
_FILES: Final = 2
# A file that is so many times larger than all others of its day is left as it is.
_FACTOR: Final = 4
_OWN: Final = re.compile(r"/data/[a-z_]+_day=[0-9-]+/[0-9a-f]{8}-[0-9a-f-]{27}\.parquet$")


class Maintained(NamedTuple):
    """What a run did."""

    files_before: int = 0
    files_after: int = 0
    partitions: int = 0
    snapshots_expired: int = 0
    files_removed: int = 0

    def plus(self, other: "Maintained") -> "Maintained":
        """Add another table's."""
        return Maintained(*(one + two for one, two in zip(self, other, strict=True)))


def run_once(lake: LakeTables, *, keep: timedelta = KEEP, grace: timedelta = GRACE) -> Maintained:
    """Maintain all tables. Safe beside writers, readers and other runs, and after a crash at any step.

    `keep`: snapshots younger than this stay readable. `grace`: files that no snapshot names stay as long.
    Raises LakeOutage, LakeDamaged, DatabaseOutage; what was done until then stays done.
    """
    done = Maintained()
    for table in TABLES:
        done = done.plus(_maintain(lake, table, keep, grace))
    return done


def _maintain(lake: LakeTables, table: LakeTable, keep: timedelta, grace: timedelta) -> Maintained:
    before = len(lake.files[table].of_snapshot(lake.load(table)))
    partitions = compact(lake, table)
    expired = _expire_older(lake, table, keep)
    with lake.writing(alone=True):
        found = lake.load(table)
        removed = remove_orphans(found, data_grace=min(grace, keep), metadata_grace=grace)
        after = len(lake.files[table].of_snapshot(found))
    return Maintained(before, after, partitions, expired, removed)


def compact(lake: LakeTables, table: LakeTable) -> int:
    """Merge files, a day at a time, until a day has at most two. Returns how many days were merged."""
    found = lake.load(table)
    days: dict[int, list[LakeFile]] = {}
    for file in lake.files[table].of_snapshot(found):
        days.setdefault(file.day, []).append(file)
    done = 0
    for day, present in sorted(days.items()):
        chosen = choose(present)
        if chosen:
            with lake.writing():
                added = files.write(found, table, day, merging.merged(found, table, chosen))
                done += lake.replace(table, chosen, [added] if added is not None else [])
    return done


def choose(present: Sequence[LakeFile]) -> list[LakeFile]:
    """Return the files of a day to merge: all, or all but one that is much larger. Each row is so merged a few times only."""
    if len(present) <= _FILES:
        return []
    *small, largest = sorted(present, key=lambda file: file.size)
    return small if largest.size > _FACTOR * sum(file.size for file in small) else [*small, largest]


def _expire_older(lake: LakeTables, table: LakeTable, keep: timedelta) -> int:
    for attempt in lake.attempts():
        with attempt:
            found = lake.load(table)
            before = (datetime.now(UTC) - keep).timestamp() * 1000
            return expire(found, [one.snapshot_id for one in found.snapshots() if one.timestamp_ms < before])
    return 0


def expire(found: "Table", snapshot_ids: Sequence[int]) -> int:
    """Expire snapshots, but none that a branch or tag names. Returns how many. Raises LakeOutage, CommitFailedException."""
    named = {reference.snapshot_id for reference in found.metadata.refs.values()}
    there = {snapshot.snapshot_id for snapshot in found.snapshots()}
    chosen = [one for one in snapshot_ids if one in there - named]
    if chosen:
        with catalog.errors():
            found.maintenance.expire_snapshots().by_ids(chosen).commit()
    return len(chosen)


def remove_orphans(found: "Table", *, data_grace: timedelta, metadata_grace: timedelta) -> int:
    """Remove files that the table's metadata does not name. Returns how many. Raises LakeOutage.

    `data_grace` is that of data files of evalstore: its writers hold a lock, so that none is about to be committed now. Other
    files stay for `metadata_grace`: another program may be about to commit them.
    """
    now = datetime.now(UTC)
    with catalog.errors():
        named = {_place(found, path) for path in referenced(found)}
        gone = [
            info.path
            for info in catalog.listed(found.io, found.location())
            if info.path not in named and _modified_at(info) <= now - (data_grace if _OWN.search(info.path) else metadata_grace)
        ]
        scheme, netloc, _ = found.io.parse_location(found.location())
        storage = found.io.fs_by_scheme(scheme, netloc)
        for path in gone:
            storage.delete_file(path)
    return len(gone)


def _modified_at(info: Any) -> datetime:
    found: datetime = info.mtime
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _place(found: "Table", path: str) -> str:
    place: str = found.io.parse_location(path)[2]
    return place


def referenced(found: "Table") -> Iterator[str]:
    """Yield all files that the table's metadata names."""
    yield found.metadata_location
    yield from (entry.metadata_file for entry in found.metadata.metadata_log)
    yield from (statistics.statistics_path for statistics in found.metadata.statistics)
    yield from (statistics.statistics_path for statistics in found.metadata.partition_statistics)
    seen = set[str]()
    for snapshot in found.snapshots():
        yield snapshot.manifest_list
        for manifest in snapshot.manifests(found.io):
            if manifest.manifest_path not in seen:
                seen.add(manifest.manifest_path)
                yield manifest.manifest_path
                for entry in manifest.fetch_manifest_entry(found.io, discard_deleted=True):
                    yield entry.data_file.file_path
