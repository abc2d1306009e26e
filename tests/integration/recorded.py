"""The events that recordings sent, read from Redis."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import redis

ROOT = Path(__file__).parents[2]
QUEUE, BODIES = "dramatiq:evaluations", "dramatiq:evaluations.msgs"
Json = dict[str, Any]


def sent(redis_url: str, eval_id: str | None = None) -> list[Json]:
    """Return the events in the order of the queue, or those of one evaluation."""
    with redis.Redis.from_url(redis_url) as client:
        bodies: Any = client.hmget(BODIES, [*client.lrange(QUEUE, 0, -1), b"none"])
    events = [json.loads(body)["args"][0] for body in bodies if body]
    return [event for event in events if eval_id in (None, event["eval_id"])]


def types(events: list[Json]) -> list[str]:
    """Return the types without their prefix, with the attempts above 1."""
    return [event["type"].removeprefix("evaluation:") + f" {event['attempt']}" * (event["attempt"] > 1) for event in events]


def start(script: str, redis_url: str, **environment: str) -> subprocess.Popen[str]:
    """Start a Python program that sends to this Redis."""
    given = {**os.environ, "EVALSTORE_REDIS_URL": redis_url, "PYTHONPATH": str(ROOT), **environment}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", script]
    return subprocess.Popen(command, env=given, text=True, cwd="/", stdin=pipe, stdout=pipe, stderr=pipe)


def run(script: str, redis_url: str, **environment: str) -> tuple[int, str, str]:
    """Run a Python program. Return its exit status, output and errors."""
    with start(script, redis_url, **environment) as process:
        output, error = process.communicate(timeout=60)
    return process.returncode, output, error
