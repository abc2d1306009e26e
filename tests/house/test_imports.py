"""What a gateway pays for `from tasks import store_evaluation`."""

import subprocess
import sys

IMPORT = """
import sys, time
before = time.process_time()
{}
print(time.process_time() - before)
print(*sys.modules)
"""
OURS = "from tasks import store_evaluation, store_evaluations"


def imported(what: str = OURS) -> tuple[float, set[str]]:
    """How long importing that takes a clean interpreter, in seconds of its own, and the packages that are loaded then."""
    command = [sys.executable, "-I", "-c", IMPORT.format(what)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd="/")
    seconds, modules = done.stdout.splitlines()
    return float(seconds), {name.partition(".")[0] for name in modules.split()}


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
        "rich",
        "typer",
        "storage",
        "worker",
        "ops",
    }


def test_importing_tasks_takes_less_than_200_ms() -> None:
    imported()  # so that the next are warm
    taken = []
    for _ in range(10):  # the machine may be busy: the best counts
        taken.append(imported()[0])
        if taken[-1] < 0.2:
            return
    # Or it is so slow that what any Dramatiq gateway imports takes most of that.
    others = min(imported("import dramatiq, pydantic")[0] for _ in range(10))
    assert others > 0.1, f"the best of {len(taken)} took {min(taken) * 1000:.0f} ms"
    assert min(taken) < 2 * others
