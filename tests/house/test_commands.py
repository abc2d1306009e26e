"""Every `evalstore …` that a page or a file of deploy/ shows exists, with its options, and what jobs and settings it names."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from evalstore.cli.app import application
from models.jobs import JOBS
from models.settings import Settings

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
RUNBOOK = ROOT / "docs/operations.md"
DEPLOY = [path for path in [ROOT / "docker-compose.yml", *sorted((ROOT / "deploy").rglob("*"))] if path.is_file()]
# Read by the command line itself.
BESIDE = {"EVALSTORE_ACTOR", "EVALSTORE_API_URL"}

_SHELL = re.compile(r"^ *```sh\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(?:evalstore) ([a-z][^`\n…]*)`")
_COMMAND = re.compile(r"(?:^|\||&&|\bexec) *(?:\.venv/bin/)?evalstore ([a-z].*?)(?=\||&&|$)")


def commands(text: str) -> list[str]:
    lines = [line.strip() for block in _SHELL.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    return [found for line in lines for found in _COMMAND.findall(line)] + _INLINE.findall(text)


def fault(command: str) -> str | None:
    """What is wrong with `evalstore COMMAND`."""
    node: Any = typer.main.get_command(application())
    words = shlex.split(command, comments=True)
    while words and hasattr(node, "commands") and not words[0].startswith("-"):
        found = node.commands.get(words.pop(0))
        if found is None:
            return f"evalstore {command}: there is no such command"
        node = found
    known = {option for parameter in node.params for option in [*parameter.opts, *parameter.secondary_opts]} | {"--help"}
    options = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
    unknown = [option for option in options if option not in known]
    if unknown:
        return f"evalstore {command}: no {', '.join(unknown)}"
    if node.name == "run" and words and not words[0].startswith("-") and words[0] not in {job.name for job in JOBS}:
        return f"evalstore {command}: there is no such job"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_shows_commands_that_exist(page: Path) -> None:
    assert [found for command in commands(page.read_text()) if (found := fault(command))] == []


def test_the_runbook_shows_commands_at_all() -> None:
    assert len(commands(RUNBOOK.read_text())) > 30


def test_a_command_that_is_not_there_is_found_out() -> None:
    assert fault("dlq ls --since 1h   # look") is None
    for wrong in ("dlq list", "dlq ls --sinse 1h", "cron run nothing", "statuss"):
        assert fault(wrong), wrong


def test_what_containers_are_started_with_and_asked_exists() -> None:
    text = "".join(path.read_text() for path in DEPLOY if path.name == "Dockerfile" or path.suffix in {".yml", ".yaml"})
    lists = [re.findall(r"[\w-]+", found) for found in re.findall(r"\[\W*evalstore\b([^\]]*)\]", text)]
    lists += [found.split() for found in re.findall(r"command: evalstore (.*)", text)]
    assert len(lists) >= 3
    assert [found for words in lists if (found := fault(" ".join(words)))] == []


@pytest.mark.parametrize("path", [*DEPLOY, RUNBOOK], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_runbook_and_the_files_of_the_deployment_name_settings_that_exist(path: Path) -> None:
    known = {f"EVALSTORE_{name.upper()}" for name in Settings.model_fields} | BESIDE
    assert set(re.findall(r"\bEVALSTORE_[A-Z0-9_]+", path.read_text())) - known == set()
