"""The documentation is true: links lead somewhere, generated parts are fresh, and what it says to type does what it says."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGINT
from subprocess import PIPE, STDOUT
from typing import NamedTuple

import pytest

from evalstore.local import processes

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
DECISIONS = sorted((DOCS / "decisions").glob("*.md"))

_STATUS = re.compile(r"^Status: (accepted|superseded by \[\d{4}\]\(\d{4}-[\w-]+\.md\))(?:; .+)?$", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)")
_PATH = re.compile(r"`((?:evalstore|models|tasks|worker|tests|docs|examples|deploy|bench)/[\w./-]+)`")
_BLOCK = re.compile(r"(?:<!-- ([^>]*) -->\n)?```(\w+)\n(.*?)```\n", re.DOTALL)


class Step(NamedTuple):
    """Shell commands, what they print (`…` stands for anything), and what a comment above says of them."""

    commands: str
    prints: str | None
    note: str


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_path_leads_to_a_file(page: Path) -> None:
    text = page.read_text()
    links = [page.parent / link for link in _LINK.findall(text)]
    paths = [ROOT / path for path in _PATH.findall(text)]
    assert [str(target) for target in [*links, *paths] if not target.exists()] == []


def test_the_index_leads_to_every_page() -> None:
    index = DOCS / "index.md"
    linked = {(DOCS / link).resolve() for link in _LINK.findall(index.read_text())}
    assert {page.resolve() for page in DOCS.rglob("*.md")} - linked == {index}


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)
def test_a_decision_says_why_what_and_which_test_guards_it(page: Path) -> None:
    text = page.read_text()
    assert text.startswith(f"# {page.name[:4]} ")
    assert re.findall(r"^\*\*([\w ]+?)\.?\*\*", text, re.MULTILINE) == ["Context", "Decision", "Consequence", "Guarded by"]
    assert re.search(r"^\*\*Guarded by\*\* `tests/", text, re.MULTILINE)
    assert 10 <= len(text.splitlines()) <= 24


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)
def test_a_decision_has_a_status_that_the_index_repeats(page: Path) -> None:
    text = page.read_text()
    found = _STATUS.search(text)
    assert found, "Status: accepted, or superseded by [NNNN](NNNN-name.md)"
    title, status = text.partition("\n")[0].removeprefix("# "), found[0].removeprefix("Status: ")
    line = f"| [{title}](decisions/{page.name}) | {status.replace('](', '](decisions/')} |"
    assert line in (DOCS / "index.md").read_text().splitlines()


def test_what_is_made_from_the_code_is_fresh() -> None:
    done = subprocess.run([sys.executable, DOCS / "generate.py", "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_types_of_the_typescript_client_are_those_of_the_document() -> None:
    generate = ROOT / "clients" / "typescript" / "generate.py"
    done = subprocess.run([sys.executable, generate, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    steps = _steps((DOCS / "tutorial.md").read_text())
    install, start, *rest = steps
    assert install.note.startswith("not run")
    assert start.note == "runs on in the background"
    # The first step of the page sets these in a terminal.
    env = _environment() | {"PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"}
    with _running(start.commands, tmp_path, env):
        for step in rest:
            _perform(step, tmp_path, env)
    assert len(rest) >= 8


def test_the_readme_stores_what_it_sends(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    start, *rest = _steps(readme.partition("## Send an event")[2].partition("\n## ")[0])
    setup, _, up = start.commands.partition("\n")
    assert setup == "make setup"
    (tmp_path / ".venv").symlink_to(sys.prefix)
    env = _environment()
    with _running(up, tmp_path, env):
        for step in rest:
            _perform(step, tmp_path, env)
    assert len(rest) == 2


def test_a_page_that_shows_something_else_is_found_out(tmp_path: Path) -> None:
    _perform(Step("echo one; echo two", "one\n…\n", ""), tmp_path, _environment())
    with pytest.raises(AssertionError):
        _perform(Step("echo one; echo two", "one\n", ""), tmp_path, _environment(), patience_s=0)
    with pytest.raises(AssertionError):
        _perform(Step("echo one; false", "one\n", ""), tmp_path, _environment(), patience_s=0)


def _steps(text: str) -> list[Step]:
    steps: list[Step] = []
    for note, language, body in _BLOCK.findall(text):
        if language == "sh":
            steps.append(Step(body, None, note))
        elif language == "text":
            steps[-1] = steps[-1]._replace(prints=body)
    return steps


def _environment() -> dict[str, str]:
    """As in a new terminal: no settings, and a width of its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("EVALSTORE_") and name != "COLUMNS"}


@contextlib.contextmanager
def _running(command: str, folder: Path, env: dict[str, str]) -> Iterator[None]:
    """`evalstore up`, until Ctrl-C."""
    with (folder / "up.log").open("wb") as log:
        started = processes.start(
            ["bash", "-c", f"exec {command}"], mark=folder, output=log, stop_signal=SIGINT, grace_s=60, cwd=folder, env=env
        )
        try:
            is_ready = (folder / ".evalstore/environment").exists
            _until(lambda: is_ready() or started.poll() is not None, within_s=60)
            assert is_ready(), (folder / "up.log").read_text()
            yield
        finally:
            started.terminate()
            status = started.wait()
    assert status == 0, (folder / "up.log").read_text()


def _perform(step: Step, folder: Path, env: dict[str, str], *, patience_s: float = 30) -> None:
    """Type it, and again until it prints what the page shows: storing takes a moment, and repeating harms nothing."""
    shown = ""

    def is_as_shown() -> bool:
        nonlocal shown
        done = subprocess.run(
            ["bash", "-ec", step.commands], cwd=folder, env=env, stdout=PIPE, stderr=STDOUT, text=True, timeout=60, check=False
        )
        shown = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
        anything = ".*".join(map(re.escape, (step.prints or "…").strip().split("…")))
        return done.returncode == 0 and re.fullmatch(anything, shown, re.DOTALL) is not None

    assert _until(is_as_shown, within_s=patience_s), f"{step.commands}\nshould print\n{step.prints}\nand prints\n{shown}"


def _until(is_so: Callable[[], bool], *, within_s: float) -> bool:
    """True as soon as it is so, False when the time is up."""
    give_up = time.monotonic() + within_s
    while not is_so():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.1)
    return True
