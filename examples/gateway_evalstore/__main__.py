"""Enqueue the evaluation of a program from standard input, and print its ids for `evalstore audit`."""

import json
import os
import sys
import time
from datetime import UTC, datetime

import redis
from uuid_utils.compat import uuid7

from models.errors import InvalidEvent, Outage
from tasks import store_evaluation

TRIES = 5


def submit(code: str) -> dict[str, str]:
    """Send the event. Raises InvalidEvent (a caller's mistake: answer 400), Outage or RedisError (answer 503)."""
    event = {
        "type": "evaluation:queued",
        "eval_id": f"run-{uuid7()}",
        # Set the id here, so that each try below sends the same event, which is stored once.
        "event_id": str(uuid7()),
        "occurred_at": datetime.now(UTC).isoformat(),
        "code": code,
        "language": "python",
        "submitter": os.environ.get("USER", "nobody"),
    }
    for left in range(TRIES - 1, -1, -1):
        try:
            store_evaluation.send(event)
            break
        except (Outage, redis.RedisError):
            if left == 0:
                raise
            time.sleep(0.1 * 2 ** (TRIES - left))
    return {"eval_id": event["eval_id"], "event_id": event["event_id"]}


def main() -> int:
    try:
        print(json.dumps(submit(sys.stdin.read())))
    except InvalidEvent as error:
        for fault in error.faults:
            print(f"{fault.field}: {fault.problem}", file=sys.stderr)
        return 2
    except (Outage, redis.RedisError) as error:
        print(f"not sent: {error}", file=sys.stderr)
        return 7
    return 0


if __name__ == "__main__":
    sys.exit(main())
