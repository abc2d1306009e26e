"""evalstore's worker without confirmations, to see what they cost: nothing is written to the outbox, and nothing relayed."""

from typing import Any

import worker.tasks
from storage import evaluations
from worker import confirmations

vars(evaluations)["_confirmations"] = lambda *_: list[dict[str, Any]]()
vars(confirmations)["relay"] = lambda *_: 0
broker = worker.tasks.broker
