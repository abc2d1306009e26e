"""A gateway that has its own package `tasks`, and therefore sends with stock Dramatiq.

EVALSTORE_REDIS_URL=redis://… python examples/gateway_stock/main.py < program.py >> sent.jsonl

It enqueues the evaluation of a program from standard input, and prints its ids for `evalstore audit`.
"""

import json
import sys
import uuid
from datetime import UTC, datetime

from tasks.evaluations import store_evaluation

from tasks import greet  # the package in this folder


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
