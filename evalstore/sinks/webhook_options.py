"""The keys of a table of the sinks file with `type = "webhook"`."""

from pathlib import Path

from pydantic import Field

from evalstore.sinks.options import Options


class WebhookOptions(Options):
    """The keys of a table with `type = "webhook"`."""

    batch_events: int = Field(default=200, ge=1, le=1000)
    concurrency: int = Field(default=8, ge=1, le=100)
    connections: int = Field(default=1000, ge=1, le=10_000)
    request_timeout_s: float = Field(default=15, ge=0.1, le=60)
    first_retry_s: float = Field(default=5, ge=0.01, le=3600)
    history_days: float = Field(default=7, ge=4, le=90)
    ca_file: Path | None = None
