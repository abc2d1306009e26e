"""The format of log lines: JSON, or text. Senders keep the logging of their program."""

import logging
import os
import re
from typing import Any, Final

import structlog
from dramatiq.cli import LOGFORMAT
from structlog.typing import EventDict

from models.logs import BY_TEXT
from models.settings import settings

_LONGEST: Final = 4_000
# Senders choose names: names must not control the terminal of a reader of the log, or look like another line.
_CONTROLS: Final = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def replace_formatters() -> None:
    """Replace the log formatters that Dramatiq's or periodiq's command line installed. Does nothing in other processes."""
    handlers = logging.getLogger().handlers
    for handler in handlers:
        if handler.formatter and handler.formatter._fmt == LOGFORMAT:  # noqa: SLF001 - how else it could be told
            handler.setFormatter(formatter())


def set_up(*loggers: str) -> None:
    """Log to stderr unless logging is already set up. Give the lines of `loggers` the same form."""
    logger = logging.getLogger("evalstore")
    if not logger.handlers and not logging.getLogger().handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
    for name in ("evalstore", *loggers):
        for handler in logging.getLogger(name).handlers:
            handler.setFormatter(formatter())


def formatter() -> logging.Formatter:
    """Return the formatter that EVALSTORE_LOG_FORMAT names.

    Under Dramatiq, `auto` chooses JSON, because workers write to a pipe instead of a terminal.
    """
    form = settings().log_format
    is_terminal = os.isatty(2)
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    processors: list[Any] = [_named, structlog.stdlib.add_log_level, structlog.stdlib.add_logger_name, stamp]
    if form == "text" or (form == "auto" and is_terminal):
        colours = is_terminal and not os.environ.get("NO_COLOR")
        # If rich is installed, it would print local variables, which hold keys, passwords and content.
        plain = structlog.dev.plain_traceback
        last: list[Any] = [_as_text, structlog.dev.ConsoleRenderer(colors=colours, exception_formatter=plain)]
    else:
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=True)]
    remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    return structlog.stdlib.ProcessorFormatter(foreign_pre_chain=processors, processors=[remove, *last], pass_foreign_args=True)


def _named(_logger: Any, _method: str, line: EventDict) -> EventDict:
    """Split a log record into its event, its fields, and its text as `message`."""
    record: logging.LogRecord = line["_record"]
    entry, given = BY_TEXT.get(str(record.msg)), line.pop("positional_args", ())
    text = _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), str(line["event"])[:_LONGEST])
    line["event"], line["message"] = entry.name if entry else "library", text
    if entry:
        line.update({name: _plain(value) for name, value in zip(entry.fields, given, strict=False)})
    line["pid"] = record.process
    return line


def _plain(value: object) -> object:
    return value if isinstance(value, int | float) else str(value)[:_LONGEST]


def _as_text(_logger: Any, _method: str, line: EventDict) -> EventDict:
    """Format a line for people. The text includes the fields."""
    shown = {name: line[name] for name in ("timestamp", "level", "logger", "exc_info") if name in line}
    return {"event": line["message"], **shown}
