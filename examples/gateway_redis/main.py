"""A gateway that uses only a Redis client, as in any other language.

EVALSTORE_REDIS_URL=redis://… python examples/gateway_redis/main.py < program.py >> sent.jsonl

It enqueues the evaluation of a program from standard input, and prints its ids for `evalstore audit`.
"""

import json
import os
import sys
import time
import uuid
from datetime import UTC, datetime
from typing import Any

import redis


def enqueue(client: "redis.Redis", event: dict[str, Any]) -> None:
    """Enqueue `event` in Dramatiq's format, in one transaction, because workers ignore a message whose id is not queued."""
    redis_message_id = str(uuid.uuid4())
    message = {
        "queue_name": "evaluations",
        "actor_name": "store_evaluation",
        "args": [event],
        "kwargs": {},
        "options": {"redis_message_id": redis_message_id},
        "message_id": str(uuid.uuid4()),
        "message_timestamp": time.time_ns() // 1_000_000,
    }
    with client.pipeline(transaction=True) as transaction:
        transaction.hset("dramatiq:evaluations.msgs", redis_message_id, json.dumps(message))
        transaction.rpush("dramatiq:evaluations", redis_message_id)
        transaction.execute()


def main() -> None:
    event = {
        "type": "evaluation:queued",
        "eval_id": f"run-{uuid.uuid4()}",
        "event_id": str(uuid.uuid4()),
        "occurred_at": datetime.now(UTC).isoformat(),
        "code": sys.stdin.read(),
        "language": "python",
        "submitter": "gateway redis",
    }
    with redis.Redis.from_url(os.environ["EVALSTORE_REDIS_URL"]) as client:
        enqueue(client, event)
    print(json.dumps({"eval_id": event["eval_id"], "event_id": event["event_id"]}))


if __name__ == "__main__":
    main()
