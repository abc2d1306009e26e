"""The docstring of models/errors.py shows every public error, below its base class."""

import ast
import re
from pathlib import Path

from models import errors

ROOT = Path(__file__).parents[2]
PACKAGES = ("evalstore", "models", "tasks", "worker")


def defined() -> set[tuple[str, str]]:
    """Every public error below EvalstoreError, and its base class."""
    pairs = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.ClassDef) and node.bases:
                    pairs.add((node.name, ast.unparse(node.bases[0])))
    found = {"EvalstoreError"}
    while more := {name for name, base in pairs if base in found} - found:
        found |= more
    return {(name, base) for name, base in pairs if base in found and not name.startswith("_")}


def documented() -> set[tuple[str, str]]:
    """Every error of the trees in the docstring, and the error that it stands below."""
    pairs, path = set(), ["EvalstoreError"]
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"((?:│   |    )*)[├└]── (\w+)", line):
            depth = len(found[1]) // 4 + 1
            path[depth:] = [found[2]]
            pairs.add((found[2], path[depth - 1]))
    return pairs


def test_the_error_tree_shows_every_public_error_below_its_base_class() -> None:
    assert documented() == defined()
