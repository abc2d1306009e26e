"""Subscriptions of webhooks, and their deliveries."""

from alembic import op

revision = "0014"
down_revision = "0013"

_WEBHOOKS = """
CREATE TABLE webhooks (
    id uuid PRIMARY KEY,
    url text NOT NULL,
    event_types text[] NOT NULL,
    statuses text[] NOT NULL,
    run_id text,
    submitter text,
    secret text NOT NULL,
    previous_secret text,
    previous_valid_until timestamptz,
    state text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'disabled')),
    disabled_at timestamptz,
    failing_since timestamptz,
    failures integer NOT NULL DEFAULT 0,
    next_at timestamptz NOT NULL,
    last_error text,
    delivered bigint NOT NULL DEFAULT 0,
    failed bigint NOT NULL DEFAULT 0,
    delivered_at timestamptz,
    created_by text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);
"""
_DELIVERIES = """
CREATE TABLE webhook_deliveries (
    eval_id text COLLATE "C" NOT NULL,
    id uuid NOT NULL,
    webhook_id uuid NOT NULL,
    seq bigint GENERATED ALWAYS AS IDENTITY,
    type text NOT NULL,
    version integer NOT NULL,
    body bytea NOT NULL,
    state text NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'delivered', 'failed')),
    is_next boolean NOT NULL DEFAULT false,
    next_at timestamptz NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    first_attempt_at timestamptz,
    status_code integer,
    error text,
    created_at timestamptz NOT NULL,
    finished_at timestamptz,
    PRIMARY KEY (eval_id, id)
) WITH (fillfactor = 70);
CREATE INDEX webhook_deliveries_ready ON webhook_deliveries (webhook_id, next_at, seq) WHERE state = 'pending' AND is_next;
CREATE INDEX webhook_deliveries_in_order ON webhook_deliveries (webhook_id, eval_id, seq) WHERE state = 'pending';
CREATE INDEX webhook_deliveries_by_webhook ON webhook_deliveries (webhook_id, seq);
CREATE INDEX webhook_deliveries_by_age ON webhook_deliveries (created_at);
"""


def upgrade() -> None:
    op.execute(_WEBHOOKS)
    op.execute(_DELIVERIES)
