"""A gateway with a `tasks` package of its own, which therefore sends with stock Dramatiq.

EVALSTORE_REDIS_URL=redis://… python examples/gateway_stock/main.py < program.py >> sent.jsonl

Takes a program on standard input, enqueues its evaluation, and prints what `evalstore audit` asks for.
"""

import json
import sys
import uuid
from datetime import UTC, datetime

from tasks.evaluations import store_evaluation

from tasks import greet  # this folder's own


def main() -> None:
    event = {
        "type": "evaluation:queued",
        "eval_id": f"run-{uuid.uuid4()}",
        "event_id": str(uuid.uuid4()),
        "occurred_at": datetime.now(UTC).isoformat(),
        "code": sys.stdin.read(),
        "language": "python",
        "submitter": greet("stock"),
    }
    store_evaluation.send(event)
    print(json.dumps({"eval_id": event["eval_id"], "event_id": event["event_id"]}))


if __name__ == "__main__":
    main()
