"""The settings: one declared table, read once from environment variables."""

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from models.content import MAX_CONTENT_BYTES
from models.errors import InvalidSettings

_PREFIX = "EVALSTORE_"


class Settings(BaseModel):
    """Every field is the environment variable `EVALSTORE_<FIELD>`. Addresses may hold passwords and never print."""

    model_config = ConfigDict(frozen=True, defer_build=True, extra="ignore", hide_input_in_errors=True)

    database_url: Annotated[SecretStr, Field(description="PostgreSQL, as a libpq address; read by worker, API, CLI")] = (
        SecretStr("postgresql://localhost/evalstore")
    )
    redis_url: Annotated[SecretStr, Field(description="Redis or Valkey: redis://, rediss:// or unix://; read by all")] = (
        SecretStr("redis://localhost:6379/0")
    )
    send_timeout_s: Annotated[float, Field(gt=0, description="seconds until `send` gives up on Redis; read by senders")] = 2
    batch_events: Annotated[int, Field(ge=1, le=65536, description="the most events stored together; read by workers")] = 2000
    batch_bytes: Annotated[
        int, Field(ge=1, description="bytes of messages fetched together, above the first; read by workers")
    ] = 8 * 1024 * 1024
    max_deaths: Annotated[
        int, Field(ge=1, description="processes a message may kill, alone in each, before it is a dead letter; read by workers")
    ] = 5
    breaker_messages: Annotated[int, Field(ge=1, description="the fewest messages that open the breaker; read by workers")] = (
        500
    )
    breaker_share: Annotated[
        float, Field(gt=0, le=1, description="the share of bad messages that opens the breaker; read by workers")
    ] = 0.5
    breaker_window_s: Annotated[float, Field(gt=0, description="seconds over which the breaker counts; read by workers")] = 60
    breaker_probe_s: Annotated[
        float, Field(gt=0, description="seconds between messages tried while the breaker is open; read by workers")
    ] = 30
    lost_grace_s: Annotated[
        float, Field(ge=1, description="seconds beyond its limit until an evaluation is given up; read by workers")
    ] = 60
    running_limit_s: Annotated[
        float, Field(gt=0, le=1e9, description="seconds an evaluation may run that has no timeout_s; read by workers")
    ] = 86_400
    queued_limit_s: Annotated[
        float, Field(gt=0, le=1e9, description="seconds an evaluation may be queued; read by workers")
    ] = 86_400
    max_content_bytes: Annotated[
        int, Field(ge=1, le=1024**3 - 1, description="the most one `code`, `output` or `error` may hold; read by all")
    ] = MAX_CONTENT_BYTES
    spool_dir: Annotated[
        Path | None, Field(description="a local folder that keeps events while Redis is away; read by senders")
    ] = None
    spool_max_bytes: Annotated[int, Field(ge=1, description="the most that folder may hold; read by senders")] = 1024**3

    @field_validator("spool_dir")
    @classmethod
    def _is_absolute(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_absolute():
            raise ValueError("expected a path that begins with /")
        return value

    @field_validator("database_url")
    @classmethod
    def _is_postgresql(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().startswith(("postgresql://", "postgres://")):
            raise ValueError("expected an address that begins with postgresql://")
        return value

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, value: SecretStr) -> SecretStr:
        address = value.get_secret_value()
        if not address.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("expected an address that begins with redis://, rediss:// or unix://")
        try:
            parts = urlsplit(address)
            _ = parts.port
        except ValueError:
            raise ValueError("expected a host, and a port from 0 to 65535") from None
        # redis-py would take database 0 for any path that is no number.
        if parts.scheme != "unix" and not re.fullmatch(r"/?|/\d{1,5}", parts.path, re.ASCII):
            raise ValueError("expected a database number after the host, like redis://host:6379/0")
        return value

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read the variables; an empty one counts as unset.

        Raises InvalidSettings, which names every variable at fault.
        """
        given = {
            name.removeprefix(_PREFIX).lower(): value
            for name, value in environment.items()
            if name.startswith(_PREFIX) and value
        }
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            faults = [
                f"{_PREFIX}{str(fault['loc'][0]).upper()}: {fault['msg'].removeprefix('Value error, ')}"
                for fault in error.errors(include_input=False)
            ]
            raise InvalidSettings("; ".join(faults)) from None


@cache
def settings() -> Settings:
    """This process's settings, read at the first call."""
    return Settings.from_environment(os.environ)
