"""The sinks file: EVALSTORE_SINKS_FILE, TOML, a table for each sink. All faults are found at the start."""

import re
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from evalstore.sinks import anomaly, bigquery, clickhouse, kafka, lake, webhook
from evalstore.sinks.anomaly_options import AnomalyOptions
from evalstore.sinks.bigquery_options import BigQueryOptions
from evalstore.sinks.clickhouse_options import ClickHouseOptions
from evalstore.sinks.options import Options, OwnOptions
from evalstore.sinks.protocol import Sink
from evalstore.sinks.webhook_options import WebhookOptions
from evalstore.storage import rollups
from models.errors import InvalidSettings
from models.extras import how_to_install, is_installed
from models.settings import Settings
from models.validation_errors import did_you_mean, format_error

GROUP: Final = "evalstore.sinks"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
_PASSWORD: Final = re.compile(r"://[^/@\s]*:[^/@\s]+@")
_TABLE: Final = re.compile(r"\s*\[\s*(\"[^\"]*\"|'[^']*'|[^\]\s]+)\s*\]")


class Kind(NamedTuple):
    """The options and the factory of a type of sink. `extra`: the extra of this package that the type needs."""

    options: type[Options]
    create: Callable[[str, Any, Settings], Sink]
    extra: str | None = None


class SinkConfig(NamedTuple):
    """A sink as the file names it. `create` makes it under the name of one of its ranges."""

    name: str
    options: Options
    create: Callable[[str], Sink]


_BUILTIN: Final = {
    "anomaly": Kind(AnomalyOptions, anomaly.create, "anomaly"),
    "bigquery": Kind(BigQueryOptions, bigquery.create, "bigquery"),
    "clickhouse": Kind(ClickHouseOptions, clickhouse.create, "clickhouse"),
    "kafka": Kind(kafka.KafkaOptions, kafka.create, "kafka"),
    "lake": Kind(lake.LakeOptions, lake.create, "lake"),
    "webhook": Kind(WebhookOptions, webhook.create, "webhook"),
}


def _kinds() -> tuple[dict[str, Kind], list[str]]:
    """The kinds there are, without loading other packages' own, and the names of those."""
    return _BUILTIN, sorted({point.name for point in metadata.entry_points(group=GROUP)})


def load(path: Path, settings: Settings) -> list[SinkConfig]:
    """Read the sinks file. Raises InvalidSettings, which names each fault with its line and key, and no value."""
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"EVALSTORE_SINKS_FILE: {path}: {getattr(error, 'strerror', None) or error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidSettings(f"EVALSTORE_SINKS_FILE: {path}: {_toml_fault(text, str(error))}") from error
    faults: list[str] = []
    found = []
    for name, table in tables.items():
        try:
            found.append(_sink(name, table, settings))
        except _Faults as error:
            lines = sorted((_line(text, name, key), key, what) for key, what in error.found)
            faults += [f"{path}:{line}: [{name}] {f'{key}: ' if key else ''}{what}" for line, key, what in lines]
    if faults:
        raise InvalidSettings("\n".join(faults))
    return found


def load_all(settings: Settings) -> list[SinkConfig]:
    """Return the sinks of EVALSTORE_SINKS_FILE, and the sink `lake` where EVALSTORE_LAKE_URL is set. Raises InvalidSettings."""
    found = load(settings.sinks_file, settings) if settings.sinks_file is not None else []
    lakes = [sink.name for sink in found if isinstance(sink.options, lake.LakeOptions)]
    if settings.lake_url is None:
        if lakes:
            raise InvalidSettings(f"{settings.sinks_file}: [{lakes[0]}] needs EVALSTORE_LAKE_URL")
        return found
    if not is_installed("lake"):
        raise InvalidSettings(f"EVALSTORE_LAKE_URL: {how_to_install('lake')}")
    if any(name != lake.NAME for name in lakes) or any(sink.name == lake.NAME for sink in found) != bool(lakes):
        raise InvalidSettings(f"{settings.sinks_file}: the table [{lake.NAME}], and no other one, has the type lake")
    if not lakes:
        options = lake.LakeOptions()
        found.append(SinkConfig(lake.NAME, options, lambda range_: lake.create(range_, options, settings)))
    return found


class _Faults(Exception):
    def __init__(self, *found: tuple[str, str]) -> None:
        self.found = found


def _sink(name: str, table: Any, settings: Settings) -> SinkConfig:
    if not isinstance(table, dict):
        raise _Faults(("", "expected a table for each sink, like [kafka-main]"))
    faults = [] if _NAME.fullmatch(name) else [("", "a sink's name is 1 to 100 of A-Z a-z 0-9 . _ -")]
    if name == rollups.NAME:
        faults.append(("", "the name of the part that keeps statistics: give the sink another one"))
    builtin, others = _kinds()
    type_ = table.get("type")
    if not isinstance(type_, str) or type_ not in {*builtin, *others}:
        known = sorted({*builtin, *others})
        hint = did_you_mean(type_, known) if isinstance(type_, str) else ""
        what = f"there is no type of this name{hint}" if type_ else "missing"
        raise _Faults(*faults, ("type", f"{what}; there are {', '.join(known)}"))
    kind = builtin.get(type_) or _foreign(type_)
    if kind.extra and not is_installed(kind.extra):
        faults.append(("type", how_to_install(kind.extra)))
    try:
        options = kind.options.model_validate(table)
    except ValidationError as error:
        faults += [_fault(kind.options, one) for one in error.errors()]
    faults += [(key, "a password stands in no file") for key, value in table.items() if _PASSWORD.search(str(value))]
    if faults:
        raise _Faults(*faults)
    return SinkConfig(name, options, lambda range_: kind.create(range_, options, settings))


def _fault(options: type[Options], fault: Any) -> tuple[str, str]:
    key = ".".join(map(str, fault["loc"]))
    if fault["type"] != "extra_forbidden":
        text = format_error(fault)
        before, colon, after = text.partition(": ")
        return (before, after) if not key and colon and before in {*options.model_fields, before} else (key, text)
    known = list(options.model_fields)
    if f"{key}_env" in known:
        return key, f"a secret stands in no file: give {key}_env or {key}_file"
    return key, f"there is no such key{did_you_mean(key, known)}"


def _foreign(type_: str) -> Kind:
    """Return a kind of another package: `factory(name, options)` makes a sink, and `factory.Options` checks its options."""
    (point,) = list(metadata.entry_points(group=GROUP, name=type_))[:1]
    try:
        factory = point.load()
    except Exception as error:
        raise _Faults(("type", f"{point.value} cannot be loaded: {type(error).__name__}: {error}")) from error
    options = getattr(factory, "Options", OwnOptions)
    return Kind(options, lambda name, options, _settings: factory(name, options))


def _toml_fault(text: str, message: str) -> str:
    """The message of tomllib, with the key that is there twice."""
    line = re.search(r"line (\d+)", message)
    here = text.splitlines()[int(line[1]) - 1].strip() if line and int(line[1]) <= len(text.splitlines()) else ""
    key = (match[1] if (match := _TABLE.match(here)) else here.partition("=")[0]).strip()
    return f"{message}{f', key {key}' if key else ''}"


def _line(text: str, name: str, key: str) -> int:
    """The line of a key in a sink's table, or of the table; 1 where it cannot be found."""
    found, inside = 0, False
    for number, line in enumerate(text.splitlines(), 1):
        if match := _TABLE.match(line):
            inside = match[1].strip("\"'").partition(".")[0] == name
            found = number if inside and not found else found
        elif inside and key and re.match(rf"\s*[\"']?{re.escape(key.partition('.')[0])}[\"']?\s*[=.]", line):
            return number
    return found or 1
