"""What the lake holds, for operators."""

from collections import Counter
from datetime import UTC, datetime
from typing import Any

from evalstore.lake.schema import TABLES
from evalstore.lake.tables import LakeTables


def tables(lake: LakeTables) -> list[dict[str, Any]]:
    """Return for each table its rows, files, bytes and snapshots. Reads no data file. Raises LakeOutage."""
    found = []
    for table in TABLES:
        loaded = lake.load(table)
        files = lake.files[table].of_snapshot(loaded)
        current = loaded.current_snapshot()
        found.append(
            {
                "table": table.name,
                "rows": sum(file.rows for file in files),
                "files": len(files),
                "bytes": sum(file.size for file in files),
                "days": len({file.day for file in files}),
                "most_files_a_day": max(Counter(file.day for file in files).values(), default=0),
                "snapshots": len(loaded.snapshots()),
                "committed_at": None if current is None else datetime.fromtimestamp(current.timestamp_ms / 1000, UTC),
                "location": loaded.location(),
                "metadata": loaded.metadata_location,
            }
        )
    return found
