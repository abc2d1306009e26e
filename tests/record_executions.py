"""Run small Python programs in processes of their own, and write their measurements to `executions.csv`.

The seed decides which programs run, on what, and in which order the rows stand. `python tests/record_executions.py` takes some
minutes. The rows are shuffled: a change of the machine's load meanwhile is a real one, and is spread over all of them.
"""

import csv
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

SEED: Final = 20261130
CASES: Final = {"normal": 10_000, "slow": 500, "failing": 500, "memory": 500}
FILE: Final = Path(__file__).with_name("executions.csv")
FIELDS: Final = ("case", "duration_ms", "memory_bytes", "output_bytes", "exit_code")

_PROGRAMS: Final = (
    "rows = sorted((i * 7919) % 10007 for i in range(n)); print(rows[:n // 200])",
    "found = [i for i in range(2, n // 8) if all(i % j for j in range(2, min(i, 12)))]; print(len(found), found[-3:])",
    (
        "words = {}\nfor i in range(n): words[str(i % 997)] = words.get(str(i % 997), 0) + 1\n"
        "print(words if n % 7 == 0 else len(words))"
    ),
    "text = ' '.join(map(str, range(n))); print(text.count('7'), text[:n // 50])",
)
_FAILS: Final = "\nraise SystemExit('wrong answer')"
_ALLOCATES: Final = "\nheld = bytearray({}); held[::4096] = b'x' * len(held[::4096])\n"


def _program(rng: random.Random, case: str) -> tuple[str, int]:
    """Return the code, and its `n`."""
    code, size = rng.choice(_PROGRAMS), int(20_000 * rng.lognormvariate(0, 0.4))
    held = int(16e6 * rng.lognormvariate(0, 0.25))
    if case == "memory" and rng.random() < 0.05:
        held *= 12
    failing = rng.random() < (0.35 if case == "failing" else 0.03)
    repeat = 12 if case == "slow" else 1
    body = f"for _ in range({repeat}):\n" + "\n".join(f"    {line}" for line in code.splitlines())
    body = body.replace("print(", "result = (")
    return f"n = {size}{_ALLOCATES.format(held)}{body}\nprint(*result) if isinstance(result, tuple) else print(result)" + (
        _FAILS if failing else ""
    ), size


def _measure(code: str) -> tuple[float, int, int, int]:
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    output = process.stdout.read()
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    elapsed_ms = (time.perf_counter() - started) * 1000
    return round(elapsed_ms, 2), usage.ru_maxrss * 1024, len(output), process.returncode


def main() -> None:
    rng = random.Random(SEED)  # noqa: S311 - the same programs each time
    wanted = [case for case, number in CASES.items() for _ in range(number)]
    rng.shuffle(wanted)
    measured = [(case, *_measure(_program(rng, case)[0])) for case in wanted]
    rng.shuffle(measured)
    with FILE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        writer.writerows(row for case in CASES for row in measured if row[0] == case)


if __name__ == "__main__":
    main()
