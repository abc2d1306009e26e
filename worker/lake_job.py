"""The lake's maintenance, in a process of its own: a worker loads none of the lake's libraries."""

import subprocess
import sys
from typing import Any, Final

import msgspec

from evalstore.lake.errors import LakeOutage
from models.extras import how_to_install, is_installed
from models.settings import Settings
from worker.metrics import WorkerMetrics

_LONGEST_S: Final = 3000.0


def maintain(settings: Settings, metrics: WorkerMetrics) -> dict[str, Any]:
    """Run `evalstore lake maintain`; returns what it did. Raises LakeOutage with its last line where it fails."""
    if settings.lake_url is None:
        return {"lake": "not set up"}
    if not is_installed("lake"):
        return {"lake": how_to_install("lake")}
    metrics.counters.set_deadline(_LONGEST_S + 60)
    command = [sys.executable, "-m", "evalstore.cli.app", "lake", "maintain", "-o", "json"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_LONGEST_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise LakeOutage(f"the maintenance took longer than {_LONGEST_S:.0f} s; the next run goes on") from None
    if done.returncode:
        raise LakeOutage((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    result: dict[str, Any] = msgspec.json.decode(done.stdout)
    return result
