"""The settings: one declared table, read once from environment variables."""

import os
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from models.content import MAX_CONTENT_BYTES
from models.errors import InvalidSettings

_PREFIX = "EVALSTORE_"


class Settings(BaseModel):
    """Every field is the environment variable `EVALSTORE_<FIELD>`. Addresses may hold passwords and never print."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    database_url: Annotated[SecretStr, Field(description="PostgreSQL, as a libpq address; read by worker, API, CLI")] = (
        SecretStr("postgresql://localhost/evalstore")
    )
    redis_url: Annotated[SecretStr, Field(description="Redis or Valkey: redis://, rediss:// or unix://; read by all")] = (
        SecretStr("redis://localhost:6379/0")
    )
    max_content_bytes: Annotated[
        int, Field(ge=1, le=1024**3 - 1, description="the most one `code`, `output` or `error` may hold; read by all")
    ] = MAX_CONTENT_BYTES

    @field_validator("database_url")
    @classmethod
    def _is_postgresql(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().startswith(("postgresql://", "postgres://")):
            raise ValueError("expected an address that begins with postgresql://")
        return value

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("expected an address that begins with redis://, rediss:// or unix://")
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
