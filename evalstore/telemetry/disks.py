"""Free space on the disks of the objects, the archive and the spool, as this machine sees them."""

import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from evalstore.telemetry.backend_stats import CachedProbe
from evalstore.telemetry.counters import Series
from models.addresses import parse_store_url
from models.settings import Settings

_PATIENCE_S: Final = 2.0


class Disks:
    """The disks that one process reports. S3 has no limit, so it is not reported."""

    def __init__(self, settings: Settings) -> None:
        folders = {
            "objects": _folder(settings.object_store_url),
            "archive": _folder(settings.archive_url),
            "spool": settings.spool_dir,
        }
        # One probe each: a mount blocks all callers while its server is unavailable.
        self._readings = {name: CachedProbe(partial(free_and_total, at), _PATIENCE_S) for name, at in folders.items() if at}

    def numbers(self) -> dict[Series, float]:
        """Return the numbers of the folders that can be read now."""
        found: dict[Series, float] = {}
        for name, reading in self._readings.items():
            if answer := reading.get():
                found["evalstore_disk_free_bytes", (name,)], found["evalstore_disk_bytes", (name,)] = answer
        return found


def free_and_total(folder: Path) -> tuple[int, int] | None:
    """Return the free and total bytes of the folder's file system, or None if the folder does not exist.

    As in df, bytes reserved for root count in neither number.
    """
    with suppress(OSError):
        seen = os.statvfs(folder)
        return seen.f_bavail * seen.f_frsize, (seen.f_blocks - seen.f_bfree + seen.f_bavail) * seen.f_frsize
    return None


def _folder(store_url: str | None) -> Path | None:
    if store_url is None:
        return None
    scheme, place, _ = parse_store_url(store_url)
    return Path(place) if scheme == "file" else None
