"""Define the tables of what follows the outbox: sinks, runs and statistics, webhooks, and the anomaly detector."""

from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    Identity,
    Index,
    Integer,
    LargeBinary,
    Numeric,
    SmallInteger,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from evalstore.storage.table_types import EVAL_ID, METADATA, NOW, TIME
from models.webhooks import STATUSES

# The position of each sink in the outbox, its lease and its state. evalstore/storage/sink_cursors.py
sinks = Table(
    "sinks",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("type", Text, nullable=False),
    Column("state", Text, CheckConstraint("state IN ('running', 'paused')"), nullable=False, server_default=text("'running'")),
    # Every row up to `position` is done, and so many events of the row after it; when the row at `position` was stored.
    Column("position", BigInteger, nullable=False),
    Column("position_offset", Integer, nullable=False, server_default=text("0")),
    Column("recorded_at", TIME, nullable=False),
    Column("timeline", BigInteger, nullable=False),
    # The number of times that the cursor was set to another place.
    Column("generation", BigInteger, nullable=False, server_default=text("0")),
    # While the log is replayed: until when, and the last event that was passed on.
    Column("replay_until", TIME),
    Column("replay_at", TIME),
    Column("replay_eval_id", EVAL_ID),
    Column("replay_occurred_at", TIME),
    Column("replay_event_id", Uuid),
    Column("lease_owner", Text),
    Column("lease_token", BigInteger, nullable=False, server_default=text("0")),
    Column("lease_until", TIME),
    Column("delivered", BigInteger, nullable=False, server_default=text("0")),
    Column("dead", BigInteger, nullable=False, server_default=text("0")),
    # Confirmations that left the outbox before the sink read them: their events are replayed from the log.
    Column("missed", BigInteger, nullable=False, server_default=text("0")),
    Column("last_error", Text),
    Column("failing_since", TIME),
    Column("gap_since", TIME),
    Column("delivered_at", TIME),
    Column("created_at", TIME, nullable=False, server_default=NOW),
    # The cursor at the end of a batch that was begun, and the object that the sink keeps for the next process.
    Column("batch_limit", JSONB),
    Column("sink_state", JSONB),
    # Events stored before this time may have been passed on twice.
    Column("replayed_until", TIME),
    postgresql_with={"fillfactor": "50"},
)


def _summary() -> list[Column[Any]]:
    """Return columns that sum up evaluations. evalstore/storage/summaries.py"""
    counts = (*STATUSES, "passed", "scores")
    return [
        *(Column(name, BigInteger, nullable=False, server_default=text("0")) for name in counts),
        Column("score_sum", Numeric, nullable=False, server_default=text("0")),
        *(Column(name, LargeBinary, nullable=False, server_default=text("'\\x80'")) for name in ("durations", "memory")),
    ]


# What each evaluation adds to `statistics` and `runs` now: a change takes exactly this away again.
counted_evaluations = Table(
    "counted_evaluations",
    METADATA,
    Column("eval_id", EVAL_ID, primary_key=True),
    *(Column(name, Text) for name in ("run_id", "submitter", "language", "executor_id")),
    Column("status", Text, nullable=False),
    Column("hour", TIME),
    Column("passed", Boolean, nullable=False),
    Column("score", Double),
    Column("duration_ms", Double),
    Column("memory_bytes", BigInteger),
)

# Finished evaluations by hour of `finished_at` and by one dimension: "", status, language, submitter, executor or run.
# `value_key` is a hash of the value, which may be too long for an index.
statistics = Table(
    "statistics",
    METADATA,
    Column("dimension", Text, primary_key=True),
    Column("value_key", LargeBinary, primary_key=True),
    Column("hour", TIME, primary_key=True),
    Column("value", Text),
    *_summary(),
    Index("statistics_by_hour", "dimension", "hour"),
    postgresql_with={"fillfactor": "70"},
)

runs = Table(
    "runs",
    METADATA,
    Column("run_id", EVAL_ID, primary_key=True),
    # What a client declared.
    Column("expected", BigInteger),
    Column("closed", Boolean, nullable=False, server_default=text("false")),
    # The submitter of all its evaluations, unless `is_mixed`.
    Column("submitter", Text),
    Column("is_mixed", Boolean, nullable=False, server_default=text("false")),
    *_summary(),
    Column("first_at", TIME, nullable=False, server_default=NOW),
    Column("last_at", TIME, nullable=False, server_default=NOW),
    # When its end was announced; NULL while it is open.
    Column("finished_at", TIME),
    # 1: declared, 2: counted since it was checked for its end.
    Column("changes", SmallInteger, nullable=False, server_default=text("0")),
    Index("runs_by_time", "first_at", "run_id"),
    Index("runs_to_check", "run_id", postgresql_where=text("changes > 0")),
    postgresql_with={"fillfactor": "70"},
)

# Who is sent confirmations over HTTP. `secret` signs them, so it is kept as it is. evalstore/storage/webhooks.py
webhooks = Table(
    "webhooks",
    METADATA,
    Column("id", Uuid, primary_key=True),
    Column("url", Text, nullable=False),
    Column("event_types", ARRAY(Text), nullable=False),
    Column("statuses", ARRAY(Text), nullable=False),
    Column("run_id", Text),
    Column("submitter", Text),
    Column("secret", Text, nullable=False),
    Column("previous_secret", Text),
    Column("previous_valid_until", TIME),
    Column("state", Text, CheckConstraint("state IN ('active', 'disabled')"), nullable=False, server_default=text("'active'")),
    Column("disabled_at", TIME),
    # Since the first failure after the last success: how long, how many in a row, and when the next try is due.
    Column("failing_since", TIME),
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("next_at", TIME, nullable=False),
    Column("last_error", Text),
    Column("delivered", BigInteger, nullable=False, server_default=text("0")),
    Column("failed", BigInteger, nullable=False, server_default=text("0")),
    Column("delivered_at", TIME),
    Column("created_by", Text, nullable=False),
    Column("created_at", TIME, nullable=False, server_default=NOW),
    postgresql_with={"fillfactor": "50"},
)

# The pending and the recent deliveries of each subscription. `eval_id` is empty for a test.
webhook_deliveries = Table(
    "webhook_deliveries",
    METADATA,
    Column("eval_id", EVAL_ID, primary_key=True),
    Column("id", Uuid, primary_key=True),
    Column("webhook_id", Uuid, nullable=False),
    Column("seq", BigInteger, Identity(always=True), nullable=False),
    Column("type", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column(
        "state",
        Text,
        CheckConstraint("state IN ('pending', 'delivered', 'failed')"),
        nullable=False,
        server_default=text("'pending'"),
    ),
    # The first pending one of its subscription and evaluation: the others wait for it.
    Column("is_next", Boolean, nullable=False, server_default=text("false")),
    # While one is being sent, this is when its process is taken for gone.
    Column("next_at", TIME, nullable=False),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("first_attempt_at", TIME),
    Column("status_code", Integer),
    Column("error", Text),
    Column("created_at", TIME, nullable=False),
    Column("finished_at", TIME),
    Index("webhook_deliveries_ready", "webhook_id", "next_at", "seq", postgresql_where=text("state = 'pending' AND is_next")),
    Index("webhook_deliveries_in_order", "webhook_id", "eval_id", "seq", postgresql_where=text("state = 'pending'")),
    Index("webhook_deliveries_by_webhook", "webhook_id", "seq"),
    Index("webhook_deliveries_by_age", "created_at"),
    postgresql_with={"fillfactor": "70"},
)

# Findings of the anomaly detector. evalstore/storage/anomalies.py
anomalies = Table(
    "anomalies",
    METADATA,
    Column("id", Uuid, primary_key=True),
    Column("sink", Text, nullable=False),
    Column("kind", Text, CheckConstraint("kind IN ('drift', 'outlier')"), nullable=False),
    Column("dimension", Text, CheckConstraint("dimension IN ('language', 'submitter', 'executor')"), nullable=False),
    Column("value", Text, nullable=False),
    # Stands for dimension and value in an index: a value may be longer than an entry.
    Column("group_key", Text, nullable=False),
    Column("metric", Text, nullable=False),
    Column("expected", Double, nullable=False),
    Column("observed", Double, nullable=False),
    Column("occurrences", Integer, nullable=False, server_default=text("1")),
    # The first and the last evaluations that show it.
    Column("eval_ids", ARRAY(EVAL_ID), nullable=False),
    Column("detected_at", TIME, nullable=False, server_default=NOW),
    Column("first_at", TIME, nullable=False),
    Column("last_at", TIME, nullable=False),
    Column("state", Text, CheckConstraint("state IN ('open', 'acknowledged')"), nullable=False, server_default=text("'open'")),
    Column("acknowledged_by", Text),
    Column("acknowledged_at", TIME),
    Column("reason", Text),
    Index("anomalies_by_time", "detected_at", "id"),
    Index("anomalies_open", "detected_at", "id", postgresql_where=text("state = 'open'")),
    Index("anomalies_by_group", "group_key", "metric", "kind", "last_at"),
    Index("anomalies_by_evaluation", "eval_ids", postgresql_using="gin"),
)

# How far each detector has come, and the process that works on it. evalstore/storage/detector_state.py
anomaly_detectors = Table(
    "anomaly_detectors",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("owner", Uuid, nullable=False),
    Column("library", Text, nullable=False),
    Column("cursor", JSONB),
    Column("latest", TIME),
    # In a replay of the log, events up to here are skipped, or learned without a finding.
    Column("skip_until", TIME),
    Column("silent_until", TIME),
    postgresql_with={"fillfactor": "50"},
)

# What a detector has learned of each group, with the SHA-256 of it. `key` is a hash of the group's name.
anomaly_groups = Table(
    "anomaly_groups",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("dimension", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("used", BigInteger, nullable=False),
    Column("state", LargeBinary, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    postgresql_with={"fillfactor": "50"},
)
