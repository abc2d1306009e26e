"""The archive's periodic jobs. Each run is bounded in time. A run reports an unavailable object store instead of waiting."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection

from evalstore.storage import archive as moving
from evalstore.storage import garbage_collect as sweeping
from evalstore.storage.archive import Archive
from evalstore.telemetry import backlog
from models.errors import InvalidSettings, ObjectStoreOutage
from models.logs import EventLogger
from models.settings import Settings
from tasks.broker import SendingBroker
from tasks.spool import Spool, folder_of
from worker.in_flight import InFlight
from worker.metrics import WorkerMetrics
from worker.verified_database import VerifiedDatabase

log = EventLogger("evalstore.worker")

# Longer than the time between two runs, so a few workers share a long queue of due content.
_LONGEST_S: Final = 240.0
_PARTS: Final = 48  # A day has 48 half hours.
STEP_S: Final = 300.0


class Progress:
    """Gives a job on the calling thread more time with each step that it finishes."""

    def __init__(self, connections: VerifiedDatabase, metrics: WorkerMetrics) -> None:
        self._connections, self._counters = connections, metrics.counters

    def begin(self) -> None:
        """Allow STEP_S until the first step."""
        self._counters.set_deadline(STEP_S)

    def step(self, *_: object) -> None:
        """Allow STEP_S for the next step."""
        self._connections.renew(STEP_S)
        self._counters.set_deadline(STEP_S)


def archive_of(settings: Settings) -> Archive | None:
    """Return access to the archive, or None if no archive is set up."""
    try:
        return Archive.of(settings)
    except InvalidSettings:
        return None


def move(
    conn: Connection, archive: Archive | None, in_flight: InFlight, metrics: WorkerMetrics, progress: Progress
) -> dict[str, Any]:
    """Move due content to the archive; returns how many contents, their bytes, and how many failed.

    Raises DatabaseOutage (retry).
    """
    if archive is None:
        return {"moved": 0, "archive": "not set up"}
    give_up = time.monotonic() + _LONGEST_S
    done = moving.run_once(
        conn,
        archive,
        datetime.now(UTC),
        go_on=lambda: time.monotonic() < give_up and not in_flight.stopping,
        watch=progress.step,
    )
    metrics.archived(done.moved, done.bytes, done.failed)
    told: dict[str, Any] = {"moved": done.moved, "bytes": done.bytes, "failed": done.failed}
    if done.failed:
        log.warning("archive_failed", count=done.failed)
    if done.outage:
        told["outage"] = str(done.outage)[:300]
    return told


def sweep(conn: Connection, broker: SendingBroker, settings: Settings, progress: Progress) -> dict[str, Any]:
    """Remove unreferenced objects in one part of the object names. Each half hour has its part. Return the counts.

    Raises DatabaseOutage, RedisOutage (retry).
    """
    now = datetime.now(UTC)
    folder = folder_of(settings)
    spool = Spool(folder, max_bytes=settings.spool_max_bytes) if folder else None
    grace = timedelta(days=settings.sweep_grace_days)
    told: dict[str, Any] = {"objects": 0, "removed": 0, "bytes": 0}
    for target in sweeping.targets(settings):
        try:
            done = sweeping.run_once(
                conn,
                target,
                now,
                grace,
                lambda: backlog.snapshot(broker, spool, longest_s=sweeping.longest_wait(grace).total_seconds()),
                watch=progress.step,
                part=((now.hour * 60 + now.minute) * _PARTS // 1440, _PARTS),
            )
        except ObjectStoreOutage as error:
            log.warning("sweep_postponed", error=error)
            told["outage"] = str(error)[:300]
            continue
        finally:
            target.store.close()
        told |= {name: told[name] + getattr(done, name) for name in ("objects", "removed", "bytes")}
        if done.paused:
            told["paused"] = done.paused
    return told
