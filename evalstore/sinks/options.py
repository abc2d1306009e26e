"""The keys that a table of the sinks file may have, and the secrets that it names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

_SECRET: Final = re.compile(r"(^|_)(password|secret|token|passphrase|api_key|access_key|credentials?)$")


class Options(BaseModel):
    """The options that every kind of sink takes. A kind adds its own options in a subclass.

    A batch is written when it has `batch_events` events or `batch_bytes` bytes of JSON, or when `batch_s` have passed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    type: str
    hash_ranges: int = Field(default=1, ge=1, le=64)
    batch_events: int = Field(default=4000, ge=1, le=100_000)
    batch_bytes: int | None = Field(default=None, ge=1000)
    batch_s: float = Field(default=0, ge=0, le=60)
    timeout_s: float = Field(default=120, ge=1, le=86_400)


class OwnOptions(Options):
    """The options of a kind from another package. Its factory receives unknown options unchanged."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _hides_secrets(self) -> "OwnOptions":
        if found := [name for name in self.model_extra or {} if _SECRET.search(name)]:
            raise ValueError(f"{found[0]}: a secret: give {found[0]}_env or {found[0]}_file")
        return self


def secret(value_env: str | None, value_file: Path | None, environment: Mapping[str, str]) -> SecretStr | None:
    """Return the secret that an option NAME_env or NAME_file names. Raises ValueError where it is not there."""
    if value_env is not None:
        if not environment.get(value_env):
            raise ValueError(f"the environment variable {value_env} is not set")
        return SecretStr(environment[value_env])
    if value_file is not None:
        try:
            return SecretStr(value_file.read_text(encoding="utf-8").strip())
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{value_file} cannot be read: {getattr(error, 'strerror', error)}") from error
    return None
