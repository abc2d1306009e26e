"""The tables, for Alembic and for queries built with SQLAlchemy. A gateway never imports this.

Every primary key begins with `eval_id` where there is one, so that the tables can be distributed by it; none is partitioned
by time. `eval_id` sorts by bytes, the same on every server, because workers take their locks in that order.
"""

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Double,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSON, JSONB

metadata = MetaData()

_EVAL_ID = Text(collation="C")
_TIME = DateTime(timezone=True)
_NOW = text("now()")

# The record of each evaluation: models.record.State, and when the row was made and last changed.
evaluations = Table(
    "evaluations",
    metadata,
    Column("eval_id", _EVAL_ID, primary_key=True),
    Column("status", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("language", Text),
    Column("submitter", Text),
    Column("executor_id", Text),
    Column("container_id", Text),
    Column("exit_code", BigInteger),
    Column("duration_ms", Double),
    Column("memory_bytes", BigInteger),
    Column("timeout_s", Double),
    Column("reason", Text),
    Column("metadata", JSONB, nullable=False),
    Column("queued_at", _TIME),
    Column("started_at", _TIME),
    Column("finished_at", _TIME),
    Column("created_at", _TIME, nullable=False, server_default=_NOW),
    Column("updated_at", _TIME, nullable=False, server_default=_NOW),
    # The events whose content is this evaluation's code, and its output and error.
    Column("code_event_id", Uuid),
    Column("result_event_id", Uuid),
    postgresql_with={"fillfactor": "85"},
)

# The event log: models.record.Fact. Rows are never changed, but for content that moves to the archive.
evaluation_events = Table(
    "evaluation_events",
    metadata,
    Column("eval_id", _EVAL_ID, primary_key=True),
    Column("event_id", Uuid, primary_key=True),
    Column("type", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("occurred_at", _TIME, nullable=False),
    Column("recorded_at", _TIME, nullable=False, server_default=_NOW),
    Column("metadata", JSONB),
    Column("language", Text),
    Column("submitter", Text),
    Column("executor_id", Text),
    Column("container_id", Text),
    Column("timeout_s", Double),
    Column("exit_code", BigInteger),
    Column("duration_ms", Double),
    Column("memory_bytes", BigInteger),
    Column("reason", Text),
    # Content up to storage.evaluations.ROW_LIMIT_BYTES; what is larger has a row in `contents` instead.
    Column("code", LargeBinary),
    Column("output", LargeBinary),
    Column("error", LargeBinary),
    # Fields this release does not know, as canonical JSON: kept, and part of what makes two bodies the same.
    Column("extra", Text),
)

# Content too large for the event's own row.
contents = Table(
    "contents",
    metadata,
    Column("eval_id", _EVAL_ID, primary_key=True),
    Column("event_id", Uuid, primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("sha256", LargeBinary, nullable=False),
    Column("data", LargeBinary),
)

# The outbox: all confirmations of one commit in one row, so that it costs next to nothing. docs/decisions/0003.
confirmations = Table(
    "confirmations",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("recorded_at", _TIME, nullable=False, server_default=_NOW),
    Column("count", Integer, nullable=False),
    Column("body", JSON, nullable=False),
    Column("relayed_at", _TIME),
    Index("confirmations_pending", "id", postgresql_where=text("relayed_at IS NULL")),
)
