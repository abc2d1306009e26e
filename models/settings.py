"""The settings of a process: one table, read once from environment variables."""

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo, field_validator

from models.addresses import check_database_url, check_endpoint, check_host, parse_redis_url, parse_store_url
from models.content import MAX_CONTENT_BYTES
from models.errors import InvalidSettings
from models.logs import EventLogger
from models.metadata_keys import parse_keys
from models.networks import parse_networks
from models.validation_errors import did_you_mean, format_error

log = EventLogger("evalstore.settings")

_PREFIX = "EVALSTORE_"
DEFAULT_REDIS_NAMESPACE: Final = "dramatiq"
_NAMESPACE = re.compile(r"(?=[A-Za-z0-9{])(?=.{1,64}$)(?!.*evalstore:)[\w.:~@+=-]*(?:\{[\w.:~@+=-]+\}[\w.:~@+=-]*)?", re.ASCII)
# Variables that single commands read. They are no settings of a process.
_COMMAND_VARIABLES = {"EVALSTORE_API_URL", "EVALSTORE_ACTOR", "EVALSTORE_WEBHOOK_SECRET"}
# Kubernetes sets these variables for a service whose name begins with evalstore.
_SERVICE_LINK = re.compile(r".*_SERVICE_(HOST|PORT(_\w+)?)|.*_PORT_\d+_(TCP|UDP|SCTP)(_\w+)?")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Upper limits, so that time functions, Redis and PostgreSQL do not overflow.
_DAY_S: Final = 86_400
_CENTURY_DAYS: Final = 36_500
_PEBIBYTE: Final = 1024**5
_API_PATHS: Final = {"storage", "health", "metrics", "docs", "openapi.json", "console"}


class Settings(BaseModel):
    """Each field is the environment variable `EVALSTORE_<FIELD>`. Addresses may hold passwords and are never printed."""

    model_config = ConfigDict(frozen=True, defer_build=True, extra="ignore", hide_input_in_errors=True, allow_inf_nan=False)

    database_url: Annotated[
        SecretStr, Field(description="address of PostgreSQL, as libpq takes it; read by worker, API, CLI")
    ] = SecretStr("postgresql://localhost/evalstore")
    database_schema: Annotated[
        str | None,
        Field(
            pattern=r"^[A-Za-z_][A-Za-z0-9_$-]{0,62}$",
            description="schema of all tables, case-sensitive; unset: the first existing schema of the connection's "
            "search_path; read by worker, API, CLI",
        ),
    ] = None
    redis_url: Annotated[
        SecretStr,
        Field(
            description="address of Redis or Valkey: redis://, rediss://, unix://, redis+sentinel://h1,h2/NAME/0 or "
            "redis+cluster://h1,h2; read by all"
        ),
    ] = SecretStr("redis://localhost:6379/0")
    redis_namespace: Annotated[
        str,
        Field(
            validate_default=True,
            description="prefix of the queue's keys, Dramatiq's `namespace`; with another than the default, all other keys and "
            "channels contain it too; on a cluster it has a part in braces, and the default is `{dramatiq}`; read by all",
        ),
    ] = DEFAULT_REDIS_NAMESPACE
    send_timeout_s: Annotated[
        float,
        Field(gt=0, le=_DAY_S, description="seconds after which `send` reports that Redis is unreachable; read by senders"),
    ] = 2
    inspect: Annotated[
        Literal["on", "off"], Field(description="whether Inspect AI's evals send their samples; read by senders")
    ] = "off"
    batch_events: Annotated[
        int, Field(ge=1, le=65536, description="maximum number of events in one transaction; read by workers")
    ] = 2000
    batch_bytes: Annotated[
        int,
        Field(
            ge=1,
            le=_PEBIBYTE,
            description="maximum bytes of messages in one fetch; a larger message is fetched alone; read by workers",
        ),
    ] = 8 * 1024 * 1024
    max_deaths: Annotated[
        int,
        Field(
            ge=1,
            le=1_000_000,
            description="number of processes that a message may crash before it becomes a dead letter; read by workers",
        ),
    ] = 5
    hook_timeout_s: Annotated[
        float,
        Field(gt=0, le=10, description="seconds that a validator or enricher has for a batch of events; read by workers, API"),
    ] = 2
    hook_retry_s: Annotated[
        float,
        Field(
            gt=0, le=_DAY_S, description="seconds for which a validator or enricher that is slow is off; read by workers, API"
        ),
    ] = 60
    breaker_messages: Annotated[
        int,
        Field(
            ge=1,
            le=1_000_000_000,
            description="minimum number of messages in the window before the breaker can open; read by workers",
        ),
    ] = 500
    breaker_share: Annotated[
        float, Field(gt=0, le=1, description="share of bad messages at which the breaker opens; read by workers")
    ] = 0.5
    breaker_window_s: Annotated[
        float, Field(gt=0, le=_DAY_S, description="length of the breaker's window in seconds; read by workers")
    ] = 60
    breaker_probe_s: Annotated[
        float, Field(gt=0, le=_DAY_S, description="seconds between trial messages while the breaker is open; read by workers")
    ] = 30
    lost_grace_s: Annotated[
        float,
        Field(
            ge=1, le=1e9, description="seconds beyond its limit after which an evaluation is marked as lost; read by workers"
        ),
    ] = 60
    running_limit_s: Annotated[
        float, Field(gt=0, le=1e9, description="limit in seconds for a running evaluation without timeout_s; read by workers")
    ] = 86_400
    queued_limit_s: Annotated[
        float, Field(gt=0, le=1e9, description="limit in seconds for a queued evaluation; read by workers")
    ] = 86_400
    metrics_host: Annotated[
        str, Field(description="host name or address on which metrics and health are served; read by worker, scheduler")
    ] = "127.0.0.1"
    metrics_port: Annotated[
        int, Field(ge=0, le=65535, description="port for metrics of a worker and all its processes; 0: none; read by worker")
    ] = 9191
    scheduler_metrics_port: Annotated[
        int, Field(ge=0, le=65535, description="port for metrics of a scheduler; 0: none; read by scheduler")
    ] = 9192
    runtime_dir: Annotated[
        Path | None,
        Field(
            description="local folder for the counters and heartbeats of processes; unset: a folder of this user in the "
            "temporary folder; read by worker, scheduler, API, CLI"
        ),
    ] = None
    log_format: Annotated[
        Literal["auto", "json", "text"],
        Field(description="format of logs; `auto`: text on a terminal, else JSON lines; read by worker, scheduler, API"),
    ] = "auto"
    max_content_bytes: Annotated[
        int, Field(ge=1, le=1024**3 - 1, description="maximum bytes of one `code`, `output` or `error`; read by all")
    ] = MAX_CONTENT_BYTES
    object_store_url: Annotated[
        str | None, Field(description="object store for large content: file:///folder or s3://bucket/prefix; read by all")
    ] = None
    inline_limit_bytes: Annotated[
        int,
        Field(ge=0, le=_PEBIBYTE, description="larger content goes to the object store, if one is set; read by senders"),
    ] = 64 * 1024
    object_grace_s: Annotated[
        float, Field(ge=0, le=1e9, description="seconds for which an event waits for a missing object; read by workers")
    ] = 3600
    sweep_grace_days: Annotated[
        float,
        Field(
            gt=0,
            le=_CENTURY_DAYS,
            description="days after which an object without references is removed; read by senders and workers",
        ),
    ] = 7
    archive_url: Annotated[
        str | None,
        Field(
            description="object store for archived content; unset: that of EVALSTORE_OBJECT_STORE_URL; read by worker, API, CLI"
        ),
    ] = None
    archive_threshold_bytes: Annotated[
        int, Field(ge=1, le=_PEBIBYTE, description="larger content moves from PostgreSQL to the archive; read by workers")
    ] = 1_000_000
    archive_after_days: Annotated[
        float | None,
        Field(
            ge=0,
            le=_CENTURY_DAYS,
            description="days after an evaluation's end until all its content is archived; unset: never; read by workers",
        ),
    ] = None
    s3_endpoint_url: Annotated[
        str | None, Field(description="S3-compatible server, as http(s)://host:port; unset: AWS; read by all")
    ] = None
    s3_storage_class: Annotated[
        str | None, Field(pattern=r"^[A-Z][A-Z0-9_]{0,63}$", description="storage class of new objects; read by all")
    ] = None
    s3_server_side_encryption: Annotated[
        Literal["AES256", "aws:kms", "aws:kms:dsse"] | None,
        Field(description="encryption of new objects in S3; unset: the bucket's default; read by all"),
    ] = None
    s3_addressing_style: Annotated[
        Literal["auto", "path", "virtual"],
        Field(description="position of the bucket's name: in the path or in the host name; read by all"),
    ] = "auto"
    spool_dir: Annotated[
        Path | None, Field(description="local folder that keeps events during an outage of Redis; read by senders")
    ] = None
    spool_max_bytes: Annotated[
        int, Field(ge=1, le=_PEBIBYTE, description="maximum size of EVALSTORE_SPOOL_DIR in bytes; read by senders")
    ] = 1024**3

    @field_validator("spool_dir", "runtime_dir", "sinks_file", "bridge_file")
    @classmethod
    def _is_absolute(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_absolute():
            raise ValueError("expected a path that begins with /")
        return value

    bridge_file: Annotated[
        Path | None,
        Field(description="TOML file with the source, channels and fields of `evalstore bridge`; read by the bridge"),
    ] = None
    bridge_metrics_port: Annotated[
        int, Field(ge=0, le=65535, description="port of metrics and health of the bridge, 0 for none; read by the bridge")
    ] = 9194
    sinks_file: Annotated[
        Path | None, Field(description="TOML file with a table for each sink; read by sinks, and by `evalstore up`")
    ] = None
    sinks_metrics_port: Annotated[
        int,
        Field(ge=0, le=65535, description="port of metrics and health of `evalstore sinks run`, 0 for none; read by sinks"),
    ] = 9193
    outbox_max_age_s: Annotated[
        float,
        Field(
            ge=600,
            le=1e9,
            description="seconds for which the outbox keeps rows that a running sink still needs; a sink that is later is "
            "filled from the event log; read by workers",
        ),
    ] = 3 * _DAY_S

    indexed_metadata: Annotated[
        str | None,
        Field(
            description="keys of the metadata, separated by commas, that lists filter by with an index; `evalstore migrate` "
            "builds and drops the indexes; read by CLI"
        ),
    ] = None

    @field_validator("indexed_metadata")
    @classmethod
    def _names_keys(cls, value: str | None) -> str | None:
        parse_keys(value)
        return value

    webhook_allow: Annotated[
        str | None,
        Field(
            description="networks, separated by commas, that webhooks may reach though they are private, also by http, like "
            "10.1.0.0/16,fd00::/8; read by sinks, API, CLI"
        ),
    ] = None

    @field_validator("webhook_allow", "console_proxy_networks", check_fields=False)
    @classmethod
    def _names_networks(cls, value: str | None) -> str | None:
        parse_networks(value or "")
        return value

    read_api_keys: Annotated[SecretStr, Field(description="API keys that may read, comma-separated; read by the API")] = (
        SecretStr("")
    )
    read_api_keys_file: Annotated[
        Path | None, Field(description="file with more API keys that may read; reloaded when it changes; read by the API")
    ] = None
    write_api_keys: Annotated[SecretStr, Field(description="API keys that may write, comma-separated; read by the API")] = (
        SecretStr("")
    )
    write_api_keys_file: Annotated[
        Path | None, Field(description="file with more API keys that may write; reloaded when it changes; read by the API")
    ] = None
    admin_api_keys: Annotated[SecretStr, Field(description="keys that may also erase, comma-separated; read by the API")] = (
        SecretStr("")
    )
    admin_api_keys_file: Annotated[
        Path | None, Field(description="a file with more of them, read again when it changes; read by the API")
    ] = None
    api_host: Annotated[
        str, Field(description="host name or address on which `python -m evalstore.api` listens; read by the API")
    ] = "0.0.0.0"  # noqa: S104
    api_port: Annotated[
        int, Field(ge=0, le=65535, description="port on which `python -m evalstore.api` listens; read by the API")
    ] = 8086
    api_root_path: Annotated[
        str | None,
        Field(
            description="path prefix of the service behind a proxy, like /evalstore; the proxy may remove it; read by the API"
        ),
    ] = None
    console: Annotated[
        Literal["on", "read-only", "off"],
        Field(description="console at /console of the HTTP service; `read-only`: without actions; read by the API"),
    ] = "on"
    console_proxy_header: Annotated[
        str | None, Field(pattern=r"^[A-Za-z0-9-]+$", description="header in which a proxy names its user; read by the API")
    ] = None
    console_proxy_networks: Annotated[
        str | None, Field(description="networks of proxies whose header is trusted, comma-separated; read by the API")
    ] = None
    console_trace_url: Annotated[
        str | None,
        Field(pattern=r"^https?://[^\s\"'<>]+$", description="a trace, with {eval_id} or {trace_id}; read by the API"),
    ] = None
    cache_ttl_s: Annotated[
        int, Field(ge=0, le=86_400, description="seconds for which a record is cached; 0: no cache; read by the API")
    ] = 300
    max_request_bytes: Annotated[int, Field(ge=1, le=_PEBIBYTE, description="maximum bytes of a request; read by the API")] = (
        104_857_600
    )

    @field_validator("read_api_keys", "write_api_keys", "admin_api_keys")
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
        parse_redis_url(value.get_secret_value())
        return value

    @field_validator("redis_namespace")
    @classmethod
    def _is_a_namespace(cls, value: str, info: ValidationInfo) -> str:
        if not _NAMESPACE.fullmatch(value):
            raise ValueError(
                "expected 1 to 64 of A-Z a-z 0-9 . _ : ~ @ + = -, a letter, digit or { first, without `evalstore:`, and with "
                "at most one part in braces, like {dramatiq}"
            )
        url = info.data.get("redis_url")  # None if it is at fault
        if url is not None and "{" not in value and parse_redis_url(url.get_secret_value()).kind == "cluster":
            if value != DEFAULT_REDIS_NAMESPACE:
                raise ValueError("expected a part in braces, like {dramatiq}: it keeps all keys in one slot of the cluster")
            return f"{{{value}}}"
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
        return None if value is None else check_endpoint(value)

    @field_validator("s3_storage_class")
    @classmethod
    def _can_be_read_at_once(cls, value: str | None) -> str | None:
        if value in {"GLACIER", "DEEP_ARCHIVE"}:
            raise ValueError("expected a class whose objects can be read at once, such as GLACIER_IR")
        return value

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read the variables. White space around values is removed, and an empty variable counts as unset.

        Raises InvalidSettings, which names every variable at fault.
        """
        values = {
            name.removeprefix(_PREFIX).lower(): stripped
            for name, value in environment.items()
            if name.startswith(_PREFIX) and (stripped := value.strip())
        }
        values = {name: value for name, value in values.items() if name in cls.model_fields}
        faults = {name: "control characters are not allowed" for name, value in values.items() if _CONTROLS.search(value)}
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            for fault in error.errors():
                faults.setdefault(str(fault["loc"][0]), format_error(fault))
        if faults:
            raise InvalidSettings(
                "; ".join(f"{_PREFIX}{name.upper()}: {faults[name]}" for name in cls.model_fields if name in faults)
            )
        return settings


def unknown_settings(environment: Mapping[str, str]) -> list[str]:
    """Describe each variable that looks like a misspelt setting.

    These are no errors: a platform may have its own variables, and an older release may run with a newer one's settings.
    """
    known = [name.upper() for name in Settings.model_fields]
    problems = []
    for name in sorted(environment):
        prefix, rest = name[: len(_PREFIX)], name[len(_PREFIX) :].upper()
        is_setting = prefix == _PREFIX and rest in known
        if (
            prefix.upper() == _PREFIX
            and not is_setting
            and name not in _COMMAND_VARIABLES
            and not _SERVICE_LINK.fullmatch(rest)
        ):
            hint = did_you_mean(rest, known, prefix=_PREFIX)
            problems += [f"{name} is no setting{hint}"] if hint else []
    return problems


@cache
def warn_unknown_env() -> None:
    """Log each variable that looks like a misspelt setting, once in a process.

    Without this, a sender with `EVALSTORE_SPOOLDIR` would lose events in the first outage.
    """
    for problem in unknown_settings(os.environ):
        log.warning("unknown_setting", problem=problem)


@cache
def settings() -> Settings:
    """Return this process's settings. The first call reads them. Call it only where a process or command starts."""
    return Settings.from_environment(os.environ)
