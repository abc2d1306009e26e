"""The archive's periodic jobs: each run has an end, and an object store that is away is told of and not waited for."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Final

from sqlalchemy import Connection, Engine

from evalstore.storage import archive as moving
from evalstore.storage import garbage_collect as sweeping
from evalstore.storage.archive import Archive
from evalstore.telemetry import backlog
from models.errors import InvalidSettings, ObjectStoreOutage
from models.logs import EventLogger
from models.settings import settings
from tasks.spool import Spool, folder_of
from worker.broker import Broker

log = EventLogger("evalstore.worker")

# Longer than the time between two runs: while there is much to do, a few workers at once share it.
_LONGEST_S: Final = 240.0
_PARTS: Final = 48  # of a day: half hours
# For how long one step may take, such as a large upload over a slow line.
_STEP_S: Final = 300.0


@contextmanager
def long_running(broker: Broker, engine: Callable[[], Engine]) -> Iterator[Connection]:
    """A connection for work that takes long, as long as it gets on: see `_gets_on`."""
    with engine().connect() as conn, broker.watch.bounded(conn, _STEP_S):
        broker.metrics.counters.set_deadline(_STEP_S)
        yield conn


def _makes_progress(broker: Broker) -> None:
    broker.watch.renew(_STEP_S)
    broker.metrics.counters.set_deadline(_STEP_S)


@cache
def _archive() -> Archive | None:
    """This process's connections to the archive, if there is one."""
    try:
        return Archive.of(settings())
    except InvalidSettings:
        return None


def move(conn: Connection, broker: Broker) -> dict[str, Any]:
    """Move what is due to the archive; returns how many contents, their bytes, and how many could not be moved.

    Raises DatabaseOutage (retry).
    """
    archive = _archive()
    if archive is None:
        return {"moved": 0, "archive": "not set up"}
    give_up = time.monotonic() + _LONGEST_S
    done = moving.run_once(
        conn,
        archive,
        datetime.now(UTC),
        go_on=lambda: time.monotonic() < give_up and not broker.in_flight.stopping,
        watch=lambda _step, _row: _makes_progress(broker),
    )
    broker.metrics.archived(done.moved, done.bytes, done.failed)
    told: dict[str, Any] = {"moved": done.moved, "bytes": done.bytes, "failed": done.failed}
    if done.failed:
        log.warning("archive_failed", count=done.failed)
    if done.outage:
        told["outage"] = str(done.outage)[:300]
    return told


def sweep(conn: Connection, broker: Broker) -> dict[str, Any]:
    """Remove what nothing refers to among a part of all objects, another one each half hour; returns what was seen.

    Raises DatabaseOutage, RedisOutage (retry).
    """
    read, now = settings(), datetime.now(UTC)
    folder = folder_of(read)
    spool = Spool(folder, max_bytes=read.spool_max_bytes) if folder else None
    grace = timedelta(days=read.sweep_grace_days)
    told: dict[str, Any] = {"objects": 0, "removed": 0, "bytes": 0}
    for target in sweeping.targets(read):
        try:
            done = sweeping.run_once(
                conn,
                target,
                now,
                grace,
                lambda: backlog.snapshot(broker, spool, longest_s=sweeping.longest_wait(grace).total_seconds()),
                watch=lambda _: _makes_progress(broker),
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
