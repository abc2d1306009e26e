"""The keys of a table with `type = "bigquery"`."""

from pathlib import Path

from pydantic import Field, model_validator

from evalstore.sinks.options import Options


class BigQueryOptions(Options):
    """A batch is one request, which BigQuery limits to 10 MB. A row is smaller there than as JSON."""

    project: str = Field(pattern=r"^[a-z0-9.:-]{1,100}$")
    dataset: str = Field(pattern=r"^[A-Za-z0-9_]{1,1024}$")
    table: str = Field(default="evaluation_events", pattern=r"^[A-Za-z0-9_]{1,1024}$")
    create: bool = False
    credentials_file: Path | None = None
    api_endpoint: str | None = Field(default=None, pattern=r"^https?://")
    storage_endpoint: str | None = Field(default=None, pattern=r"^[^/\s]+:\d+$")
    batch_events: int = Field(default=10_000, ge=1, le=100_000)
    batch_bytes: int | None = Field(default=8_000_000, ge=1000, le=9_000_000)
    batch_s: float = Field(default=1.0, ge=0, le=60)

    @model_validator(mode="after")
    def _fits_together(self) -> "BigQueryOptions":
        if self.credentials_file is not None and not self.credentials_file.is_file():
            raise ValueError(f"credentials_file: there is no file {self.credentials_file}")
        if self.is_emulator != (self.storage_endpoint is not None):
            raise ValueError("storage_endpoint: goes together with an api_endpoint that begins with http://")
        return self

    @property
    def is_emulator(self) -> bool:
        """Whether the addresses are those of an emulator, which gets no credentials."""
        return self.api_endpoint is not None and self.api_endpoint.startswith("http://")
