"""What the anomaly detector found, and its state."""

from alembic import op

revision = "0016"
down_revision = "0015"

_ANOMALIES = """
CREATE TABLE anomalies (
    id uuid PRIMARY KEY,
    sink text NOT NULL,
    kind text NOT NULL CHECK (kind IN ('drift', 'outlier')),
    dimension text NOT NULL CHECK (dimension IN ('language', 'submitter', 'executor')),
    value text NOT NULL,
    group_key text NOT NULL,
    metric text NOT NULL,
    expected double precision NOT NULL,
    observed double precision NOT NULL,
    occurrences integer NOT NULL DEFAULT 1,
    eval_ids text[] COLLATE "C" NOT NULL,
    detected_at timestamptz NOT NULL DEFAULT now(),
    first_at timestamptz NOT NULL,
    last_at timestamptz NOT NULL,
    state text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'acknowledged')),
    acknowledged_by text,
    acknowledged_at timestamptz,
    reason text
);
CREATE INDEX anomalies_by_time ON anomalies (detected_at, id);
CREATE INDEX anomalies_open ON anomalies (detected_at, id) WHERE state = 'open';
CREATE INDEX anomalies_by_group ON anomalies (group_key, metric, kind, last_at);
CREATE INDEX anomalies_by_evaluation ON anomalies USING gin (eval_ids);
"""
_DETECTORS = """
CREATE TABLE anomaly_detectors (
    name text PRIMARY KEY,
    owner uuid NOT NULL,
    library text NOT NULL,
    cursor jsonb,
    latest timestamptz,
    skip_until timestamptz,
    silent_until timestamptz
) WITH (fillfactor = 50);
CREATE TABLE anomaly_groups (
    name text NOT NULL,
    dimension text NOT NULL,
    key text NOT NULL,
    used bigint NOT NULL,
    state bytea NOT NULL,
    digest bytea NOT NULL,
    PRIMARY KEY (name, dimension, key)
) WITH (fillfactor = 50);
"""


def upgrade() -> None:
    op.execute(_ANOMALIES)
    op.execute(_DETECTORS)
