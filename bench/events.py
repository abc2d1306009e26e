"""Make the events that every side stores: three for each evaluation, each about 1.2 KB as JSON."""

import random
import string
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

PER_EVALUATION: Final = 3
_BEGIN: Final = datetime(2026, 1, 31, 9, 30, tzinfo=UTC)
_TEXT: Final = "".join(random.Random(1).choices(string.ascii_letters + string.digits + "    \n()[]=.,:", k=100_000))  # noqa: S311


def events(count: int, *, seed: int = 0, ordered: bool = False) -> Iterator[dict[str, Any]]:
    """Yield `count` events, evaluation after evaluation, as a gateway and an executor send them. Equal seeds give equal events.

    Ids of evaluations are random (UUIDv4), so neighbours in time are far apart in an index. With `ordered` the ids ascend, like
    UUIDv7.
    """
    chance = random.Random(seed)  # noqa: S311 - nothing secret
    for number in range(-(-count // PER_EVALUATION)):
        eval_id = f"{number:012x}{chance.getrandbits(80):020x}" if ordered else f"{chance.getrandbits(128):032x}"
        for position, event in enumerate(_three(eval_id, chance, _BEGIN + timedelta(milliseconds=number))):
            if number * PER_EVALUATION + position < count:
                yield event


def _three(eval_id: str, chance: random.Random, at: datetime) -> Iterator[dict[str, Any]]:
    executor = {"executor_id": f"executor-{chance.randrange(100)}", "container_id": f"{chance.getrandbits(256):064x}"}
    yield {
        "type": "evaluation:queued",
        **_named(eval_id, chance, at),
        "code": _text(chance, 940),
        "language": "python",
        "submitter": "benchmark",
    }
    yield {
        "type": "evaluation:started",
        **_named(eval_id, chance, at + timedelta(seconds=1)),
        **executor,
        "timeout_s": 30.0,
        "metadata": {"image": "python:3.13-slim", "command": _text(chance, 340), "environment": _text(chance, 360)},
    }
    yield {
        "type": "evaluation:completed",
        **_named(eval_id, chance, at + timedelta(seconds=3)),
        **executor,
        "exit_code": 0,
        "output": _text(chance, 780),
        "duration_ms": 1987.25,
        "memory_bytes": 48_234_496,
    }


def _named(eval_id: str, chance: random.Random, at: datetime) -> dict[str, Any]:
    event_id = UUID(int=chance.getrandbits(128), version=4)
    return {"eval_id": eval_id, "event_id": str(event_id), "occurred_at": at.isoformat().replace("+00:00", "Z"), "attempt": 1}


def _text(chance: random.Random, length: int) -> str:
    """Return text that compresses about as well as real text of that length."""
    start = chance.randrange(len(_TEXT) - length)
    return _TEXT[start : start + length]
