"""The state of everything, as `evalstore status` and the console show it."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import pendulum
from periodiq import cron
from sqlalchemy import Connection

from evalstore.storage import dead_letters, event_store, replay_jobs
from evalstore.storage.dead_letters import Selection
from evalstore.storage.table_stats import Numbers
from evalstore.telemetry.backend_stats import BackendStats, CachedProbe
from models.errors import EvalstoreError
from models.jobs import JOBS
from models.settings import Settings
from tasks.keys import QUEUE
from tasks.tracing import release

_TIMEOUT_S: Final = 5.0

T = TypeVar("T")
Snapshot = dict[str, Any]


class StatusProbe:
    """Query both servers. Each query has a timeout."""

    def __init__(self, loaded: Settings) -> None:
        self._stats = BackendStats(loaded, patience_s=_TIMEOUT_S)
        self._errors: dict[str, EvalstoreError] = {}
        self._evaluations = self._stats.probe(event_store.count_by_status)
        self._replays = self._stats.probe(replay_jobs.running)
        self._groups = self._stats.probe(lambda conn: dead_letters.groups(conn, Selection()))

    def snapshot(self) -> Snapshot:
        """Return the data that `-o json` prints."""
        redis_stats, database_stats, self._errors = self._stats.status()
        now = datetime.now(UTC)
        snapshot: Snapshot = {
            "at": now,
            "release": release(),
            "servers": {"redis": _state(redis_stats), "postgresql": _state(database_stats)},
        }
        snapshot["errors"] = {name: " ".join(str(error).split()) for name, error in self._errors.items()}
        snapshot["doubts"] = (self._stats.doubts.get() or []) if database_stats is not None else []
        if redis_stats is not None:
            snapshot |= _redis_snapshot(redis_stats, now)
        if "schema" in self._errors:
            snapshot["servers"]["postgresql"] = "has other tables"
        elif database_stats is not None:
            self._add_database(snapshot, database_stats[1])
        return snapshot

    def _add_database(self, snapshot: Snapshot, numbers: Numbers) -> None:
        snapshot["confirmations"] = {
            "pending": int(numbers["evalstore_confirmations_pending",]),
            "oldest_age_s": round(numbers["evalstore_confirmations_oldest_age_seconds",], 1),
        }
        snapshot["outbox"] = {
            "age_s": round(numbers["evalstore_outbox_age_seconds",], 1),
            "limit_s": numbers["evalstore_outbox_age_limit_seconds",],
        }
        snapshot["sinks"] = _sinks(numbers)
        snapshot["webhooks"] = {
            **{state: int(numbers["evalstore_webhooks", state]) for state in ("healthy", "failing", "disabled")},
            "oldest_due_s": round(numbers["evalstore_webhook_oldest_due_age_seconds",], 1),
        }
        snapshot["redrives_running"] = int(numbers["evalstore_redrives_running",])
        snapshot["replays_running"] = [
            {name: row[name] for name in ("id", "evaluations", "total", "different", "write")}
            for row in self._replays.get() or []
        ]
        snapshot["evaluations"] = self._evaluations.get()
        groups = self._groups.get()
        if groups is not None:
            kept = sum(group["count"] for group in groups)
            snapshot["dead_letters"] = {"count": kept, "groups": groups}
            for queue in snapshot.get("queues", []):
                queue["dead"] += sum(group["count"] for group in groups if group["queue"] == queue["queue"])
                if queue["queue"] == QUEUE:
                    snapshot["queue"]["dead"] = queue["dead"]
        if (contents := self._stats.contents.get()) is not None:
            places = ("database", "objects", "archive")
            snapshot["contents"] = {
                place: {
                    "count": contents.get(("evalstore_contents", place), 0),
                    "bytes": contents.get(("evalstore_content_bytes", place), 0),
                }
                for place in places
            }
            snapshot["archive"] = {
                "due": contents["evalstore_archive_due_contents",],
                "due_bytes": contents["evalstore_archive_due_bytes",],
                "oldest_due_age_s": round(contents["evalstore_archive_oldest_due_age_seconds",], 1),
                "failing": contents["evalstore_archive_failing_contents",],
            }

    def probe(self, read: Callable[[Connection], T]) -> CachedProbe[T]:
        """Return a further probe of the database that shares its connections."""
        return self._stats.probe(read)

    def close(self) -> None:
        """Close the connections."""
        self._stats.close()

    def raise_error(self) -> None:
        """Raise the error of a server that cannot be used, if there is one."""
        for error in self._errors.values():
            raise error


def _state(stats: object) -> str:
    return "away" if stats is None else "up"


def _sinks(numbers: Numbers) -> list[dict[str, Any]]:
    names = sorted(key[1] for key in numbers if key[0] == "evalstore_sink_running")
    return [
        {
            "sink": name,
            "running": bool(numbers["evalstore_sink_running", name]),
            "lag_events": int(numbers["evalstore_sink_lag_events", name]),
            "lag_s": round(numbers["evalstore_sink_lag_seconds", name], 1),
            "failing_s": round(numbers["evalstore_sink_failing_seconds", name], 1),
        }
        for name in names
    ]


def _redis_snapshot(stats: Any, now: datetime) -> Snapshot:
    queues = [
        {"queue": queue.name, **queue.messages, "oldest_age_s": round(queue.oldest_age_s, 1), "consumers": queue.consumers}
        for queue in stats.queues
    ]
    jobs = []
    for job in JOBS:
        last, success = stats.jobs.get(job.name, {}), stats.successes.get(job.name)
        upcoming = cron(job.schedule).next_valid_date(pendulum.instance(now))
        jobs.append(
            {
                "job": job.name,
                "outcome": last.get("outcome"),
                "last_run": last.get("started_at"),
                "last_success": datetime.fromtimestamp(success, UTC) if success else None,
                "next_run": datetime.fromtimestamp(upcoming.timestamp(), UTC),
                "error": last.get("error"),
            }
        )
    workers = sorted(stats.workers.values(), key=lambda worker: (worker["host"], worker["pid"]))
    return {
        "queue": next({state: row[state] for state in queue.messages} for row, queue in zip(queues, stats.queues, strict=True)),
        "queues": queues,
        "workers": workers,
        "events_per_s": round(sum(worker.get("events_per_s", 0) for worker in workers), 1),
        "outages": sorted({server for worker in workers for server in worker.get("away", [])}),
        "breaker_open": sum(bool(worker.get("breaker_open")) for worker in workers),
        "jobs": jobs,
    }
