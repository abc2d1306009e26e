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
    Double,
    Identity,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    String,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from evalstore.storage import follower_tables  # noqa: F401 - adds its tables to the metadata
from evalstore.storage.table_types import EVAL_ID, METADATA, NOW, TIME
from models.fields import CONTENTS, EVENT_COLUMNS, SCALARS

metadata = METADATA
_SQLALCHEMY = {"text": Text, "int4": Integer, "int8": BigInteger, "float8": Double, "bytea": LargeBinary}


def _columns(names: Iterable[str]) -> list[Column[Any]]:
    """Return columns of the table of fields."""
    return [Column(name, _SQLALCHEMY[EVENT_COLUMNS[name]]) for name in names]


evaluations = Table(
    "evaluations",
    metadata,
    Column("eval_id", EVAL_ID, primary_key=True),
    Column("status", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    *_columns(SCALARS),
    Column("metadata", JSONB, nullable=False),
    Column("queued_at", TIME),
    Column("started_at", TIME),
    Column("finished_at", TIME),
    Column("created_at", TIME, nullable=False, server_default=NOW),
    Column("updated_at", TIME, nullable=False, server_default=NOW),
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
    # What enrichers returned for its events, merged. Not computed from events, so a replay leaves it as it is.
    Column("enrichment", JSONB),
    # The order of all lists. Records of one commit share their time and therefore one entry, at the end of the index. See
    # listing.py.
    Index("evaluations_by_time", "created_at"),
    # `evalstore migrate` builds these CONCURRENTLY: list_indexes.py. No index has a column that changes with each event, so an
    # event that leaves the status as it is changes no index. A text may be longer than an entry of an index can be.
    Index("evaluations_by_run", "run_id", "created_at", postgresql_where=text("run_id IS NOT NULL")),
    Index(
        "evaluations_by_submitter", text("left(submitter, 200)"), "created_at", postgresql_where=text("submitter IS NOT NULL")
    ),
    Index(
        "evaluations_by_executor",
        text("left(executor_id, 200)"),
        "created_at",
        postgresql_where=text("executor_id IS NOT NULL"),
    ),
    # Records that are stored with their result never enter this index, unless they failed.
    Index("evaluations_by_status", "status", "created_at", postgresql_where=text("status <> 'completed'")),
    postgresql_with={"fillfactor": "85"},
)

# The event log (models.record.EventRow). Rows never change, except for content that moves to the archive.
evaluation_events = Table(
    "evaluation_events",
    metadata,
    Column("eval_id", EVAL_ID, primary_key=True),
    Column("event_id", Uuid, primary_key=True),
    Column("type", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("occurred_at", TIME, nullable=False),
    # When the statement began that stored the event, with the evaluation locked: ascends in commit order.
    Column("recorded_at", TIME, nullable=False, server_default=text("statement_timestamp()")),
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
    Column("eval_id", EVAL_ID, primary_key=True),
    Column("event_id", Uuid, primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("sha256", LargeBinary, nullable=False),
    Column("data", LargeBinary),
    Column("store", Text, CheckConstraint("store IN ('objects', 'archive')")),
    Column("encoding", Text, CheckConstraint("encoding IN ('identity', 'zstd')")),
    Column("recorded_at", TIME, nullable=False, server_default=NOW),
    # Failed moves to the archive: their number, the last error, and the time of the next attempt.
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("failure", Text),
    Column("retry_at", TIME),
    # The time of the event, which decides when content is old enough to move.
    Column("occurred_at", TIME, nullable=False, server_default=NOW),
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
    Column("recorded_at", TIME, nullable=False, server_default=NOW),
    Column("count", Integer, nullable=False),
    Column("body", Text, nullable=False),
    # One line for each confirmation, empty if it continues no trace.
    Column("traceparents", Text),
    # When they were relayed, and the last entry of the Redis stream at that time.
    Column("relayed_at", TIME),
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

# Messages that will not be stored unless an operator acts, as received, each with its error.
dead_letters = Table(
    "dead_letters",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("state", Text, nullable=False, server_default=text("'dead'")),
    Column("queue", Text, nullable=False),
    Column("actor", Text),
    Column("eval_id", EVAL_ID),
    Column("event_id", Uuid),
    Column("message", LargeBinary, nullable=False),
    Column("error_class", Text, nullable=False),
    Column("error_message", Text, nullable=False),
    Column("traceback", Text, nullable=False),
    Column("signature", Text, nullable=False),
    Column("deliveries", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("first_at", TIME, nullable=False),
    Column("last_at", TIME, nullable=False),
    Column("host", Text),
    Column("release", Text),
    Column("redrives", Integer, nullable=False, server_default=text("0")),
    Column("redrive", Uuid),
    # When the redrive put the letter in Redis. NULL if the worker died before it could set the time.
    Column("sent_at", TIME),
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

probes = Table("probes", metadata, Column("name", Text, primary_key=True), Column("at", TIME, nullable=False))

# Of `total` letters, `stored`, `died` (again) and `returned` (unchanged) are settled.
redrives = Table(
    "redrives",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("asked_at", TIME, nullable=False, server_default=NOW),
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
    Column("started_at", TIME),
    Column("paced_until", TIME),
    Column("finished_at", TIME),
    Index("redrives_by_time", "asked_at"),
    Index("redrives_unfinished", "id", postgresql_where=text("finished_at IS NULL")),
)

# Replays that jobs of the workers do.
replays = Table(
    "replays",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("asked_at", TIME, nullable=False, server_default=NOW),
    Column("actor", Text, nullable=False),
    Column("reason", Text),
    Column("filter", JSONB, nullable=False),
    Column("write", Boolean, nullable=False),
    Column("rate", Double),
    Column(
        "state",
        Text,
        CheckConstraint("state IN ('running', 'done', 'cancelled', 'failed')"),
        nullable=False,
        server_default=text("'running'"),
    ),
    Column("error", Text),
    Column("total", BigInteger, nullable=False),
    Column("paced_until", TIME),
    Column("started_at", TIME),
    Column("finished_at", TIME),
    Index("replays_by_time", "asked_at"),
    Index("replays_running", "id", postgresql_where=text("state = 'running'")),
)

# One job works through each range: the ids after `position` up to `last`, or to the end without it.
replay_ranges = Table(
    "replay_ranges",
    metadata,
    Column("replay", Uuid, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("position", EVAL_ID, nullable=False),
    Column("last", EVAL_ID),
    Column("is_done", Boolean, nullable=False, server_default=text("false")),
    Column("evaluations", BigInteger, nullable=False, server_default=text("0")),
    Column("different", BigInteger, nullable=False, server_default=text("0")),
    Column("unrepairable", BigInteger, nullable=False, server_default=text("0")),
    Column("differences", JSONB, nullable=False, server_default=text("'[]'")),
)

operator_actions = Table(
    "operator_actions",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("at", TIME, nullable=False, server_default=NOW),
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
    Column("erased_at", TIME, nullable=False, server_default=NOW),
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

# The catalog of the lake, as pyiceberg defines it.
iceberg_tables = Table(
    "iceberg_tables",
    metadata,
    *(Column(name, String(255), primary_key=True) for name in ("catalog_name", "table_namespace", "table_name")),
    *(Column(name, String(1000)) for name in ("metadata_location", "previous_metadata_location")),
    Column("iceberg_type", String(5)),
)
iceberg_namespace_properties = Table(
    "iceberg_namespace_properties",
    metadata,
    *(Column(name, String(255), primary_key=True) for name in ("catalog_name", "namespace", "property_key")),
    Column("property_value", String(1000), nullable=False),
)

# Keys of the HTTP service, as SHA-256: a reader of this table cannot use them.
api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("scopes", ARRAY(Text), nullable=False),
    Column("created_at", TIME, nullable=False, server_default=NOW),
    Column("expires_at", TIME),
    Column("revoked_at", TIME),
    Column("restricted_scopes", ARRAY(Text)),
    Column("submitter", Text),
    Column("run_prefix", Text),
    Column("rate_requests", Integer),
    Column("rate_period_s", Integer),
)

# Sessions of the console, by the SHA-256 of their cookies.
console_sessions = Table(
    "console_sessions",
    metadata,
    Column("digest", LargeBinary, primary_key=True),
    Column("key_id", Text, nullable=False),
    Column("created_at", TIME, nullable=False, server_default=NOW),
    Column("used_at", TIME, nullable=False, server_default=NOW),
    Index("console_sessions_by_use", "used_at"),
)

# Links that sign in once, by the SHA-256 of their tokens.
console_links = Table(
    "console_links",
    metadata,
    Column("digest", LargeBinary, primary_key=True),
    Column("key_id", Text, nullable=False),
    Column("expires_at", TIME, nullable=False),
)

# What the overview of the console showed at a minute, for its curves of the last day.
overview_samples = Table(
    "overview_samples",
    metadata,
    Column("at", TIME, primary_key=True),
    Column("numbers", JSONB, nullable=False),
)

content_grants = Table(
    "content_grants",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("sha256", LargeBinary, primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("encoding", Text, nullable=False),
    Column("granted_at", TIME, nullable=False, server_default=NOW),
    Index("content_grants_by_age", "granted_at"),
)
