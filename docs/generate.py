"""Writes the parts of the documentation that follow from the code: `make docs`, or with `--check` only says what is stale.

A page holds `<!-- begin NAME -->` and `<!-- end NAME -->`; what is between them is replaced by what `BLOCKS[NAME]` gives.
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
from models.errors import InvalidEvent
from models.events import ENDINGS, Event, check
from models.logs import LOGS
from models.metrics import METRICS, Metric
from models.plain import MAX_METADATA_BYTES
from models.record import Record
from models.settings import Settings

_DOCS: Final = Path(__file__).parent
_BLOCK: Final = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
_WIDTH: Final = 100

# How a value looks in JSON, for each field of an event. What a field may hold beyond its type is checked in models/events.py.
_FORMS: Final = {
    "type": "the event's name",
    "eval_id": "1 to 200 of `A-Z a-z 0-9 . _ ~ : @ + = -`, not `.` or `..`",
    "event_id": "UUID",
    "occurred_at": "RFC 3339 with an offset, years 1970 to 9999 in UTC",
    "attempt": "integer, 1 to 1,000,000, default 1",
    "metadata": f"object, up to {MAX_METADATA_BYTES // 1024} KiB",
    "code": "content",
    "output": "content",
    "error": "content",
    "run_id": "as `eval_id`",
    "language": "text, default `python`",
    "submitter": "text",
    "executor_id": "text",
    "container_id": "text",
    "timeout_s": "number",
    "exit_code": "64-bit integer",
    "duration_ms": "number",
    "memory_bytes": "64-bit integer",
    "score": "number",
    "reason": "text",
}


def settings() -> str:
    """Every environment variable: from `models.settings.Settings`."""
    rows = []
    for name, field in Settings.model_fields.items():
        what, _, readers = (field.description or "").partition("; read by ")
        default, kind = field.default, _kind(field.annotation)
        if isinstance(default, SecretStr):
            default, kind = default.get_secret_value(), "address"
        limits = ", ".join(_limit(limit) for limit in field.metadata)
        rows.append([f"`EVALSTORE_{name.upper()}`", ", ".join(filter(None, [kind, limits])), f"`{default}`", what, readers])
    return _table(["variable", "type", "default", "what", "read by"], rows)


def _kind(annotation: Any) -> str:
    """A type in words; that a setting may be unset shows in its default."""
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
    """What `--help` prints, of the program, of each of its commands and of each of their verbs."""
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
    """Which field belongs to which event: from the models of `models.events`."""
    models = {model.model_fields["type"].default: model for model in get_args(Event)}
    sent = {name: model for name, model in models.items() if name != "evaluation:lost"}
    where: dict[str, list[str]] = {}
    for name, model in sent.items():
        required = {"type", *_required(name)}
        for field in model.model_fields:
            if not field.endswith(("_b64", "_ref")):
                where.setdefault(field, []).append(name.removeprefix("evaluation:") + " (required)" * (field in required))
    rows = []
    for field, form in _FORMS.items():
        names = where.pop(field)
        everywhere = "all (required)" if names[0].endswith("(required)") else "all"
        rows.append([f"`{field}`", everywhere if len(names) == len(sent) else ", ".join(names), form])
    if where:
        raise KeyError(f"docs/generate.py does not know the form of {', '.join(where)}")
    return _table(["field", "in", "form"], rows)


def _required(name: str) -> set[str]:
    """The fields that an event without any lacks."""
    try:
        check({"type": name})
    except InvalidEvent as error:
        return {fault.field for fault in error.faults}
    return set()


def limits() -> str:
    """Numbers that the pages mention."""
    endings = ", ".join(f"`{name}`" for name in sorted(ENDINGS))
    return (
        f"Content holds up to {MAX_CONTENT_BYTES // 1024**2} MiB (`EVALSTORE_MAX_CONTENT_BYTES`).\n"
        f"The events that end an attempt are {endings}.\n"
    )


def record() -> str:
    """The fields of a record, in their order."""
    return ", ".join(f"`{name}`" for name in Record.model_fields) + ".\n"


def metrics() -> str:
    """Every metric: from `models.metrics.METRICS`."""
    head = ["metric", "type", "unit", "labels", "what"]
    sections = {
        "worker": "What a worker's processes did",
        "api": "What the service's processes did",
        "any": "Of each group of processes",
        "servers": "What the servers hold",
    }
    parts = []
    for source, title in sections.items():
        rows = [[f"`{one.name}`", one.kind, one.unit, _labels(one), one.help] for one in METRICS if one.source == source]
        parts.append(f"## {title}\n\n{_table(head, rows)}")
    return "\n".join(parts)


def logs() -> str:
    """Every log event: from `models.logs.LOGS`."""
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
    """`page` with every block as the code has it now. Raises KeyError for a block that nothing makes."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{BLOCKS[block[2]]()}\n{block[3]}", page)


def main() -> int:
    """Exit status 1 where `--check` finds a stale page."""
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
