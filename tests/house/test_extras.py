"""Whoever lacks an extra is told which one in one line; and the command line loads no more than it is asked for."""

import os
import re
import resource
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer.main

from evalstore.cli.app import application
from evalstore.cli.commands import COMMANDS
from models.extras import EXTRAS, is_installed

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name in {names!r} or name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""
EVALSTORE = ("-c", "from evalstore.cli.entry import main; main()")
PERIODIQ = ("-c", "from periodiq import entrypoint; entrypoint()", "worker.tasks")
UVICORN = ("-m", "uvicorn", "evalstore.api.app:app")
TRACED = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions(extra: str) -> set[str]:
    """What an extra itself names."""
    names = (re.match(r"[\w.-]+", line) for line in PROJECT["optional-dependencies"][extra])
    return {normal(name[0]) for name in names if name} - {"evalstore"}


def packages(extra: str) -> set[str]:
    """The names that its distributions are imported by."""
    if extra == "otel":  # FastAPI also installs its top-level package.
        return {"opentelemetry.exporter", "opentelemetry.sdk"}
    wanted = distributions(extra)
    return {name for name, found in metadata.packages_distributions().items() if wanted & set(map(normal, found))}


def run(folder: Path, hidden: set[str], *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python where packages of these names are not installed."""
    (folder / "sitecustomize.py").write_text(BLOCK.format(names=hidden))
    given = {name: value for name, value in os.environ.items() if not name.startswith(("EVALSTORE_", "OTEL_"))}
    given |= {"PYTHONPATH": f"{folder}:{ROOT}", **environment}
    return subprocess.run(
        [sys.executable, *words], env=given, cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )


def test_the_table_of_extras_is_that_of_the_project() -> None:
    for extra, (modules, behind) in EXTRAS.items():
        if extra == "bigquery" and not is_installed(extra):
            continue  # make setup-integrations
        assert all(any(module.startswith(name) for name in packages(extra)) for module in modules), extra
        assert len(modules) == len(distributions(extra)), extra
        if behind:
            assert f"evalstore[{behind}]" in PROJECT["optional-dependencies"][extra]
        assert is_installed(extra)


@pytest.mark.parametrize(
    ("lacks", "words", "environment"),
    [
        ("worker", (*EVALSTORE, "--version"), {}),
        ("worker", (*EVALSTORE, "status"), {}),
        ("worker", ("-m", "dramatiq", "worker.tasks", "-p", "2", "-t", "1"), {}),
        ("worker", ("-c", "import worker.tasks"), {}),
        ("api", ("-m", "evalstore.api"), {}),
        ("api", UVICORN, {}),
        ("api", (*UVICORN, "--http", "evalstore.api.protocol:Protocol"), {}),
        ("local", (*EVALSTORE, "up"), {}),
        ("local", (*EVALSTORE, "demo"), {}),
        ("otel", ("-m", "dramatiq", "worker.tasks", "-p", "2", "-t", "1"), TRACED),
        ("otel", PERIODIQ, TRACED),
        ("otel", ("-m", "evalstore.api"), TRACED),
        ("otel", UVICORN, TRACED),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_a_process_without_its_extra_names_it_in_one_line_and_exits_2(
    lacks: str, words: tuple[str, ...], environment: dict[str, str], tmp_path: Path
) -> None:
    hidden = packages(lacks) - ({"uvicorn"} if "uvicorn" in words else set())
    done = run(tmp_path, hidden, *words, **environment)
    # Each process of a worker reports it. Lines of Dramatiq and periodiq begin with [time] [PID].
    ours = {line for line in done.stderr.splitlines() if "] [" not in line}
    assert ours == {f"evalstore needs the extra \"{lacks}\": pip install 'evalstore[{lacks}]'"}, done.stderr
    assert done.returncode == 2


def test_with_its_extra_alone_a_process_finds_nothing_missing(tmp_path: Path) -> None:
    others = packages("api") | packages("local") | packages("otel")
    assert run(tmp_path, others, *EVALSTORE, "--version").returncode == 0
    assert run(tmp_path, others, "-c", "import worker.tasks", EVALSTORE_METRICS_PORT="0").returncode == 0
    assert run(tmp_path, packages("local") | packages("otel"), "-c", "import evalstore.api.app").returncode == 0


def test_a_gateway_without_s3_is_told_which_extra_it_lacks(tmp_path: Path) -> None:
    opens = (
        "from models.settings import settings\n"
        "from evalstore.objects.object_store import open_store\n"
        "open_store('s3://bucket', settings())"
    )
    done = run(tmp_path, packages("s3"), "-c", opens)
    assert done.stderr.splitlines()[-1].endswith("evalstore needs the extra \"s3\": pip install 'evalstore[s3]'")


def test_what_pip_installs_without_extras_names_the_extra(tmp_path: Path) -> None:
    """With the project itself built and installed; what it depends on comes from here."""
    target = tmp_path / "site"
    pip: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        target,
    ]
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        pip = ["uv", "pip", "install", "-q", "--offline", "--no-deps", "--no-build-isolation", "--target", target]
        pip += ["--python", sys.executable]
    subprocess.run([*pip, ROOT], check=True, cwd=tmp_path)
    (tmp_path / "sitecustomize.py").write_text(BLOCK.format(names=packages("worker")))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{target}"}
    done = subprocess.run(
        [target / "bin/evalstore", "--version"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr == "evalstore needs the extra \"worker\": pip install 'evalstore[worker]'\n"
    assert done.returncode == 2


def test_the_table_of_commands_has_the_help_that_they_have() -> None:
    loaded: Any = typer.main.get_command(application())
    named: Any = typer.main.get_command(application(["--help"]))
    assert list(loaded.commands) == list(named.commands) == list(COMMANDS)
    for width in (45, 60, 80, 200):
        helps = [[one.commands[name].get_short_help_str(width) for name in COMMANDS] for one in (loaded, named)]
        assert helps[0] == helps[1]


@pytest.mark.parametrize("words", [("--version",), ("--help",), ()])
def test_what_needs_no_command_loads_none_and_takes_less_than_300_ms(words: tuple[str, ...]) -> None:
    shows = "import sys; from evalstore.cli.entry import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", shows, *words], capture_output=True, text=True, check=False, cwd=ROOT)
    loaded = set(done.stderr.split())
    assert "evalstore.cli.app" in loaded
    assert not loaded & {"sqlalchemy", "rich", "dramatiq", "redis", "alembic", *(f"ops.{name}" for name in ("up", "status"))}
    taken = []
    for _ in range(10):  # The machine may be busy, so take the best.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-c", "from evalstore.cli.entry import main; main()", *words],
            capture_output=True,
            check=False,
            cwd=ROOT,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        if taken[-1] < 0.3:
            return
    pytest.fail(f"the best of {len(taken)} took {min(taken) * 1000:.0f} ms")


@pytest.mark.parametrize(
    ("typed", "offered"), [("d", {"demo", "dlq"}), ("dlq re", {"redrive", "redrives"}), ("keys ", {"create", "list", "revoke"})]
)
def test_completion_offers_commands_and_their_verbs(typed: str, offered: set[str]) -> None:
    words = f"evalstore {typed}"
    given = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1), "_EVALSTORE_COMPLETE": "complete_bash"}
    program = "import sys; sys.argv = ['evalstore']; from evalstore.cli.entry import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **given}, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert set(done.stdout.split()) == offered, done.stderr
