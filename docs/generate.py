"""Write the parts of the documentation that derive from the code: `make docs`. With `--check`, only report stale pages.

A page holds `<!-- begin NAME -->` and `<!-- end NAME -->`. The result of `BLOCKS[NAME]` replaces the text between them.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

import typer
from pydantic import SecretStr

from evalstore.cli.app import application
from models.content import MAX_CONTENT_BYTES
from models.events import ENDINGS
from models.fields import FIELDS, SENT
from models.logs import LOGS
from models.metrics import METRICS, Metric
from models.record import Record
from models.settings import Settings

_DOCS: Final = Path(__file__).parent
_BLOCK: Final = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
_WIDTH: Final = 100


def settings() -> str:
    """Return the table of environment variables, from `models.settings.Settings`."""
    rows = []
    for name, field in Settings.model_fields.items():
        what, _, readers = (field.description or "").partition("; read by ")
        default, kind = field.default, _kind(field.annotation)
        if isinstance(default, SecretStr):
            default, kind = default.get_secret_value(), "address"
        limits = ", ".join(_limit(limit) for limit in field.metadata)
        rows.append([f"`EVALSTORE_{name.upper()}`", ", ".join(filter(None, [kind, limits])), f"`{default}`", what, readers])
    return _table(["variable", "type", "default", "meaning", "read by"], rows)


def _kind(annotation: Any) -> str:
    """Return a type in words. The default shows whether a setting may be unset."""
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    kinds = [_kind(one) for one in get_args(annotation) if one is not type(None)]
    names = {"int": "integer", "str": "text", "float": "number", "Path": "path", "SecretStr": "text"}
    name = getattr(annotation, "__name__", str(annotation))
    return " or ".join(kinds) if kinds else names.get(name, name)


def _limit(limit: Any) -> str:
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return ", ".join(f"{words} {getattr(limit, sign):,}" for sign, words in signs.items() if hasattr(limit, sign))


def command_line() -> str:
    """Return the output of `--help` for the program, each command and each subcommand."""
    group: Any = typer.main.get_command(application())
    top = typer.Context(group, info_name="evalstore", terminal_width=_WIDTH, **group.context_settings)
    parts = [_help("evalstore", group, top)]
    for name, command in sorted(group.commands.items()):
        context = typer.Context(command, top, name, terminal_width=_WIDTH)
        parts.append(_help(f"evalstore {name}", command, context))
        for verb, inner in getattr(command, "commands", {}).items():
            parts.append(_help(f"evalstore {name} {verb}", inner, typer.Context(inner, context, verb, terminal_width=_WIDTH)))
    return "\n".join(parts)


def _help(title: str, command: Any, context: Any) -> str:
    return f"## {title}\n\n```text\n{command.get_help(context)}\n```\n"


def events() -> str:
    """Return the table of fields and the events that have them, from `models.fields`."""
    rows = [["`type`", "all (required)", "text", "the event's name"]]
    for field in FIELDS:
        names = [name + " (required)" * (name in field.required) for name in field.events]
        everywhere = "all (required)" if field.required == SENT else "all"
        where = everywhere if field.events == SENT else ", ".join(names)
        rows.append([f"`{field.name}`", where, field.kind.words, field.doc])
    return _table(["field", "in", "form", "meaning"], rows)


def limits() -> str:
    """Return the limits that pages mention."""
    endings = ", ".join(f"`{name}`" for name in sorted(ENDINGS))
    return (
        f"Content holds up to {MAX_CONTENT_BYTES // 1024**2} MiB (`EVALSTORE_MAX_CONTENT_BYTES`).\n"
        f"The events that end an attempt are {endings}.\n"
    )


def record() -> str:
    """Return the fields of a record, in order."""
    return ", ".join(f"`{name}`" for name in Record.model_fields) + ".\n"


def metrics() -> str:
    """Return the tables of metrics, from `models.metrics.METRICS`."""
    head = ["metric", "type", "unit", "labels", "meaning"]
    sections = {
        "worker": "Counted by worker processes",
        "api": "Counted by processes of the HTTP service",
        "bridge": "Counted by the bridge",
        "any": "Of each process group",
        "servers": "State of the servers",
    }
    parts = []
    for source, title in sections.items():
        rows = [[f"`{one.name}`", one.kind, one.unit, _labels(one), one.help] for one in METRICS if one.source == source]
        parts.append(f"## {title}\n\n{_table(head, rows)}")
    return "\n".join(parts)


def logs() -> str:
    """Return the table of log events, from `models.logs.LOGS`."""
    rows = [[f"`{one.name}`", one.level, ", ".join(f"`{name}`" for name in one.fields), one.text] for one in LOGS]
    return _table(["event", "level", "fields", "text"], rows)


def _labels(metric: Metric) -> str:
    return "<br>".join(f"`{name}`: {', '.join(values) or '…'}" for name, values in metric.labels.items())


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


BLOCKS: Final[dict[str, Callable[[], str]]] = {
    "settings": settings,
    "command_line": command_line,
    "events": events,
    "limits": limits,
    "record": record,
    "metrics": metrics,
    "logs": logs,
}


def renewed(page: str) -> str:
    """Return `page` with every block made again from the code. Raise KeyError for an unknown block."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{BLOCKS[block[2]]()}\n{block[3]}", page)


def main() -> int:
    """Return exit status 1 if `--check` finds a stale page."""
    stale = []
    for path in sorted(_DOCS.rglob("*.md")):
        page = path.read_text()
        if page != (fresh := renewed(page)):
            stale.append(path)
            if "--check" not in sys.argv:
                path.write_text(fresh)
    for path in stale:
        print("stale, run `make docs`:" if "--check" in sys.argv else "written:", path.relative_to(_DOCS.parent))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
