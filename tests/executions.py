"""Executions that `record_executions.py` measured: real Python programs, some of them slow, failing or greedy on purpose."""

import csv
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

DIMENSIONS = ("language", "submitter", "executor")
_FILE = Path(__file__).with_name("executions.csv")


class Execution(NamedTuple):
    """An execution: fields of its `completed` event, and the size of its output."""

    fields: dict[str, Any]
    output_bytes: int

    @staticmethod
    def groups(number: int) -> dict[str, str]:
        """The groups that an execution of this number is said to be in."""
        return {"language": "python", "submitter": f"submitter-{number % 4}", "executor": f"executor-{number % 3}"}


@cache
def _recorded() -> dict[str, list[Execution]]:
    found: dict[str, list[Execution]] = {}
    with _FILE.open(newline="") as file:
        for row in csv.DictReader(file):
            fields = {
                "duration_ms": float(row["duration_ms"]),
                "memory_bytes": int(row["memory_bytes"]),
                "exit_code": int(row["exit_code"]),
            }
            found.setdefault(row["case"], []).append(Execution(fields, int(row["output_bytes"])))
    return found


def executions(case: str) -> list[Execution]:
    """All executions of a case: normal, slow, failing, memory."""
    return _recorded()[case]


def planted(case: str, before: int) -> list[Execution]:
    """So many normal executions, and then 500 of a case."""
    return [*executions("normal")[:before], *executions(case)]
