"""The log events: one closed list, from which docs/reference/logs.md is made.

Code logs an event by its name: `log.warning("outage", kind=..., events=..., error=...)`. No line holds content or a secret.
Lines of libraries have the event `library`.
"""

import logging
from typing import Any, Final, Literal, NamedTuple

Level = Literal["debug", "info", "warning", "error", "critical"]


class Entry(NamedTuple):
    """`text` is the line for people; its placeholders take `fields`, in their order."""

    name: str
    level: Level
    text: str
    fields: tuple[str, ...] = ()


LOGS: Final = (
    # At the start.
    Entry("unknown_setting", "warning", "ignored environment variable: %s", ("problem",)),
    # Outages, and their end.
    Entry("outage", "warning", "%s, holding %d events until it is over: %s", ("kind", "events", "error")),
    Entry("time_limit", "warning", "a transaction of %d events exceeded a time limit, retrying: %s", ("events", "error")),
    Entry("redis_refuses", "warning", "Redis refuses queue %s, retrying: %s", ("queue", "error")),
    Entry("heartbeat_failed", "debug", "heartbeat failed: %s", ("error",)),
    Entry("redis_config_warning", "warning", "Redis is not set up to keep what it confirms: %s", ("doubt",)),
    Entry("postgresql_config_warning", "warning", "PostgreSQL is not set up to keep what it commits: %s", ("doubt",)),
    Entry("starting_without_database", "warning", "starting without PostgreSQL: %s", ("error",)),
    Entry("schema_mismatch", "critical", "this worker stores nothing until the schema matches: %s", ("error",)),
    Entry("background_task_failed", "warning", "background task %s failed, retrying: %r", ("what", "error")),
    Entry(
        "objects_outage",
        "warning",
        "object store outage; events that need an object wait, all others are stored: %s",
        ("error",),
    ),
    Entry("object_refused", "error", "the object store refuses an object; events that need it wait: %s", ("error",)),
    Entry("objects_outage_over", "warning", "the object store answers again"),
    Entry(
        "evaluations_locked",
        "warning",
        "another transaction locks %d evaluations; only their events wait: %.200s",
        ("count", "eval_ids"),
    ),
    # Recordings, in senders.
    Entry(
        "recording_delayed",
        "warning",
        "the start of evaluation %.200s is not sent yet; it goes with the ending: %s",
        ("eval_id", "error"),
    ),
    Entry(
        "recording_unsent",
        "error",
        "%d events of evaluation %.200s are not sent, set EVALSTORE_SPOOL_DIR to keep them on disk: %s",
        ("events", "eval_id", "error"),
    ),
    Entry("recording_invalid", "error", "the recording of evaluation %.200s is invalid: %s", ("eval_id", "error")),
    # Validators and enrichers.
    Entry(
        "hook_off",
        "error",
        "%s took longer than %.1f s for a batch: switched off for at least %.0f s, and events are stored without it",
        ("hook", "seconds", "retry_s"),
    ),
    Entry("hook_back", "warning", "%s is fast enough again, and is switched on", ("hook",)),
    Entry(
        "hook_failed",
        "warning",
        "%s failed for %d events, which are stored without it; the last error: %r",
        ("hook", "events", "error"),
    ),
    # The bridge.
    Entry("bridge_listening", "info", "listens to %s; messages that were published before are lost", ("patterns",)),
    Entry("bridge_away", "warning", "the source's Redis cannot be used, trying again: %s", ("error",)),
    Entry(
        "bridge_gap",
        "error",
        "listens to %s again after %.1f s; messages published meanwhile are lost, unless another copy heard them",
        ("patterns", "seconds"),
    ),
    Entry("bridge_waits", "warning", "the queue takes nothing, holding %d messages until it does: %s", ("messages", "error")),
    Entry(
        "bridge_bad_message",
        "warning",
        "a message of channel %.200s is no event, and becomes a dead letter: %s",
        ("channel", "error"),
    ),
    Entry(
        "bridge_uncoordinated",
        "warning",
        "copies of the bridge cannot agree on the time of messages without one in the source's Redis: %s",
        ("error",),
    ),
    Entry("bridge_left", "error", "%d messages were heard and could not be sent before the end: they are lost", ("messages",)),
    # Sinks.
    Entry("sinks_started", "info", "works on sinks: %s", ("sinks",)),
    Entry("sink_claimed", "info", "sink %s: goes on from row %d of the outbox", ("sink", "position")),
    Entry("sink_lease_lost", "info", "%s", ("error",)),
    Entry("sink_waits", "warning", "sink %s waits until PostgreSQL is back: %s", ("sink", "error")),
    Entry("sink_away", "warning", "sink %s takes nothing, trying again until it does: %s", ("sink", "error")),
    Entry("sink_back", "info", "sink %s takes events again", ("sink",)),
    Entry(
        "sink_refused",
        "warning",
        "sink %s refused %d events, which are dead letters; the last one: %s",
        ("sink", "events", "error"),
    ),
    Entry(
        "sink_hangs",
        "error",
        "sink %s has not come back for %.0f s; its lease ends, so that another process may try",
        ("sink", "seconds"),
    ),
    Entry("sink_events_gone", "warning", "sink %s: %d events of the outbox are in the event log no longer", ("sink", "events")),
    Entry("sink_defect", "critical", "sink %s: unexpected error, trying again: %r", ("sink", "error")),
    Entry(
        "anomalies_detected", "warning", "sink %s found %d anomalies; `evalstore anomalies ls` says more", ("sink", "findings")
    ),
    Entry(
        "anomaly_state_rebuilt",
        "warning",
        "sink %s learns again from the event log what it knew: its state cannot be read: %s",
        ("sink", "error"),
    ),
    Entry(
        "webhook_disabled",
        "error",
        "webhook %s is disabled: its receiver is gone, or took nothing for three days; `evalstore webhooks ls` says more",
        ("webhook",),
    ),
    # Dead letters and redrives.
    Entry(
        "dead_letter",
        "warning",
        "dead letter: %s, eval_id %.200s, event_id %.40s, type %.40s",
        ("error_class", "eval_id", "event_id", "type"),
    ),
    Entry("more_dead_letters", "warning", "and %d more dead letters of the same batch", ("count",)),
    Entry(
        "invalid_messages", "error", "%d messages of queue %s are not valid Dramatiq messages: dead letters", ("count", "queue")
    ),
    Entry(
        "breaker_opened",
        "critical",
        "the breaker is open: at least %.0f %% of %d messages within %.0f s were bad. Nothing is consumed but one message "
        "every %.0f s, until one is stored. The last one's cause: %.500s",
        ("percent", "messages", "window_s", "probe_s", "cause"),
    ),
    Entry("breaker_closed", "warning", "the breaker is closed: a message was stored"),
    Entry(
        "redrive_outcome_unsettled",
        "warning",
        "could not record the outcome of %d redriven messages; the sweep retries: %s",
        ("count", "error"),
    ),
    Entry("redriven_lost", "error", "Redis lost %d redriven messages; they are dead letters again", ("count",)),
    # Processes.
    Entry("batch_requeued", "info", "%d events go back to the queue: %s", ("events", "why")),
    Entry(
        "process_dead",
        "warning",
        "process %s stopped its heartbeat (state %s); requeued %d messages",
        ("process", "state", "messages"),
    ),
    Entry("stranded_requeued", "warning", "requeued %d stranded messages of queue %s", ("messages", "queue")),
    Entry("heartbeat_ended", "critical", "the heartbeat thread ended; this process exits"),
    Entry("thread_died", "critical", "thread %s ended or makes no progress; this process exits", ("thread",)),
    Entry("stop_timed_out", "warning", "still working %g s after the stop signal; requeueing in-flight messages", ("seconds",)),
    Entry("deregistration_skipped", "warning", "Redis cannot be reached; other processes requeue the messages of this process"),
    Entry(
        "deregistration_failed",
        "warning",
        "could not deregister from Redis; other processes requeue the messages of this process: %s",
        ("error",),
    ),
    # Periodic jobs.
    Entry("job_not_scheduled", "warning", "could not enqueue job %s; the next tick retries: %s", ("job", "error")),
    Entry("job_status_not_published", "warning", "could not record the status of job %s: %s", ("job", "error")),
    Entry(
        "archive_failed",
        "warning",
        "%d contents could not be moved to the archive; see evalstore archive status",
        ("count",),
    ),
    Entry("sweep_postponed", "warning", "the sweep of the object store is postponed: %s", ("error",)),
    # Metrics and traces.
    Entry("metrics_not_served", "warning", "cannot serve metrics at %s: %s", ("address", "error")),
    Entry("metrics_endpoint_ended", "warning", "the metrics endpoint exited with status %d; restarting it", ("status",)),
    Entry("metrics_local_only", "warning", "metrics cover this process only: %s", ("error",)),
    Entry(
        "runtime_dir_unusable",
        "warning",
        "cannot write to EVALSTORE_RUNTIME_DIR: no metrics or liveness for this process: %s",
        ("error",),
    ),
    Entry(
        "traces_unsupported",
        "warning",
        "no traces: expected OTEL_TRACES_EXPORTER=otlp and OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf",
    ),
    Entry(
        "traces_not_installed",
        "warning",
        "no traces: OTEL variables are set, but evalstore[otel] is not installed: %s",
        ("error",),
    ),
    Entry(
        "traces_not_started",
        "warning",
        "no traces: %s",
        ("error",),
    ),
    # The HTTP service.
    Entry(
        "request_head_unbounded",
        "warning",
        "no time limit for request headers: use --http evalstore.api.protocol:Protocol",
    ),
    Entry(
        "request",
        "info",
        "%s %s: %d, by key %s, request %s, %.0f ms",
        ("method", "path", "status", "key_id", "request_id", "milliseconds"),
    ),
    Entry("response_aborted", "warning", "request %s: the response was aborted: %s: %s", ("request_id", "kind", "error")),
    Entry("content_corrupt", "error", "stored content is incomplete or corrupt: %s: %s", ("kind", "error")),
    Entry("request_outage", "warning", "%s: %s", ("kind", "error")),
    Entry("unexpected_error", "error", "unexpected error"),
    Entry(
        "records_without_objects",
        "warning",
        "object store outage; records are returned without content from there: %s",
        ("error",),
    ),
    Entry(
        "event_log_skipped", "warning", "PostgreSQL outage; queued events are not compared with the event log: %s", ("error",)
    ),
    Entry("queue_skipped", "warning", "Redis outage; stored events are not compared with queued ones: %s", ("error",)),
    Entry("record_without_content", "warning", "the record of %s is returned without some content: %s", ("eval_id", "error")),
    Entry("cache_paused", "warning", "the cache is not used for %g s: %s", ("seconds", "error")),
    Entry("rates_unchecked", "warning", "rates of keys are not checked for %g s: %s", ("seconds", "error")),
    Entry("changes_unreadable", "warning", "cannot read changes; clients that follow them wait: %s", ("error",)),
    Entry("changes_lost", "warning", "changes may be gone before they were read; clients that follow them start again"),
    Entry("keys_file_unreadable", "warning", "cannot read the keys file; the keys read before stay valid: %s", ("error",)),
    Entry("keys_table_unreadable", "warning", "cannot read the keys table; the keys read before stay valid: %s", ("error",)),
)

BY_NAME: Final = {entry.name: entry for entry in LOGS}
BY_TEXT: Final = {entry.text: entry for entry in LOGS}


class EventLogger:
    """A logger of the standard library that takes the name of an event and its fields. Any thread may use it.

    Raises KeyError for an event that is not listed, or a field that is missing; tests/house/test_logs.py checks each call.
    """

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, **fields: Any) -> None:
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._log(logging.ERROR, event, fields)

    def critical(self, event: str, *, exc_info: bool = False, **fields: Any) -> None:
        self._log(logging.CRITICAL, event, fields, exc_info=exc_info)

    def _log(self, level: int, event: str, fields: dict[str, Any], *, exc_info: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            entry = BY_NAME[event]
            self._logger.log(level, entry.text, *[fields[name] for name in entry.fields], exc_info=exc_info, stacklevel=3)
