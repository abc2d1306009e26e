"""The metrics: one closed, typed list. Nothing else is ever exposed; docs/reference/metrics.md is made from it.

Labels hold no ids. A label's known values are given here, and its series are there from the start, at zero; where a label is
open (`()`), its values come with what is counted, and there are few of them.
"""

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple, get_args

Kind = Literal["counter", "gauge", "histogram"]
# Where a value comes from: what a group of processes counted, or what Redis and PostgreSQL hold, whoever asks.
Source = Literal["worker", "api", "any", "servers"]


class Metric(NamedTuple):
    """`source`: who has it. `across`: how the values of a group's processes become one."""

    name: str
    kind: Kind
    help: str
    source: Source
    labels: Mapping[str, tuple[str, ...]] = {}
    buckets: tuple[float, ...] = ()
    across: Literal["sum", "max"] = "sum"

    @property
    def unit(self) -> str:
        """`seconds`, `bytes`, or nothing for a number."""
        name = self.name.removesuffix("_total")
        return next((unit for unit in ("seconds", "bytes") if name.endswith(f"_{unit}")), "")


TYPES: Final = (
    *("evaluation:queued", "evaluation:started", "evaluation:completed", "evaluation:failed", "evaluation:timed_out"),
    *("evaluation:cancelled", "evaluation:lost", "unknown"),
)
# Classes of errors of which there is always a series, so that the first dead letter of a kind is a step from 0 to 1.
REASONS: Final = (
    *("ActorNotFound", "BadMessage", "EventIdReused", "InvalidEvent", "ObjectDamaged", "ObjectMissing"),
    *("ObjectUnavailable", "WorkerDied"),
    "other",
)
# Why a record was made anew from its log: it had no merge state, one of another version, or one that cannot be decoded.
RebuildReason = Literal["absent", "stale", "undecodable"]
QUEUES: Final = ("evaluations", "jobs")
_SERVERS: Final = ("postgresql", "redis")
_SHORT: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LONG: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 21600.0, 86400.0)
_HTTP: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_SIZES: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0)

METRICS: Final = (
    # What workers do.
    Metric(
        "evalstore_events_total",
        "counter",
        "Events that workers stored or buried, by what became of them.",
        "worker",
        {"outcome": ("applied", "duplicate", "dead"), "type": TYPES},
    ),
    Metric(
        "evalstore_conflicting_results_total",
        "counter",
        "Endings of an attempt that had ended before; the first by time and id stands.",
        "any",
    ),
    Metric(
        "evalstore_merge_states_rebuilt_total",
        "counter",
        "Records made anew from their event log, as their merge state was absent, of another version, or undecodable.",
        "any",
        {"reason": get_args(RebuildReason)},
    ),
    Metric("evalstore_batch_events", "histogram", "Events in a batch.", "worker", buckets=_SIZES),
    Metric(
        "evalstore_store_duration_seconds",
        "histogram",
        "Time a batch takes, by phase.",
        "worker",
        {"phase": ("decode", "connect", "write", "commit", "acknowledge")},
        _SHORT,
    ),
    Metric(
        "evalstore_event_latency_seconds",
        "histogram",
        "Until an event was committed, since it occurred and since it was sent. Of a batch above 32 events, by a sample of 32.",
        "worker",
        {"since": ("occurred", "sent")},
        _LONG,
    ),
    Metric(
        "evalstore_retries_total",
        "counter",
        "Messages and batches that are tried once more after a failure.",
        "worker",
        {"queue": (*QUEUES, "other")},
    ),
    Metric(
        "evalstore_redeliveries_total",
        "counter",
        "Messages given back to their queue: by a process that stops or lost track of them, or taken from one that died.",
        "worker",
        {"queue": (*QUEUES, "other"), "reason": ("died", "stopped", "stranded")},
    ),
    Metric(
        "evalstore_outage_seconds_total",
        "counter",
        "Time for which a server could not be used, as the process of the group saw it that saw most of it.",
        "worker",
        {"server": (*_SERVERS, "objects")},
        across="max",
    ),
    Metric(
        "evalstore_outage",
        "gauge",
        "1 while a process of the group waits for that server; objects: the object store.",
        "worker",
        {"server": (*_SERVERS, "objects")},
        across="max",
    ),
    Metric("evalstore_breaker_open", "gauge", "Processes that consume nothing, as most messages were bad.", "worker"),
    Metric("evalstore_confirmations_relayed_total", "counter", "Confirmations published.", "worker"),
    Metric(
        "evalstore_job_runs_total",
        "counter",
        "Runs of periodic jobs, by how they went.",
        "worker",
        {"job_name": (), "outcome": ("ok", "failed")},
    ),
    Metric(
        "evalstore_archived_contents_total",
        "counter",
        "Contents that were to move to the archive, by how it went.",
        "worker",
        {"outcome": ("archived", "failed")},
    ),
    Metric("evalstore_archived_bytes_total", "counter", "Bytes of content that moved to the archive.", "worker"),
    # What the HTTP service does.
    Metric(
        "evalstore_http_requests_total",
        "counter",
        "Requests, by the status of their answer; 0 where there was none.",
        "api",
        {"method": (), "route": (), "status": ()},
    ),
    Metric(
        "evalstore_http_request_duration_seconds",
        "histogram",
        "From a request's headers to the end of its answer.",
        "api",
        {"method": (), "route": ()},
        _HTTP,
    ),
    Metric(
        "evalstore_http_record_reads_total",
        "counter",
        "Records read, by where they came from: the caches or the database.",
        "api",
        {"source": ("memory", "redis", "database")},
    ),
    Metric(
        "evalstore_http_events_total",
        "counter",
        "Events taken by HTTP, by what became of them.",
        "api",
        {"outcome": ("applied", "duplicate", "reused", "invalid", "accepted")},
    ),
    Metric("evalstore_http_threads_busy", "gauge", "Threads of the service that are at work.", "api"),
    # Each group of processes: a worker's, a scheduler's, a service's.
    Metric("evalstore_build_info", "gauge", "1; which release runs here.", "any", {"version": (), "python": ()}),
    Metric(
        "evalstore_processes",
        "gauge",
        "Processes of the group, by whether each of their loops makes progress.",
        "any",
        {"role": ("worker", "scheduler", "api"), "state": ("live", "stuck")},
    ),
    Metric("evalstore_process_resident_memory_bytes", "gauge", "Memory of the group's processes.", "any"),
    Metric(
        "evalstore_database_connections",
        "gauge",
        "Connections to PostgreSQL in the group's pools.",
        "any",
        {"state": ("used", "idle")},
    ),
    Metric("evalstore_spool_bytes", "gauge", "What the spool of this host holds, where one is set.", "any"),
    Metric("evalstore_spool_oldest_age_seconds", "gauge", "For how long the oldest event has been in the spool.", "any"),
    Metric(
        "evalstore_disk_free_bytes",
        "gauge",
        "Room on the disk that holds a folder of ours, as this host sees it. S3, and a folder that cannot be read, tells none.",
        "any",
        {"folder": ("objects", "archive", "spool")},
    ),
    Metric("evalstore_disk_bytes", "gauge", "How large that disk is.", "any", {"folder": ("objects", "archive", "spool")}),
    # What the servers hold. Workers and schedulers all tell the same of it: take the max, not the sum.
    Metric(
        "evalstore_server_up",
        "gauge",
        "Whether a server answers. While one does not, what it holds is absent.",
        "servers",
        {"server": _SERVERS},
    ),
    Metric("evalstore_schema_ready", "gauge", "Whether the tables are those this release works with.", "servers"),
    Metric(
        "evalstore_queue_messages",
        "gauge",
        "Messages, by queue and state; dead: dead letters, in Redis and in the table.",
        "servers",
        {"queue": QUEUES, "state": ("ready", "inflight", "delayed", "dead")},
    ),
    Metric(
        "evalstore_queue_oldest_age_seconds",
        "gauge",
        "For how long the oldest message that is ready or in flight has waited; 0 if there is none.",
        "servers",
        {"queue": QUEUES},
    ),
    Metric("evalstore_consumers", "gauge", "Processes that consume a queue.", "servers", {"queue": QUEUES}),
    Metric(
        "evalstore_dead_letters",
        "gauge",
        "Dead letters, by the class of their error: waiting for an operator, or being redriven.",
        "servers",
        {"reason": REASONS, "state": ("dead", "redriving")},
    ),
    Metric(
        "evalstore_dead_letters_oldest_age_seconds",
        "gauge",
        "How long ago the oldest dead letter died first; 0 if there is none.",
        "servers",
        {"reason": REASONS},
    ),
    Metric("evalstore_redrives_running", "gauge", "Redrives that are not finished.", "servers"),
    Metric(
        "evalstore_redriven_letters_total",
        "counter",
        "Letters of all redrives, by what became of them.",
        "servers",
        {"outcome": ("stored", "died", "returned")},
    ),
    Metric("evalstore_confirmations_pending", "gauge", "Confirmations committed and not yet published.", "servers"),
    Metric(
        "evalstore_confirmations_oldest_age_seconds",
        "gauge",
        "For how long the oldest of them has waited; 0 if there is none.",
        "servers",
    ),
    Metric(
        "evalstore_evaluations_open",
        "gauge",
        "Evaluations that have no result yet.",
        "servers",
        {"status": ("queued", "running")},
    ),
    Metric(
        "evalstore_contents",
        "gauge",
        "Contents apart from their event's row, by where they are.",
        "servers",
        {"location": ("database", "objects", "archive")},
    ),
    Metric(
        "evalstore_content_bytes",
        "gauge",
        "Their bytes, before compression.",
        "servers",
        {"location": ("database", "objects", "archive")},
    ),
    Metric("evalstore_archive_due_contents", "gauge", "Contents that are to move to the archive.", "servers"),
    Metric("evalstore_archive_due_bytes", "gauge", "Their bytes.", "servers"),
    Metric(
        "evalstore_archive_oldest_due_age_seconds",
        "gauge",
        "How long ago the oldest of them was stored; 0 if there is none.",
        "servers",
    ),
    Metric("evalstore_archive_failing_contents", "gauge", "Those of them whose last move failed.", "servers"),
    Metric(
        "evalstore_job_last_success_timestamp_seconds",
        "gauge",
        "When a periodic job last ended well; 0 if never.",
        "servers",
        {"job_name": ()},
    ),
    Metric(
        "evalstore_job_next_run_timestamp_seconds",
        "gauge",
        "When a periodic job is due next.",
        "servers",
        {"job_name": ()},
    ),
    Metric("evalstore_job_last_duration_seconds", "gauge", "How long its last run took.", "servers", {"job_name": ()}),
    Metric("evalstore_job_failing", "gauge", "1 where its last run failed.", "servers", {"job_name": ()}),
    Metric("evalstore_redis_memory_bytes", "gauge", "Memory that Redis uses.", "servers"),
    Metric("evalstore_redis_memory_limit_bytes", "gauge", "What it may use (`maxmemory`); 0 without a limit.", "servers"),
    Metric("evalstore_postgresql_connections", "gauge", "Connections to PostgreSQL, everybody's.", "servers"),
    Metric("evalstore_postgresql_connections_limit", "gauge", "How many it takes (`max_connections`).", "servers"),
    Metric("evalstore_postgresql_bytes", "gauge", "Size of the database on disk.", "servers"),
)

BY_NAME: Final = {metric.name: metric for metric in METRICS}
