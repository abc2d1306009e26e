"""Define the tables, for Alembic and for SQLAlchemy queries. A gateway never imports this module.

Every primary key of evaluation data begins with `eval_id`, so the tables can be distributed by it. No table is partitioned by
time. `eval_id` sorts by bytes, equally on every server, because workers take their locks in that order.
"""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from models.fields import CONTENTS, EVENT_COLUMNS, SCALARS

metadata = MetaData()

_EVAL_ID = Text(collation="C")
_TIME = DateTime(timezone=True)
_NOW = text("now()")
_SQLALCHEMY = {"text": Text, "int4": Integer, "int8": BigInteger, "float8": Double, "bytea": LargeBinary}


def _columns(names: Iterable[str]) -> list[Column[Any]]:
    """Return columns of the table of fields."""
    return [Column(name, _SQLALCHEMY[EVENT_COLUMNS[name]]) for name in names]


evaluations = Table(
    "evaluations",
    metadata,
    Column("eval_id", _EVAL_ID, primary_key=True),
    Column("status", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    *_columns(SCALARS),
    Column("metadata", JSONB, nullable=False),
    Column("queued_at", _TIME),
    Column("started_at", _TIME),
    Column("finished_at", _TIME),
    Column("created_at", _TIME, nullable=False, server_default=_NOW),
    Column("updated_at", _TIME, nullable=False, server_default=_NOW),
    # The events that hold the evaluation's code, and its output and error.
    Column("code_event_id", Uuid),
    Column("result_event_id", Uuid),
    # True if the merged metadata was shortened. models/merge_state.py
    Column("metadata_truncated", Boolean, nullable=False, server_default=text("false")),
    # Workers of older releases write neither column. models/merge_state.py
    Column("merge_state", LargeBinary),
    Column("merge_version", Integer),
    # The number of repairs by a replay. Each repair changes the ETag.
    Column("repairs", Integer, nullable=False, server_default=text("0")),
    # For stalled evaluations: few rows at any time. Records stored with their result never enter this index.
    Index("evaluations_open", "updated_at", postgresql_where=text("status IN ('queued', 'running')")),
    # The order of all lists. Records of one commit share their time and therefore one entry, at the end of the index. See
    # listing.py.
    Index("evaluations_by_time", "created_at"),
    postgresql_with={"fillfactor": "85"},
)

# The event log (models.record.EventRow). Rows never change, except for content that moves to the archive.
evaluation_events = Table(
    "evaluation_events",
    metadata,
    Column("eval_id", _EVAL_ID, primary_key=True),
    Column("event_id", Uuid, primary_key=True),
    Column("type", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("occurred_at", _TIME, nullable=False),
    # When the statement began that stored the event, with the evaluation locked: ascends in commit order.
    Column("recorded_at", _TIME, nullable=False, server_default=text("statement_timestamp()")),
    Column("metadata", JSONB),
    *_columns(SCALARS),
    # Content up to evalstore.storage.event_store.ROW_LIMIT_BYTES. Larger content has a row in `contents`.
    *_columns(CONTENTS),
    # Fields that this release does not know, as canonical JSON. They count when two bodies are compared.
    Column("extra", Text),
    Index(
        "evaluation_events_by_recorded_at",
        "recorded_at",
        postgresql_using="brin",
        postgresql_with={"pages_per_range": "32", "autosummarize": "on"},
    ),
)

# Content too large for the event's own row: in `data`, or, if `store` is set, in an object with that SHA-256 and `encoding`.
# "objects" is the store at EVALSTORE_OBJECT_STORE_URL; "archive" is the store at EVALSTORE_ARCHIVE_URL, if it is another store.
contents = Table(
    "contents",
    metadata,
    Column("eval_id", _EVAL_ID, primary_key=True),
    Column("event_id", Uuid, primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("sha256", LargeBinary, nullable=False),
    Column("data", LargeBinary),
    Column("store", Text, CheckConstraint("store IN ('objects', 'archive')")),
    Column("encoding", Text, CheckConstraint("encoding IN ('identity', 'zstd')")),
    Column("recorded_at", _TIME, nullable=False, server_default=_NOW),
    # Failed moves to the archive: their number, the last error, and the time of the next attempt.
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("failure", Text),
    Column("retry_at", _TIME),
    # The time of the event, which decides when content is old enough to move.
    Column("occurred_at", _TIME, nullable=False, server_default=_NOW),
    Index("contents_by_size", "store", "size"),
    Index("contents_by_time", "store", "occurred_at", postgresql_where=text("store IS NULL OR store = 'objects'")),
    Index("contents_by_object", "sha256", postgresql_where=text("store IS NOT NULL")),
    Index("contents_failed", "retry_at", postgresql_where=text("failure IS NOT NULL")),
)

# The outbox: one row for all confirmations of a commit, one line each, so its cost is small. docs/decisions/0003.
confirmations = Table(
    "confirmations",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("recorded_at", _TIME, nullable=False, server_default=_NOW),
    Column("count", Integer, nullable=False),
    Column("body", Text, nullable=False),
    # One line for each confirmation, empty if it continues no trace.
    Column("traceparents", Text),
    # When they were relayed, and the last entry of the Redis stream at that time.
    Column("relayed_at", _TIME),
    Column("stream_ms", BigInteger),
    Column("stream_seq", BigInteger),
    Index("confirmations_pending", "id", postgresql_where=text("relayed_at IS NULL")),
)

# One row: the last entry that was appended to the stream. The relaying process locks this row.
confirmation_position = Table(
    "confirmation_position",
    metadata,
    Column("id", SmallInteger, CheckConstraint("id = 1"), primary_key=True, autoincrement=False, server_default=text("1")),
    Column("stream_ms", BigInteger, nullable=False, server_default=text("0")),
    Column("stream_seq", BigInteger, nullable=False, server_default=text("0")),
)

# The position of each sink in the outbox, its lease and its state. evalstore/storage/sink_cursors.py
sinks = Table(
    "sinks",
    metadata,
    Column("name", Text, primary_key=True),
    Column("type", Text, nullable=False),
    Column("state", Text, CheckConstraint("state IN ('running', 'paused')"), nullable=False, server_default=text("'running'")),
    # Every row up to `position` is done, and so many events of the row after it; when the row at `position` was stored.
    Column("position", BigInteger, nullable=False),
    Column("position_offset", Integer, nullable=False, server_default=text("0")),
    Column("recorded_at", _TIME, nullable=False),
    Column("timeline", BigInteger, nullable=False),
    # The number of times that the cursor was set to another place.
    Column("generation", BigInteger, nullable=False, server_default=text("0")),
    # While the log is replayed: until when, and the last event that was passed on.
    Column("replay_until", _TIME),
    Column("replay_at", _TIME),
    Column("replay_eval_id", _EVAL_ID),
    Column("replay_occurred_at", _TIME),
    Column("replay_event_id", Uuid),
    Column("lease_owner", Text),
    Column("lease_token", BigInteger, nullable=False, server_default=text("0")),
    Column("lease_until", _TIME),
    Column("delivered", BigInteger, nullable=False, server_default=text("0")),
    Column("dead", BigInteger, nullable=False, server_default=text("0")),
    # Confirmations that left the outbox before the sink read them: their events are replayed from the log.
    Column("missed", BigInteger, nullable=False, server_default=text("0")),
    Column("last_error", Text),
    Column("failing_since", _TIME),
    Column("gap_since", _TIME),
    Column("delivered_at", _TIME),
    Column("created_at", _TIME, nullable=False, server_default=_NOW),
    postgresql_with={"fillfactor": "50"},
)

# Who is sent confirmations over HTTP. `secret` signs them, so it is kept as it is. evalstore/storage/webhooks.py
webhooks = Table(
    "webhooks",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("url", Text, nullable=False),
    Column("event_types", ARRAY(Text), nullable=False),
    Column("statuses", ARRAY(Text), nullable=False),
    Column("run_id", Text),
    Column("submitter", Text),
    Column("secret", Text, nullable=False),
    Column("previous_secret", Text),
    Column("previous_valid_until", _TIME),
    Column("state", Text, CheckConstraint("state IN ('active', 'disabled')"), nullable=False, server_default=text("'active'")),
    Column("disabled_at", _TIME),
    # Since the first failure after the last success: how long, how many in a row, and when the next try is due.
    Column("failing_since", _TIME),
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("next_at", _TIME, nullable=False),
    Column("last_error", Text),
    Column("delivered", BigInteger, nullable=False, server_default=text("0")),
    Column("failed", BigInteger, nullable=False, server_default=text("0")),
    Column("delivered_at", _TIME),
    Column("created_by", Text, nullable=False),
    Column("created_at", _TIME, nullable=False, server_default=_NOW),
    postgresql_with={"fillfactor": "50"},
)

# The pending and the recent deliveries of each subscription. `eval_id` is empty for a test.
webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("eval_id", _EVAL_ID, primary_key=True),
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
    Column("next_at", _TIME, nullable=False),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("first_attempt_at", _TIME),
    Column("status_code", Integer),
    Column("error", Text),
    Column("created_at", _TIME, nullable=False),
    Column("finished_at", _TIME),
    Index("webhook_deliveries_ready", "webhook_id", "next_at", "seq", postgresql_where=text("state = 'pending' AND is_next")),
    Index("webhook_deliveries_in_order", "webhook_id", "eval_id", "seq", postgresql_where=text("state = 'pending'")),
    Index("webhook_deliveries_by_webhook", "webhook_id", "seq"),
    Index("webhook_deliveries_by_age", "created_at"),
    postgresql_with={"fillfactor": "70"},
)

# Messages that will not be stored unless an operator acts, as received, each with its error.
dead_letters = Table(
    "dead_letters",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("state", Text, nullable=False, server_default=text("'dead'")),
    Column("queue", Text, nullable=False),
    Column("actor", Text),
    Column("eval_id", _EVAL_ID),
    Column("event_id", Uuid),
    Column("message", LargeBinary, nullable=False),
    Column("error_class", Text, nullable=False),
    Column("error_message", Text, nullable=False),
    Column("traceback", Text, nullable=False),
    Column("signature", Text, nullable=False),
    Column("deliveries", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("first_at", _TIME, nullable=False),
    Column("last_at", _TIME, nullable=False),
    Column("host", Text),
    Column("release", Text),
    Column("redrives", Integer, nullable=False, server_default=text("0")),
    Column("redrive", Uuid),
    # When the redrive put the letter in Redis. NULL if the worker died before it could set the time.
    Column("sent_at", _TIME),
    # The SHA-256 of each object that the message needs. The sweep keeps these objects.
    Column("objects", ARRAY(LargeBinary), nullable=False, server_default=text("'{}'")),
    Index("dead_letters_by_time", "last_at"),
    Index("dead_letters_by_signature", "signature"),
    Index("dead_letters_by_evaluation", "eval_id"),
    Index("dead_letters_by_redrive", "redrive", postgresql_where=text("redrive IS NOT NULL")),
    Index("dead_letters_redriving", "id", postgresql_where=text("state = 'redriving'")),
    Index("dead_letters_by_object", "objects", postgresql_using="gin", postgresql_where=text("objects <> '{}'")),
    Index("dead_letters_unsent", "redrive", "first_at", "id", postgresql_where=text("state = 'redriving' AND sent_at IS NULL")),
)

probes = Table("probes", metadata, Column("name", Text, primary_key=True), Column("at", _TIME, nullable=False))

# Of `total` letters, `stored`, `died` (again) and `returned` (unchanged) are settled.
redrives = Table(
    "redrives",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("asked_at", _TIME, nullable=False, server_default=_NOW),
    Column("actor", Text, nullable=False),
    Column("reason", Text),
    Column("filter", JSONB, nullable=False),
    Column("rate", Double),
    Column("canary", Integer),
    Column("state", Text, nullable=False, server_default=text("'running'")),
    Column("error", Text),
    Column("total", Integer, nullable=False),
    Column("sent", Integer, nullable=False, server_default=text("0")),
    Column("stored", Integer, nullable=False, server_default=text("0")),
    Column("died", Integer, nullable=False, server_default=text("0")),
    Column("returned", Integer, nullable=False, server_default=text("0")),
    Column("started_at", _TIME),
    Column("paced_until", _TIME),
    Column("finished_at", _TIME),
    Index("redrives_by_time", "asked_at"),
    Index("redrives_unfinished", "id", postgresql_where=text("finished_at IS NULL")),
)

operator_actions = Table(
    "operator_actions",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("at", _TIME, nullable=False, server_default=_NOW),
    Column("actor", Text, nullable=False),
    Column("verb", Text, nullable=False),
    Column("reason", Text),
    Column("filter", JSONB, nullable=False),
    Column("count", Integer, nullable=False),
    Column("redrive", Uuid),
    Column("details", JSONB, nullable=False, server_default=text("'{}'")),
    Index("operator_actions_by_time", "at"),
)

# The ids of erased evaluations, as HMAC-SHA256 under the key of the next table.
tombstones = Table(
    "tombstones",
    metadata,
    Column("digest", LargeBinary, primary_key=True),
    Column("erased_at", _TIME, nullable=False, server_default=_NOW),
)

# One row: the key, and the two blocks of HMAC that are made of it.
erasure_key = Table(
    "erasure_key",
    metadata,
    Column("id", SmallInteger, CheckConstraint("id = 1"), primary_key=True, autoincrement=False, server_default=text("1")),
    Column("key", LargeBinary, nullable=False),
    Column("inner_pad", LargeBinary, nullable=False),
    Column("outer_pad", LargeBinary, nullable=False),
)

# One row: the id that names this evalstore in the lake.
lake_owner = Table(
    "lake_owner",
    metadata,
    Column(
        "singleton",
        SmallInteger,
        CheckConstraint("singleton = 1"),
        primary_key=True,
        autoincrement=False,
        server_default=text("1"),
    ),
    Column("id", Uuid, nullable=False, server_default=text("gen_random_uuid()")),
)

# Keys of the HTTP service, as SHA-256: a reader of this table cannot use them.
api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("scopes", ARRAY(Text), nullable=False),
    Column("created_at", _TIME, nullable=False, server_default=_NOW),
    Column("expires_at", _TIME),
    Column("revoked_at", _TIME),
)

content_grants = Table(
    "content_grants",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("sha256", LargeBinary, primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("encoding", Text, nullable=False),
    Column("granted_at", _TIME, nullable=False, server_default=_NOW),
    Index("content_grants_by_age", "granted_at"),
)
