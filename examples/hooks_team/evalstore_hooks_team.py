"""A validator and an enricher of your own: refuse evaluations without a team, and add what an execution cost.

Copy this folder, and `pip install` it where workers and the HTTP service run. Both are called with each event before it is
stored, from any thread. They have two seconds for a batch of up to 2,000 events, so they look up nothing over a network.
"""

from collections.abc import Mapping
from typing import Any

from evalstore.hooks import Fault, InvalidEvent

CENTS_PER_SECOND = {"gpu": 0.2, "cpu": 0.01}


def require_team(event: Mapping[str, Any]) -> None:
    """Refuse a queued event without `metadata.team`. It becomes a dead letter; an HTTP client gets 422."""
    if event["type"] == "evaluation:queued" and not event.get("metadata", {}).get("team"):
        raise InvalidEvent([Fault("metadata.team", "required: the team that pays")])


def add_cost(event: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what becomes `enrichment.cents` of the record. None adds nothing."""
    if event.get("duration_ms") is None:
        return None
    pool = "gpu" if str(event.get("executor_id", "")).startswith("gpu") else "cpu"
    return {"cents": round(event["duration_ms"] / 1000 * CENTS_PER_SECOND[pool], 4), "pool": pool}
