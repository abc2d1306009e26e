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
    Entry("misspelt_setting", "warning", "a variable of the environment does nothing: %s", ("problem",)),
    # Outages, and their end.
    Entry("outage", "warning", "%s, holding %d events until it is over: %s", ("kind", "events", "error")),
    Entry(
        "time_limit", "warning", "a transaction of %d events exceeded a time limit, trying it again: %s", ("events", "error")
    ),
    Entry("redis_refuses", "warning", "Redis refuses queue %s, trying again until it does not: %s", ("queue", "error")),
    Entry("heartbeat_failed", "debug", "no heartbeat: %s", ("error",)),
    Entry("redis_doubtful", "warning", "Redis is not set up to keep what it confirms: %s", ("doubt",)),
    Entry("postgresql_doubtful", "warning", "PostgreSQL is not set up to keep what it commits: %s", ("doubt",)),
    Entry("starting_without_database", "warning", "starting without PostgreSQL: %s", ("error",)),
    Entry("schema_mismatch", "critical", "this worker stores nothing until that is mended: %s", ("error",)),
    Entry("background_waits", "warning", "%s wait until this is over: %r", ("what", "error")),
    Entry(
        "objects_outage", "warning", "events that need an object wait until this is over, all others are stored: %s", ("error",)
    ),
    Entry("object_refused", "error", "the object store refuses an object, its events wait: %s", ("error",)),
    Entry("objects_back", "warning", "the object store is back"),
    Entry(
        "evaluations_locked",
        "warning",
        "%d evaluations are locked by somebody else; their events wait, others do not: %.200s",
        ("count", "eval_ids"),
    ),
    # Dead letters and redrives.
    Entry(
        "dead_letter",
        "warning",
        "dead letter: %s, eval_id %.200s, event_id %.40s, type %.40s",
        ("error_class", "eval_id", "event_id", "type"),
    ),
    Entry("more_dead_letters", "warning", "and %d more dead letters of the same batch", ("count",)),
    Entry("no_messages_for_us", "error", "%d messages of queue %s are no messages for us: dead letters", ("count", "queue")),
    Entry(
        "breaker_opened",
        "critical",
        "the breaker is open: at least %.0f %% of %d messages within %.0f s were bad. Nothing is consumed but one message "
        "every %.0f s, until one is stored. The last one's cause: %.500s",
        ("percent", "messages", "window_s", "probe_s", "cause"),
    ),
    Entry("breaker_closed", "warning", "the breaker is closed: a message was stored"),
    Entry(
        "redrive_outcome_left", "warning", "the outcome of %d redriven messages is left to the sweep: %s", ("count", "error")
    ),
    Entry("redriven_lost", "error", "%d redriven messages were lost by Redis: they are dead letters again", ("count",)),
    # Processes.
    Entry("returned", "info", "%d events go back to the queue: %s", ("events", "why")),
    Entry("process_dead", "warning", "process %s is dead (it was %s); took back %d messages", ("process", "state", "messages")),
    Entry("stranded", "warning", "gave %d stranded messages back to queue %s", ("messages", "queue")),
    Entry("heartbeat_ended", "critical", "the heartbeat ended: ending this process"),
    Entry("thread_died", "critical", "thread %s died or stands still: ending this process", ("thread",)),
    Entry("stopped_late", "warning", "still at work %g s after the order to stop: what is held goes back", ("seconds",)),
    Entry("left_to_others", "warning", "Redis is away: others will take over what this process held"),
    Entry("no_goodbye", "warning", "could not say goodbye to Redis, others will take over: %s", ("error",)),
    # Periodic jobs.
    Entry("job_not_scheduled", "warning", "job %s is not scheduled this time: %s", ("job", "error")),
    Entry("job_not_told", "warning", "could not tell of job %s: %s", ("job", "error")),
    Entry(
        "archive_failed",
        "warning",
        "%d contents could not be moved to the archive: evalstore archive status says why",
        ("count",),
    ),
    Entry("sweep_postponed", "warning", "the sweep of the object store is left to another time: %s", ("error",)),
    # Metrics and traces.
    Entry("metrics_not_served", "warning", "no metrics at %s: %s", ("address", "error")),
    Entry("metrics_ended", "warning", "the endpoint for metrics ended with status %d, and begins again", ("status",)),
    Entry("metrics_unshared", "warning", "metrics are of this process alone: %s", ("error",)),
    Entry("not_shown", "warning", "what this process counts is not shown, nor that it lives: %s", ("error",)),
    Entry(
        "traces_unsupported",
        "warning",
        "no traces: expected OTEL_TRACES_EXPORTER=otlp and OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf",
    ),
    Entry(
        "traces_not_installed",
        "warning",
        "no traces: the environment asks for them, and evalstore[otel] is not installed: %s",
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
        "heads_unbounded",
        "warning",
        "any client may take as long as it likes for the head of a request: use --http evalstore.api.protocol:Protocol",
    ),
    Entry(
        "request",
        "info",
        "%s %s: %d, by key %s, request %s, %.0f ms",
        ("method", "path", "status", "key_id", "request_id", "milliseconds"),
    ),
    Entry("answer_broken_off", "warning", "request %s: the answer broke off: %s: %s", ("request_id", "kind", "error")),
    Entry("content_not_whole", "error", "what is stored is not whole: %s: %s", ("kind", "error")),
    Entry("request_outage", "warning", "%s: %s", ("kind", "error")),
    Entry("unexpected_error", "error", "unexpected error"),
    Entry("records_without_objects", "warning", "records are shown without what is in the object store: %s", ("error",)),
    Entry("log_left_alone", "warning", "what is to be stored later is not looked for in the event log: %s", ("error",)),
    Entry("redis_left_alone", "warning", "what is stored at once is not looked for in what was sent before: %s", ("error",)),
    Entry("record_without_content", "warning", "the record of %s is shown without some content: %s", ("eval_id", "error")),
    Entry("cache_left_alone", "warning", "the cache is left alone for %g s: %s", ("seconds", "error")),
    Entry("keys_file_unreadable", "warning", "the file of keys cannot be read, its keys stay as they were: %s", ("error",)),
    Entry("keys_table_unreadable", "warning", "keys are as they were last known: %s", ("error",)),
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
