"""The settings: one declared table, read once from environment variables."""

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Final, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from models.addresses import check_database_url, check_host, check_redis_url
from models.content import MAX_CONTENT_BYTES
from models.errors import InvalidSettings
from models.logs import EventLogger
from models.validation_errors import did_you_mean, format_error

log = EventLogger("evalstore.settings")

_PREFIX = "EVALSTORE_"
DEFAULT_REDIS_NAMESPACE: Final = "dramatiq"
_NAMESPACE = re.compile(r"(?=[A-Za-z0-9{])(?=.{1,64}$)(?!.*evalstore:)[\w.:~@+=-]*(?:\{[\w.:~@+=-]+\}[\w.:~@+=-]*)?", re.ASCII)
# Read by a command each, and so no settings of a process.
_BESIDE = {"EVALSTORE_API_URL", "EVALSTORE_ACTOR"}
# What Kubernetes sets for each service, here for one whose name begins with evalstore.
_SERVICE_LINK = re.compile(r".*_SERVICE_(HOST|PORT(_\w+)?)|.*_PORT_\d+_(TCP|UDP|SCTP)(_\w+)?")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Upper limits that no deployment needs, and that time functions, Redis and PostgreSQL can still compute with.
_DAY_S: Final = 86_400
_CENTURY_DAYS: Final = 36_500
_PEBIBYTE: Final = 1024**5
_API_PATHS: Final = {"storage", "health", "metrics", "docs", "openapi.json", "console"}
_BUCKET = re.compile(r"(?!\d+\.\d+\.\d+\.\d+$)[a-z0-9](?:[a-z0-9-]|\.(?!\.)){1,61}[a-z0-9]", re.ASCII)


def parse_store_url(url: str) -> tuple[Literal["file", "s3"], str, str]:
    """The parts of an object store's address: ("file", absolute folder, "") or ("s3", bucket, prefix).

    Raises ValueError, which says what was expected.
    """
    scheme, found, rest = url.partition("://")
    if not found or scheme not in {"file", "s3"}:
        raise ValueError("expected file:///absolute/folder or s3://bucket/prefix")
    if "?" in rest or "#" in rest or "\0" in unquote(rest):
        raise ValueError("expected no ? and no #, which a folder's name gives as %3F and %23")
    if scheme == "file":
        host, slash, _ = rest.partition("/")
        if host not in {"", "localhost"} or not slash:
            raise ValueError("expected an absolute path, with three slashes: file:///absolute/folder")
        folder = unquote(rest.removeprefix("localhost"))
        if folder.strip("/") == "" or ".." in folder.split("/"):
            raise ValueError("expected a folder below /, and no .. in its path")
        return "file", folder, ""
    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError("expected s3:// and a bucket's name: 3 to 63 of a-z 0-9 . -")
    prefix = prefix.strip("/")
    if any(part in {"", ".", ".."} for part in prefix.split("/")) and prefix:
        raise ValueError("expected a prefix without empty parts, . and ..")
    return "s3", bucket, prefix


class Settings(BaseModel):
    """Every field is the environment variable `EVALSTORE_<FIELD>`. Addresses may hold passwords and never print."""

    model_config = ConfigDict(frozen=True, defer_build=True, extra="ignore", hide_input_in_errors=True, allow_inf_nan=False)

    database_url: Annotated[SecretStr, Field(description="PostgreSQL, as a libpq address; read by worker, API, CLI")] = (
        SecretStr("postgresql://localhost/evalstore")
    )
    database_schema: Annotated[
        str | None,
        Field(
            pattern=r"^[A-Za-z_][A-Za-z0-9_$-]{0,62}$",
            description="the schema of all tables, in upper and lower case as written; unset: the first of the connection's "
            "search_path that exists; read by worker, API, CLI",
        ),
    ] = None
    redis_url: Annotated[SecretStr, Field(description="Redis or Valkey: redis://, rediss:// or unix://; read by all")] = (
        SecretStr("redis://localhost:6379/0")
    )
    redis_namespace: Annotated[
        str,
        Field(
            description="the prefix of the queue's keys, which Dramatiq calls `namespace`. With any but the default, all other "
            "keys and channels hold it, too; read by all"
        ),
    ] = DEFAULT_REDIS_NAMESPACE
    send_timeout_s: Annotated[
        float, Field(gt=0, le=_DAY_S, description="seconds until `send` gives up on Redis; read by senders")
    ] = 2
    batch_events: Annotated[int, Field(ge=1, le=65536, description="the most events stored together; read by workers")] = 2000
    batch_bytes: Annotated[
        int, Field(ge=1, le=_PEBIBYTE, description="bytes of messages fetched together, above the first; read by workers")
    ] = 8 * 1024 * 1024
    max_deaths: Annotated[
        int,
        Field(
            ge=1,
            le=1_000_000,
            description="processes a message may kill, alone in each, before it is a dead letter; read by workers",
        ),
    ] = 5
    breaker_messages: Annotated[
        int, Field(ge=1, le=1_000_000_000, description="the fewest messages that open the breaker; read by workers")
    ] = 500
    breaker_share: Annotated[
        float, Field(gt=0, le=1, description="the share of bad messages that opens the breaker; read by workers")
    ] = 0.5
    breaker_window_s: Annotated[
        float, Field(gt=0, le=_DAY_S, description="seconds over which the breaker counts; read by workers")
    ] = 60
    breaker_probe_s: Annotated[
        float, Field(gt=0, le=_DAY_S, description="seconds between messages tried while the breaker is open; read by workers")
    ] = 30
    lost_grace_s: Annotated[
        float, Field(ge=1, le=1e9, description="seconds beyond its limit until an evaluation is given up; read by workers")
    ] = 60
    running_limit_s: Annotated[
        float, Field(gt=0, le=1e9, description="seconds an evaluation may run that has no timeout_s; read by workers")
    ] = 86_400
    queued_limit_s: Annotated[
        float, Field(gt=0, le=1e9, description="seconds an evaluation may be queued; read by workers")
    ] = 86_400
    metrics_host: Annotated[
        str, Field(description="where metrics and health are answered, a host name or an address; read by worker, scheduler")
    ] = "127.0.0.1"
    metrics_port: Annotated[
        int, Field(ge=0, le=65535, description="one port for a worker and all its processes, 0 for none; read by worker")
    ] = 9191
    scheduler_metrics_port: Annotated[int, Field(ge=0, le=65535, description="the same of a scheduler; read by scheduler")] = (
        9192
    )
    runtime_dir: Annotated[
        Path | None,
        Field(
            description="a local folder in which processes keep what they count and that they live; unset: one of this user's "
            "in the folder for temporary files; read by worker, scheduler, API, CLI"
        ),
    ] = None
    log_format: Annotated[
        Literal["auto", "json", "text"],
        Field(description="JSON lines, or text for people; `auto`: text on a terminal; read by worker, scheduler, API"),
    ] = "auto"
    max_content_bytes: Annotated[
        int, Field(ge=1, le=1024**3 - 1, description="the most one `code`, `output` or `error` may hold; read by all")
    ] = MAX_CONTENT_BYTES
    object_store_url: Annotated[
        str | None, Field(description="where large content goes: file:///folder or s3://bucket/prefix; read by all")
    ] = None
    inline_limit_bytes: Annotated[
        int,
        Field(ge=0, le=_PEBIBYTE, description="content above it goes to the object store, if there is one; read by senders"),
    ] = 64 * 1024
    object_grace_s: Annotated[
        float, Field(ge=0, le=1e9, description="seconds an event waits for an object that is missing; read by workers")
    ] = 3600
    sweep_grace_days: Annotated[
        float,
        Field(
            gt=0,
            le=_CENTURY_DAYS,
            description="days until an object that nothing names is removed; read by senders and workers",
        ),
    ] = 7
    archive_url: Annotated[
        str | None, Field(description="where archived content goes; unset: the object store; read by worker, API, CLI")
    ] = None
    archive_threshold_bytes: Annotated[
        int, Field(ge=1, le=_PEBIBYTE, description="content above it leaves PostgreSQL for the archive; read by workers")
    ] = 1_000_000
    archive_after_days: Annotated[
        float | None,
        Field(
            ge=0,
            le=_CENTURY_DAYS,
            description="days after an evaluation's end until all its content does; unset: never; read by workers",
        ),
    ] = None
    s3_endpoint_url: Annotated[
        str | None, Field(description="an S3-compatible server, as http(s)://host:port; unset: AWS; read by all")
    ] = None
    s3_storage_class: Annotated[
        str | None, Field(pattern=r"^[A-Z][A-Z0-9_]{0,63}$", description="the storage class of new objects; read by all")
    ] = None
    s3_server_side_encryption: Annotated[
        Literal["AES256", "aws:kms", "aws:kms:dsse"] | None,
        Field(description="how S3 encrypts new objects; unset: as the bucket says; read by all"),
    ] = None
    s3_addressing_style: Annotated[
        Literal["auto", "path", "virtual"], Field(description="the bucket in the path or in the host name; read by all")
    ] = "auto"
    spool_dir: Annotated[
        Path | None, Field(description="a local folder that keeps events while Redis is away; read by senders")
    ] = None
    spool_max_bytes: Annotated[int, Field(ge=1, le=_PEBIBYTE, description="the most that folder may hold; read by senders")] = (
        1024**3
    )

    @field_validator("spool_dir", "runtime_dir")
    @classmethod
    def _is_absolute(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_absolute():
            raise ValueError("expected a path that begins with /")
        return value

    read_api_keys: Annotated[SecretStr, Field(description="keys that may read, comma-separated; read by the API")] = SecretStr(
        ""
    )
    read_api_keys_file: Annotated[
        Path | None, Field(description="a file with more of them, read again when it changes; read by the API")
    ] = None
    write_api_keys: Annotated[SecretStr, Field(description="keys that may write, comma-separated; read by the API")] = (
        SecretStr("")
    )
    write_api_keys_file: Annotated[
        Path | None, Field(description="a file with more of them, read again when it changes; read by the API")
    ] = None
    api_host: Annotated[
        str, Field(description="where `python -m evalstore.api` listens, a host name or an address; read by the API")
    ] = "0.0.0.0"  # noqa: S104
    api_port: Annotated[int, Field(ge=0, le=65535, description="where `python -m evalstore.api` listens; read by the API")] = (
        8086
    )
    api_root_path: Annotated[
        str | None,
        Field(description="the path below which a proxy offers the service, like /evalstore, kept or removed; read by the API"),
    ] = None
    cache_ttl_s: Annotated[
        int, Field(ge=0, le=86_400, description="seconds a record stays in the cache, 0 for none; read by the API")
    ] = 300
    max_request_bytes: Annotated[int, Field(ge=1, le=_PEBIBYTE, description="the most a request may hold; read by the API")] = (
        104_857_600
    )

    @field_validator("read_api_keys", "write_api_keys")
    @classmethod
    def _are_keys(cls, value: SecretStr) -> SecretStr:
        keys = [key.strip() for key in value.get_secret_value().split(",")]
        if not all(re.fullmatch(r"[!-~]*", key, re.ASCII) for key in keys):
            raise ValueError("expected keys of printable ASCII without spaces, separated by commas")
        return value

    @field_validator("api_root_path")
    @classmethod
    def _is_root_path(cls, value: str | None) -> str | None:
        path = (value or "").rstrip("/")
        if not re.fullmatch(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)*", path, re.ASCII):
            raise ValueError("expected a path like /evalstore, of A-Z a-z 0-9 . _ ~ - between its slashes")
        if path.split("/")[1:2] and path.split("/")[1] in _API_PATHS:
            raise ValueError("expected a path that does not begin like one of the service's own")
        return path or None

    @field_validator("metrics_host", "api_host")
    @classmethod
    def _is_host(cls, value: str) -> str:
        return check_host(value)

    @field_validator("database_url")
    @classmethod
    def _is_postgresql(cls, value: SecretStr) -> SecretStr:
        check_database_url(value.get_secret_value())
        return value

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, value: SecretStr) -> SecretStr:
        check_redis_url(value.get_secret_value())
        return value

    @field_validator("redis_namespace")
    @classmethod
    def _is_a_namespace(cls, value: str) -> str:
        if not _NAMESPACE.fullmatch(value):
            raise ValueError(
                "expected 1 to 64 of A-Z a-z 0-9 . _ : ~ @ + = -, a letter, digit or { first, without `evalstore:`, and with "
                "at most one part in braces, like {dramatiq}"
            )
        return value

    @field_validator("object_store_url", "archive_url")
    @classmethod
    def _is_a_store(cls, value: str | None) -> str | None:
        if value is not None:
            parse_store_url(value)
        return value

    @field_validator("s3_endpoint_url")
    @classmethod
    def _is_an_endpoint(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value)
            _ = parts.port
        except ValueError:
            raise ValueError("expected a host, and a port from 0 to 65535") from None
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("expected an address like https://host:port")
        if parts.username is not None:
            raise ValueError("expected no user or password in it: credentials come as boto3 finds them")
        return value

    @field_validator("s3_storage_class")
    @classmethod
    def _can_be_read_at_once(cls, value: str | None) -> str | None:
        if value in {"GLACIER", "DEEP_ARCHIVE"}:
            raise ValueError("expected a class whose objects can be read at once, such as GLACIER_IR")
        return value

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read the variables, without the white space around their values; an empty one counts as unset.

        Raises InvalidSettings, which names every variable at fault.
        """
        given = {
            name.removeprefix(_PREFIX).lower(): stripped
            for name, value in environment.items()
            if name.startswith(_PREFIX) and (stripped := value.strip())
        }
        given = {name: value for name, value in given.items() if name in cls.model_fields}
        faults = {name: "control characters are not allowed" for name, value in given.items() if _CONTROLS.search(value)}
        try:
            read = cls.model_validate(given)
        except ValidationError as error:
            for fault in error.errors():
                faults.setdefault(str(fault["loc"][0]), format_error(fault))
        if faults:
            raise InvalidSettings(
                "; ".join(f"{_PREFIX}{name.upper()}: {faults[name]}" for name in cls.model_fields if name in faults)
            )
        return read


def unknown_settings(environment: Mapping[str, str]) -> list[str]:
    """A sentence of each variable that is no setting and spelt like one. No fault: a platform may have variables of its own,
    and an older release runs with the settings of a newer one."""
    known = [name.upper() for name in Settings.model_fields]
    found = []
    for name in sorted(environment):
        prefix, rest = name[: len(_PREFIX)], name[len(_PREFIX) :].upper()
        is_setting = prefix == _PREFIX and rest in known
        if prefix.upper() == _PREFIX and not is_setting and name not in _BESIDE and not _SERVICE_LINK.fullmatch(rest):
            hint = did_you_mean(rest, known, prefix=_PREFIX)
            found += [f"{name} is no setting{hint}"] if hint else []
    return found


@cache
def warn_unknown_env() -> None:
    """Log, once in a process, each variable that is no setting and is spelt like one.

    A sender whose `EVALSTORE_SPOOLDIR` is ignored would otherwise learn of it in an outage.
    """
    for problem in unknown_settings(os.environ):
        log.warning("unknown_setting", problem=problem)


@cache
def settings() -> Settings:
    """This process's settings, read at the first call."""
    return Settings.from_environment(os.environ)
