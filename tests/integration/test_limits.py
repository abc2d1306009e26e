"""Settings at their upper limits are no fault: sender, worker, scheduler and service work with them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.settings import Settings
from tests.chaos.relay import ROOT
from tests.chaos.world import Workers

_SEND = """
from tasks import store_evaluation
store_evaluation.send({"type": "evaluation:queued", "eval_id": "e", "code": "c" * 100_000})
"""


def at_the_limits() -> dict[str, str]:
    """Every number at its upper limit but ports."""
    found = {}
    for name, field in Settings.model_fields.items():
        limits = [limit.le for limit in field.metadata if hasattr(limit, "le")]
        if limits and not name.endswith("_port"):
            found[f"EVALSTORE_{name.upper()}"] = f"{limits[0]:.0f}"
    return found


def test_everything_works_with_all_numbers_at_their_upper_limits(
    start_api: Callable[..., Any], database_url: str, redis_url: str, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    given = {
        **at_the_limits(),
        "EVALSTORE_DATABASE_URL": database_url,
        "EVALSTORE_REDIS_URL": redis_url,
        "EVALSTORE_OBJECT_STORE_URL": (tmp_path / "objects").as_uri(),
        "EVALSTORE_ARCHIVE_URL": (tmp_path / "archive").as_uri(),
        "EVALSTORE_SPOOL_DIR": str(tmp_path / "spool"),
    }
    workers = Workers(tmp_path, given, "worker.tasks", 1, 2)
    workers.start()
    try:
        subprocess.run([sys.executable, "-c", _SEND], env={**os.environ, **given}, cwd=ROOT, check=True)
        api = start_api(**given)
        eventually(lambda: api.both.get("/storage/evaluations/e").status_code == 200, within_s=30, what="the record")
        for job in ("mark_lost_evaluations", "archive_large_outputs", "sweep_objects"):
            command = [sys.executable, "-m", "evalstore.cli.app", "cron", "run", job]
            done = subprocess.run(
                command, env={**os.environ, **given}, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
            )
            assert done.returncode == 0, done.stderr
    finally:
        workers.stop()
    assert "Traceback" not in workers.log.read_text()
