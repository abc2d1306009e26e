"""The keys of a table with `type = "clickhouse"`."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from evalstore.sinks.options import Options, secret


class ClickHouseOptions(Options):
    """ClickHouse takes few large inserts better than many small ones, so a batch gathers for a second."""

    url: str
    database: str = Field(default="default", pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,199}$")
    table: str = Field(default="evaluation_events", pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,199}$")
    user: str = Field(default="default", pattern=r"^[!-~]{1,200}$")
    password_env: str | None = None
    password_file: Path | None = None
    create: bool = False
    ssl_ca_file: Path | None = None
    ssl_certificate_file: Path | None = None
    ssl_key_file: Path | None = None
    batch_events: int = Field(default=10_000, ge=1, le=100_000)
    batch_bytes: int | None = Field(default=32_000_000, ge=1000, le=200_000_000)
    batch_s: float = Field(default=1.0, ge=0, le=60)

    @field_validator("url")
    @classmethod
    def _is_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment or parts.username:
            raise ValueError("expected an address like https://clickhouse.example:8443")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _fits_together(self) -> "ClickHouseOptions":
        self.password()
        for name in ("ssl_ca_file", "ssl_certificate_file", "ssl_key_file"):
            if (path := getattr(self, name)) is not None and not path.is_file():
                raise ValueError(f"{name}: there is no file {path}")
        if (self.ssl_certificate_file is None) != (self.ssl_key_file is None):
            raise ValueError("ssl_certificate_file: goes together with ssl_key_file")
        return self

    def password(self) -> SecretStr | None:
        """Return the password. Raises ValueError where it is named and not there."""
        return secret(self.password_env, self.password_file, os.environ)
