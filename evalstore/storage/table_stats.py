"""Read the numbers of the database for metrics and `evalstore status`. Change nothing."""

from datetime import UTC, datetime
from typing import Any, Final

import psycopg
from sqlalchemy import Connection

from evalstore.storage import anomalies, archive, database, sink_cursors, webhooks
from evalstore.storage.archive import Archive
from models.anomalies import ANOMALY_KINDS, ANOMALY_METRICS

Numbers = dict[tuple[str, ...], float]

# An ordinary role cannot see `backend_type` of other roles' sessions.
_SERVER: Final = """
SELECT (SELECT count(*) FROM pg_stat_activity WHERE coalesce(backend_type, 'client backend') = 'client backend'
        AND datid IS NOT NULL AND usesysid IS NOT NULL),
    current_setting('max_connections')::int
"""
_CONFIRMATIONS: Final = """
SELECT coalesce(sum(count), 0), coalesce(extract(epoch FROM now() - min(recorded_at)), 0)
FROM confirmations WHERE relayed_at IS NULL
"""
_REDRIVES: Final = """
SELECT count(*) FILTER (WHERE finished_at IS NULL), coalesce(sum(stored), 0), coalesce(sum(died), 0), coalesce(sum(returned), 0)
FROM redrives
"""


def server(conn: Connection) -> Numbers:
    """Return the numbers that are cheap to read: connections, the outbox, redrives. Raises DatabaseOutage."""
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        used, limit = _row(cursor, _SERVER)
        pending, age_s = _row(cursor, _CONFIRMATIONS)
        running, stored, died, returned = _row(cursor, _REDRIVES)
    return {
        ("evalstore_postgresql_connections",): used,
        ("evalstore_postgresql_connections_limit",): limit,
        ("evalstore_confirmations_pending",): pending,
        ("evalstore_confirmations_oldest_age_seconds",): age_s,
        ("evalstore_redrives_running",): running,
        ("evalstore_redriven_letters_total", "stored"): stored,
        ("evalstore_redriven_letters_total", "died"): died,
        ("evalstore_redriven_letters_total", "returned"): returned,
    }


_OUTBOX: Final = """
SELECT coalesce(extract(epoch FROM now() - min(c.recorded_at)), 0) FROM (
    SELECT recorded_at FROM confirmations
    WHERE id > (SELECT min(position) FROM sinks WHERE state = 'running') ORDER BY id LIMIT 1
) c
"""


def sinks(conn: Connection, outbox_max_age_s: float) -> Numbers:
    """Return the progress of each sink. Raises DatabaseOutage (retry)."""
    found: Numbers = {}
    for sink in sink_cursors.statuses(conn):
        failing_s = (datetime.now(UTC) - sink.failing_since).total_seconds() if sink.failing_since else 0
        found["evalstore_sink_running", sink.name] = sink.state != "paused"
        found["evalstore_sink_lag_seconds", sink.name] = sink.lag_s
        found["evalstore_sink_lag_events", sink.name] = sink.lag_events
        found["evalstore_sink_gap_seconds", sink.name] = sink.gap_s
        found["evalstore_sink_failing_seconds", sink.name] = max(0.0, failing_s)
        found["evalstore_sink_events_total", sink.name, "delivered"] = sink.delivered
        found["evalstore_sink_events_total", sink.name, "dead"] = sink.dead
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        (found[("evalstore_outbox_age_seconds",)],) = _row(cursor, _OUTBOX)
    found[("evalstore_outbox_age_limit_seconds",)] = outbox_max_age_s
    return found


def webhook_numbers(conn: Connection) -> Numbers:
    """Subscriptions of webhooks, and their deliveries. Raises DatabaseOutage."""
    found = webhooks.statistics(conn)
    return {
        **{("evalstore_webhooks", state): getattr(found, state) for state in ("healthy", "failing", "disabled")},
        ("evalstore_webhook_deliveries_pending",): found.pending,
        ("evalstore_webhook_oldest_due_age_seconds",): found.oldest_due_s,
        ("evalstore_webhook_attempts_total", "delivered"): found.delivered,
        ("evalstore_webhook_attempts_total", "failed"): found.failed,
    }


def anomaly_numbers(conn: Connection) -> Numbers:
    """Open findings. Raises DatabaseOutage."""
    found = anomalies.count_open(conn)
    return {
        ("evalstore_anomalies_open", metric, kind): found.get((metric, kind), 0)
        for metric in ANOMALY_METRICS
        for kind in ANOMALY_KINDS
    }


def _row(cursor: psycopg.Cursor[Any], query: str, values: dict[str, Any] | None = None) -> tuple[float, ...]:
    (row,) = cursor.execute(query.encode(), values).fetchall()
    return tuple(map(float, row))


_LETTERS: Final = """
SELECT queue, error_class, state, count(*), extract(epoch FROM now() - min(first_at))
FROM dead_letters WHERE state <> 'stored' GROUP BY queue, error_class, state
"""


def letters(conn: Connection) -> list[tuple[str, str, str, int, float]]:
    """Count dead letters by queue, error class and state, with the age of the oldest in seconds. Raises DatabaseOutage."""
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        return [(*row[:4], float(row[4])) for row in cursor.execute(_LETTERS)]


_OPEN: Final = "SELECT status, count(*) FROM evaluations WHERE status IN ('queued', 'running') GROUP BY status"
_CONTENTS: Final = "SELECT coalesce(store, 'database'), count(*), sum(size) FROM contents GROUP BY store"
_FAILING: Final = "SELECT count(*) FROM contents WHERE failure IS NOT NULL"
_BYTES: Final = "SELECT pg_database_size(current_database())"
_DUE: Final = "SELECT count(*), coalesce(sum(c.size), 0), coalesce(extract(epoch FROM now() - min(c.recorded_at)), 0) {}"


def contents(conn: Connection, moving: Archive | None) -> Numbers:
    """Return the numbers whose cost grows with the stored data. Without an archive nothing is due. Raises DatabaseOutage."""
    numbers: Numbers = {}
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        for status, count in cursor.execute(_OPEN):
            numbers["evalstore_evaluations_open", status] = count
        for place, count, size in cursor.execute(_CONTENTS):
            numbers["evalstore_contents", place], numbers["evalstore_content_bytes", place] = count, float(size)
        (numbers[("evalstore_archive_failing_contents",)],) = _row(cursor, _FAILING)
        (numbers[("evalstore_postgresql_bytes",)],) = _row(cursor, _BYTES)
        values = {**archive.values(moving, datetime.now(UTC)), "now": datetime.max.replace(tzinfo=UTC)} if moving else {}
        due = [_row(cursor, _DUE.format(condition), values) for condition in (archive.conditions(moving) if moving else [])]
    numbers["evalstore_archive_due_contents",] = sum(count for count, _, _ in due)
    numbers["evalstore_archive_due_bytes",] = sum(size for _, size, _ in due)
    numbers["evalstore_archive_oldest_due_age_seconds",] = max((age_s for _, _, age_s in due), default=0.0)
    return numbers
