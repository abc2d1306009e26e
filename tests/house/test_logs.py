"""What is logged is on the list, and looks as its reader needs it."""

import ast
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest

from evalstore.telemetry import log_setup
from models.logs import BY_NAME, BY_TEXT, LOGS
from models.settings import settings

ROOT = Path(__file__).parents[2]
LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}
ROOMS = ("evalstore", "models", "tasks", "worker")
# In a sender's program: it has its own logging, so these are plain texts.
SENDERS = {"tasks/spool.py"}


def calls() -> Iterator[tuple[str, str, Any, list[str | None]]]:
    """Every call of a logger: where, its level, its event, and the names of its fields."""
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or name in SENDERS:
                    continue
                owner = node.func.value
                if isinstance(owner, ast.Name) and owner.id in {"log", "logger"} and node.func.attr in LEVELS:
                    event = node.args[0].value if len(node.args) == 1 and isinstance(node.args[0], ast.Constant) else None
                    fields = [keyword.arg for keyword in node.keywords if keyword.arg != "exc_info"]
                    yield f"{name}:{node.lineno}", node.func.attr, event, fields


def test_every_line_that_is_logged_is_on_the_list_and_none_is_there_for_nothing() -> None:
    found = list(calls())
    assert [where for where, _, event, _ in found if event not in BY_NAME] == []
    assert set(BY_NAME) - {event for _, _, event, _ in found} == set()
    wrong = [
        where for where, level, event, fields in found if BY_NAME[event].level != level or fields != list(BY_NAME[event].fields)
    ]
    assert wrong == []


def test_the_list_names_each_value_once() -> None:
    assert len({entry.name for entry in LOGS}) == len(LOGS) == len(BY_TEXT)
    for entry in LOGS:
        assert len(re.findall(r"%(?:\.\d+)?[a-z]", entry.text.replace("%%", ""))) == len(entry.fields), entry.name


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[logging.Logger, io.StringIO]]:
    settings.cache_clear()
    stream = io.StringIO()
    logger, handler = logging.getLogger("evalstore.test"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    yield logger, stream
    logger.removeHandler(handler)
    settings.cache_clear()


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_line_is_json_for_machines_and_text_for_people(
    log: tuple[logging.Logger, io.StringIO], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, stream = log
    monkeypatch.setenv("EVALSTORE_LOG_FORMAT", form)
    logger.handlers[0].setFormatter(log_setup.formatter())

    entry = next(entry for entry in LOGS if entry.name == "dead_letter")
    logger.warning(entry.text, "InvalidEvent", "e\x1b[31m\r\nfake", "id", "evaluation:queued")
    key = token_hex(4)
    try:
        int("no" if key else "")
    except ValueError:
        logger.exception("not on the list")

    shown = stream.getvalue()
    assert key not in shown  # Variables are never shown: some hold secrets or content.
    assert "\x1b[31m" not in shown
    if form == "text":
        assert "dead letter: InvalidEvent, eval_id e\\x1b[31m\\r" in shown
        assert "ValueError: invalid" in shown
        return
    first, second = map(json.loads, shown.splitlines())
    assert (first["event"], first["level"], first["logger"]) == ("dead_letter", "warning", "evalstore.test")
    assert (first["error_class"], first["event_id"], first["type"]) == ("InvalidEvent", "id", "evaluation:queued")
    assert first["message"].startswith("dead letter: InvalidEvent, eval_id e\\x1b")
    assert (second["event"], second["message"]) == ("library", "not on the list")
    assert "ValueError: invalid" in second["exception"]
