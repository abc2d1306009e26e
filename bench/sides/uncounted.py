"""evalstore without counters, heartbeats and log lines, to measure their cost: `dramatiq bench.sides.uncounted`."""

import logging
from typing import Any

from evalstore.telemetry.counters import Counters
from worker.metrics import WorkerMetrics


def _nothing(*_given: Any, **_more: Any) -> None:
    pass


for _owner, _names in (
    (Counters, ("add", "set", "observe", "observe_all", "set_deadline", "watch_thread")),
    (WorkerMetrics, ("stored", "buried", "lost")),
):
    for _name in _names:
        setattr(_owner, _name, _nothing)
logging.disable(logging.ERROR)

from worker import tasks  # noqa: E402

broker = tasks.broker
