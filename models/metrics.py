"""The closed list of metrics, from which docs/reference/metrics.md is made.

Labels hold no ids. A label with listed values has all its series from the start, at zero. An open label (`()`) gets its values
as they are counted; keep them few.
"""

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple, get_args

from models.anomalies import ANOMALY_KINDS, ANOMALY_METRICS

Kind = Literal["counter", "gauge", "histogram"]
# The source of the value: a group of processes, or Redis and PostgreSQL (`servers`).
Source = Literal["worker", "api", "sinks", "bridge", "any", "servers"]


class Metric(NamedTuple):
    """`across`: how to merge the values of a group's processes."""

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
# Error classes with a series from the start, so that the first dead letter of a class is a step from 0 to 1.
REASONS: Final = (
    *("ActorNotFound", "BadMessage", "EventIdReused", "InvalidEvent", "ObjectDamaged", "ObjectMissing"),
    *("ObjectUnavailable", "WorkerDied"),
    "other",
)
# Why a record was rebuilt from its log: its merge state was absent, of another version, or undecodable.
RebuildReason = Literal["absent", "stale", "undecodable"]
QUEUES: Final = ("evaluations", "jobs")
_SERVERS: Final = ("postgresql", "redis")
_SHORT: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LONG: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 21600.0, 86400.0)
_HTTP: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_SIZES: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0)

METRICS: Final = (
    # Workers.
    Metric(
        "evalstore_events_total",
        "counter",
        "Events that workers processed, by outcome; dead: now a dead letter; erased: of an erased evaluation, dropped.",
        "worker",
        {"outcome": ("applied", "duplicate", "dead", "erased"), "type": TYPES},
    ),
    Metric(
        "evalstore_conflicting_results_total",
        "counter",
        "Results of an attempt that already had another result; the first by time and id stands.",
        "any",
    ),
    Metric(
        "evalstore_merge_states_rebuilt_total",
        "counter",
        "Records rebuilt from their event log because their merge state was absent, of another version, or undecodable.",
        "any",
        {"reason": get_args(RebuildReason)},
    ),
    Metric(
        "evalstore_hook_duration_seconds",
        "histogram",
        "Time of a validator or an enricher for each event, as the mean of a call with a batch.",
        "any",
        {"hook": ()},
        (0.000001, 0.00001, 0.0001, *_SHORT),
    ),
    Metric(
        "evalstore_hook_events_total",
        "counter",
        "Events by what a validator or an enricher made of them; failed: it raised an error; "
        "skipped: it was switched off, or took too long. Both are stored without it.",
        "any",
        {"hook": (), "outcome": ("passed", "refused", "failed", "skipped")},
    ),
    Metric(
        "evalstore_hook_off",
        "gauge",
        "1 while a process of the group has switched off this validator or enricher, because it took too long.",
        "any",
        {"hook": ()},
        across="max",
    ),
    Metric("evalstore_batch_events", "histogram", "Events in a batch.", "worker", buckets=_SIZES),
    Metric(
        "evalstore_store_duration_seconds",
        "histogram",
        "Duration of each phase of storing a batch.",
        "worker",
        {"phase": ("decode", "connect", "write", "commit", "acknowledge")},
        _SHORT,
    ),
    Metric(
        "evalstore_event_latency_seconds",
        "histogram",
        "Time from an event's occurrence, and from its sending, to its commit. A batch above 32 events is sampled: 32 events.",
        "worker",
        {"since": ("occurred", "sent")},
        _LONG,
    ),
    Metric(
        "evalstore_retries_total",
        "counter",
        "Retries of messages and batches after a failure.",
        "worker",
        {"queue": (*QUEUES, "other")},
    ),
    Metric(
        "evalstore_redeliveries_total",
        "counter",
        "Messages requeued: from a process that died, by one that stops, or stranded after a broken connection.",
        "worker",
        {"queue": (*QUEUES, "other"), "reason": ("died", "stopped", "stranded")},
    ),
    Metric(
        "evalstore_outage_seconds_total",
        "counter",
        "Time that a server could not be used; the largest value among the processes of the group.",
        "worker",
        {"server": (*_SERVERS, "objects")},
        across="max",
    ),
    Metric(
        "evalstore_outage",
        "gauge",
        "1 while a process of the group waits for this server; objects: the object store.",
        "worker",
        {"server": (*_SERVERS, "objects")},
        across="max",
    ),
    Metric("evalstore_breaker_open", "gauge", "Processes whose breaker is open, because most messages were bad.", "worker"),
    Metric("evalstore_confirmations_relayed_total", "counter", "Confirmations published.", "worker"),
    Metric(
        "evalstore_job_runs_total",
        "counter",
        "Runs of periodic jobs, by outcome.",
        "worker",
        {"job_name": (), "outcome": ("ok", "failed")},
    ),
    Metric(
        "evalstore_archived_contents_total",
        "counter",
        "Contents due for the archive, by outcome of the move.",
        "worker",
        {"outcome": ("archived", "failed")},
    ),
    Metric("evalstore_archived_bytes_total", "counter", "Bytes of content that moved to the archive.", "worker"),
    # The HTTP service.
    Metric(
        "evalstore_http_requests_total",
        "counter",
        "Requests by response status; 0: no response.",
        "api",
        {"method": (), "route": (), "status": ()},
    ),
    Metric(
        "evalstore_http_request_duration_seconds",
        "histogram",
        "Time from a request's headers to the end of its response.",
        "api",
        {"method": (), "route": ()},
        _HTTP,
    ),
    Metric(
        "evalstore_http_record_reads_total",
        "counter",
        "Records read, by source: a cache or the database.",
        "api",
        {"source": ("memory", "redis", "database")},
    ),
    Metric(
        "evalstore_http_events_total",
        "counter",
        "Events received by HTTP, by outcome.",
        "api",
        {"outcome": ("applied", "duplicate", "reused", "erased", "invalid", "accepted")},
    ),
    Metric(
        "evalstore_http_rate_checks_total",
        "counter",
        "Requests of keys with a rate, by outcome; unchecked: answered without a count, because Redis was away.",
        "api",
        {"outcome": ("allowed", "refused", "unchecked")},
    ),
    Metric(
        "evalstore_http_followers",
        "gauge",
        "Clients that wait for a change of an evaluation, or stream changes.",
        "api",
        {"kind": ("wait", "stream")},
    ),
    Metric("evalstore_http_threads_busy", "gauge", "Busy threads of the service.", "api"),
    # Each group of processes: a worker's, a scheduler's, a service's.
    # The bridge.
    Metric(
        "evalstore_bridge_messages_total",
        "counter",
        "Messages that the bridge heard and put into the queue; bad: no event can be made of it, and it becomes a dead letter.",
        "bridge",
        {"outcome": ("sent", "bad")},
    ),
    Metric("evalstore_bridge_connected", "gauge", "Copies of the bridge that are subscribed.", "bridge"),
    Metric("evalstore_bridge_buffered_messages", "gauge", "Messages that were heard, and are not in the queue yet.", "bridge"),
    Metric(
        "evalstore_bridge_gaps_total",
        "counter",
        "Times that a subscription was lost and made again. Only another copy heard what was published meanwhile.",
        "bridge",
    ),
    Metric("evalstore_bridge_disconnected_seconds_total", "counter", "Length of these gaps.", "bridge"),
    Metric("evalstore_build_info", "gauge", "Always 1; the labels name the release.", "any", {"version": (), "python": ()}),
    Metric(
        "evalstore_processes",
        "gauge",
        "Processes of the group; stuck: a loop missed its deadline.",
        "any",
        {"role": ("worker", "scheduler", "api", "sinks", "bridge"), "state": ("live", "stuck")},
    ),
    Metric("evalstore_process_resident_memory_bytes", "gauge", "Resident memory of the group's processes.", "any"),
    Metric(
        "evalstore_database_connections",
        "gauge",
        "Connections to PostgreSQL in the group's pools.",
        "any",
        {"state": ("used", "idle")},
    ),
    Metric("evalstore_spool_bytes", "gauge", "Size of this host's spool, if one is set.", "any"),
    Metric("evalstore_spool_oldest_age_seconds", "gauge", "Age of the oldest event in the spool.", "any"),
    Metric(
        "evalstore_disk_free_bytes",
        "gauge",
        "Free space on the disk of a folder, as this host sees it. Absent for S3 and for a folder that cannot be read.",
        "any",
        {"folder": ("objects", "archive", "spool")},
    ),
    Metric(
        "evalstore_disk_bytes", "gauge", "Size of the disk of a folder.", "any", {"folder": ("objects", "archive", "spool")}
    ),
    # Read from the servers. All groups report the same values: take the maximum, not the sum.
    Metric(
        "evalstore_server_up",
        "gauge",
        "1 if a server answers. Metrics read from a server are absent while it does not.",
        "servers",
        {"server": _SERVERS},
    ),
    Metric("evalstore_schema_ready", "gauge", "1 if the database schema fits this release.", "servers"),
    Metric(
        "evalstore_queue_messages",
        "gauge",
        "Messages by queue and state; dead: dead letters in Redis and in PostgreSQL.",
        "servers",
        {"queue": QUEUES, "state": ("ready", "inflight", "delayed", "dead")},
    ),
    Metric(
        "evalstore_queue_oldest_age_seconds",
        "gauge",
        "Age of the oldest message that is ready or in flight; 0 without one.",
        "servers",
        {"queue": QUEUES},
    ),
    Metric("evalstore_consumers", "gauge", "Processes that consume a queue.", "servers", {"queue": QUEUES}),
    Metric(
        "evalstore_dead_letters",
        "gauge",
        "Dead letters by error class and state.",
        "servers",
        {"reason": REASONS, "state": ("dead", "redriving")},
    ),
    Metric(
        "evalstore_dead_letters_oldest_age_seconds",
        "gauge",
        "Age of the oldest dead letter since its first failure; 0 without one.",
        "servers",
        {"reason": REASONS},
    ),
    Metric("evalstore_redrives_running", "gauge", "Unfinished redrives.", "servers"),
    Metric(
        "evalstore_redriven_letters_total",
        "counter",
        "Dead letters of all redrives, by outcome.",
        "servers",
        {"outcome": ("stored", "died", "returned")},
    ),
    Metric("evalstore_confirmations_pending", "gauge", "Confirmations committed and not yet published.", "servers"),
    Metric(
        "evalstore_confirmations_oldest_age_seconds",
        "gauge",
        "Age of the oldest pending confirmation; 0 without one.",
        "servers",
    ),
    Metric(
        "evalstore_outbox_age_seconds",
        "gauge",
        "How long ago the oldest row of the outbox was stored that a running sink needs; 0 if there is none.",
        "servers",
    ),
    Metric("evalstore_outbox_age_limit_seconds", "gauge", "Up to which age the outbox keeps such rows.", "servers"),
    Metric("evalstore_sink_running", "gauge", "1, or 0 where an operator paused the sink.", "servers", {"sink": ()}),
    Metric(
        "evalstore_sink_lag_seconds",
        "gauge",
        "How long ago the oldest event was stored that the sink has not confirmed; 0 if there is none.",
        "servers",
        {"sink": ()},
    ),
    Metric(
        "evalstore_sink_lag_events",
        "gauge",
        "Changes of evaluations that the sink has not confirmed; of more than 100,000 commits the first.",
        "servers",
        {"sink": ()},
    ),
    Metric(
        "evalstore_sink_gap_seconds",
        "gauge",
        "For how long a transaction in progress has held up the sink; 0 if none does.",
        "servers",
        {"sink": ()},
    ),
    Metric(
        "evalstore_sink_failing_seconds",
        "gauge",
        "For how long the sink has taken nothing; 0 if it does.",
        "servers",
        {"sink": ()},
    ),
    Metric(
        "evalstore_sink_events_total",
        "counter",
        "Events of the sink, by outcome.",
        "servers",
        {"sink": (), "outcome": ("delivered", "dead")},
    ),
    Metric(
        "evalstore_webhooks",
        "gauge",
        "Subscriptions: healthy, failing since their last attempt, or disabled.",
        "servers",
        {"state": ("healthy", "failing", "disabled")},
    ),
    Metric("evalstore_webhook_deliveries_pending", "gauge", "Deliveries that are not sent yet, up to 100,000.", "servers"),
    Metric(
        "evalstore_webhook_oldest_due_age_seconds",
        "gauge",
        "For how long the oldest delivery has waited for a subscription that is healthy; 0 if there is none.",
        "servers",
    ),
    Metric(
        "evalstore_webhook_attempts_total",
        "counter",
        "Attempts to deliver to the subscriptions that there are, by outcome.",
        "servers",
        {"outcome": ("delivered", "failed")},
    ),
    Metric(
        "evalstore_anomalies_open",
        "gauge",
        "Findings of the anomaly detector that nobody has acknowledged, counted up to 100,000.",
        "servers",
        {"metric": ANOMALY_METRICS, "kind": ANOMALY_KINDS},
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
        "Contents stored outside their event's row, by location.",
        "servers",
        {"location": ("database", "objects", "archive")},
    ),
    Metric(
        "evalstore_content_bytes",
        "gauge",
        "Uncompressed bytes of these contents.",
        "servers",
        {"location": ("database", "objects", "archive")},
    ),
    Metric("evalstore_archive_due_contents", "gauge", "Contents due for the archive.", "servers"),
    Metric("evalstore_archive_due_bytes", "gauge", "Bytes of contents due for the archive.", "servers"),
    Metric(
        "evalstore_archive_oldest_due_age_seconds",
        "gauge",
        "Age of the oldest content due for the archive; 0 without one.",
        "servers",
    ),
    Metric("evalstore_archive_failing_contents", "gauge", "Contents whose last move to the archive failed.", "servers"),
    Metric(
        "evalstore_job_last_success_timestamp_seconds",
        "gauge",
        "Time of the last successful run of a periodic job; 0: never.",
        "servers",
        {"job_name": ()},
    ),
    Metric(
        "evalstore_job_next_run_timestamp_seconds",
        "gauge",
        "Time of the next run of a periodic job.",
        "servers",
        {"job_name": ()},
    ),
    Metric(
        "evalstore_job_last_duration_seconds",
        "gauge",
        "Duration of the last run of a periodic job.",
        "servers",
        {"job_name": ()},
    ),
    Metric("evalstore_job_failing", "gauge", "1 if the last run of a periodic job failed.", "servers", {"job_name": ()}),
    Metric("evalstore_redis_memory_bytes", "gauge", "Memory used by Redis.", "servers"),
    Metric("evalstore_redis_memory_limit_bytes", "gauge", "Memory limit of Redis (`maxmemory`); 0 without a limit.", "servers"),
    Metric("evalstore_postgresql_connections", "gauge", "Connections to PostgreSQL, of all clients.", "servers"),
    Metric("evalstore_postgresql_connections_limit", "gauge", "Connection limit of PostgreSQL (`max_connections`).", "servers"),
    Metric("evalstore_postgresql_bytes", "gauge", "Size of the database on disk.", "servers"),
)

BY_NAME: Final = {metric.name: metric for metric in METRICS}
