"""The keys of a table of the sinks file with `type = "anomaly"`."""

from pydantic import Field

from evalstore.sinks.options import Options


class AnomalyOptions(Options):
    """The keys of a table with `type = "anomaly"`."""

    max_groups: int = Field(default=500, ge=1, le=10_000)
    min_evaluations: int = Field(default=20, ge=1, le=1000)
    train_days: float = Field(default=7, ge=0, le=365)
    pause_s: float = Field(default=0.5, ge=0, le=10)
