"""What a gateway pays for `from tasks import store_evaluation`."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import evalstore
from evalstore.client import StorageClient
from tasks import recording, store_evaluation, store_evaluations
from tasks.confirmations import Confirmations

IMPORT = """
import sys, time
before = time.process_time()
{}
print(time.process_time() - before)
print(*sys.modules)
"""
ROOT = Path(__file__).parents[2]
PACKAGES = ("evalstore", "models", "tasks", "worker")
# Pairs of modules that still import each other, with any others between them. Remove a pair once its circle is gone.
CIRCLES: set[tuple[str, str]] = set()
OURS = "from tasks import recording, store_evaluation, store_evaluations"


def imported(what: str = OURS) -> tuple[float, set[str]]:
    """How long importing that takes a clean interpreter, in seconds of its own, and the modules that are loaded then."""
    command = [sys.executable, "-I", "-c", IMPORT.format(what)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd="/")
    seconds, modules = done.stdout.splitlines()
    loaded = set(modules.split())
    return float(seconds), loaded | {name.partition(".")[0] for name in loaded}


def test_importing_tasks_loads_no_server_side_package() -> None:
    _, packages = imported()
    assert "tasks" in packages
    assert not packages & {
        "sqlalchemy",
        "psycopg",
        "alembic",
        "boto3",
        "botocore",
        "periodiq",
        "opentelemetry",
        "numpy",
        "rich",
        "typer",
        "evalstore.storage",
        "worker",
        "evalstore.cli",
    }


def test_importing_tasks_takes_less_than_200_ms() -> None:
    imported()  # Warm the file cache first.
    taken = []
    for _ in range(10):  # The machine may be busy, so take the best.
        taken.append(imported()[0])
        if taken[-1] < 0.2:
            return
    # Or a machine so slow that the imports of any Dramatiq gateway take most of the limit.
    others = min(imported("import dramatiq, pydantic")[0] for _ in range(10))
    assert others > 0.1, f"the best of {len(taken)} took {min(taken) * 1000:.0f} ms"
    assert min(taken) < 2 * others


def test_importing_evalstore_offers_each_public_name_and_loads_none_of_them() -> None:
    _, modules = imported("import evalstore")
    assert not modules & {"tasks", "models", "dramatiq", "httpx", "redis"}
    assert {name: getattr(evalstore, name) for name in evalstore.__all__} == {
        "Confirmations": Confirmations,
        "StorageClient": StorageClient,
        "recording": recording,
        "store_evaluation": store_evaluation,
        "store_evaluations": store_evaluations,
    }
    assert dir(evalstore) == evalstore.__all__
    with pytest.raises(AttributeError, match="no attribute 'store_event'"):
        evalstore.store_event  # noqa: B018


def test_sending_by_way_of_evalstore_loads_no_server_side_package() -> None:
    _, modules = imported("from evalstore import store_evaluation, store_evaluations")
    assert "tasks.actor" in modules
    assert not modules & {"sqlalchemy", "psycopg", "boto3", "httpx", "evalstore.storage", "evalstore.telemetry", "worker"}


def test_adapters_load_no_library_that_they_adapt() -> None:
    _, modules = imported("import tasks.middleware, tasks.celery_signals, evalstore.inspect_hooks")
    assert {"tasks.celery_signals", "evalstore.inspect_hooks"} <= modules
    assert not modules & {"celery", "inspect_ai", "redis", "boto3", "sqlalchemy", "psycopg"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def names_imported(path: Path) -> Iterator[str]:
    """Every name that a module imports, also inside functions, but not for type checkers alone."""
    waiting: list[ast.AST] = [ast.parse(path.read_bytes())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting += ast.iter_child_nodes(node)


def test_no_module_imports_in_circles() -> None:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    modules = {module_name(path) for path in paths}
    imports = {}
    for path in paths:
        own = module_name(path)
        names = {name if name in modules else name.rpartition(".")[0] for name in names_imported(path)}
        imports[own] = (names & modules) - {own}

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = imports[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reached = {name: reachable(name) for name in modules}
    circles = {(min(a, b), max(a, b)) for a in modules for b in imports[a] if a in reached[b]}
    assert circles == CIRCLES
