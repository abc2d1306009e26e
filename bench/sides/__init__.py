"""The sides of the comparison: how workers start, and how a full queue is hidden from them until they are ready.

A side's module is imported only in its own processes. It has `fill(events)`, which enqueues events, and the workers' code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import redis


class Shape(NamedTuple):
    """The number of processes, and in each the number of threads, concurrent coroutines, or messages fetched together."""

    processes: int
    threads: int

    def __str__(self) -> str:
        return f"{self.processes}, {self.threads}"


@dataclass(frozen=True)
class Side:
    """How to run a side. `command` holds Python's arguments that start all workers of a shape, or one process if `each` is set.

    `stores` names the rows that the side writes. `rate` is an estimate in events/s for the size of the first round.
    """

    name: str
    letter: str
    title: str
    queue: str
    shapes: tuple[Shape, ...]
    command: Callable[[Shape], list[str]]
    rate: float
    stores: Literal["all", "events", "nothing"] = "all"
    each: bool = False
    is_peer: bool = False
    group: str | None = None

    def hold(self, client: redis.Redis) -> None:
        """Hide the enqueued messages from workers that are yet to start."""
        if self.group:
            try:
                client.xgroup_create(self.queue, self.group, id="$", mkstream=True)
            except redis.ResponseError:
                client.xgroup_setid(self.queue, self.group, id="$")
        else:
            client.rename(self.queue, f"held:{self.queue}")

    def release(self, client: redis.Redis) -> None:
        """Release all messages to the workers at once."""
        if self.group:
            client.xgroup_setid(self.queue, self.group, id="0")
            last: Any = client.xrevrange(self.queue, count=1)
            client.xadd(self.queue, last[0][1])  # Wakes the workers with a duplicate.
        else:
            client.rename(f"held:{self.queue}", self.queue)

    def waiting(self, client: redis.Redis) -> int:
        """Return how many messages no worker has taken yet. For the side that stores nothing, return unfinished messages."""
        if self.stores == "nothing":
            return client.hlen(f"{self.queue}.msgs")
        match client.type(self.queue):
            case b"list":
                return client.llen(self.queue)
            case b"zset":
                return client.zcard(self.queue)
            case b"stream":
                stream: Any = client.xinfo_stream(self.queue)
                groups: Any = client.xinfo_groups(self.queue)
                is_read = groups[0]["last-delivered-id"] == stream["last-generated-id"]
                return int(groups[0]["pending"]) + (not is_read)
        return 0


def _dramatiq(module: str) -> Callable[[Shape], list[str]]:
    return lambda shape: ["-m", "dramatiq", module, "--processes", str(shape.processes), "--threads", str(shape.threads)]


def _celery(shape: Shape) -> list[str]:
    options = ["--concurrency", str(shape.processes), "--without-gossip", "--without-mingle", "--without-heartbeat"]
    return ["-m", "celery", "-A", "bench.sides.celery", "worker", *options]


def _rq(shape: Shape) -> list[str]:
    return ["-m", "rq.cli", "worker-pool", "evaluations", "-n", str(shape.processes), "-w", "rq.worker.SimpleWorker"]


def _taskiq(shape: Shape) -> list[str]:
    options = ["--workers", str(shape.processes), "--max-async-tasks", str(shape.threads), "--log-level", "WARNING"]
    return ["-m", "taskiq", "worker", "bench.sides.taskiq:broker", *options]


def _module(*words: str) -> Callable[[Shape], list[str]]:
    return lambda _: ["-m", *words]


def _shapes(*pairs: tuple[int, int]) -> tuple[Shape, ...]:
    return tuple(Shape(*pair) for pair in pairs)


_EVALUATIONS: Final = "dramatiq:evaluations"
_CORES: Final = _shapes((2, 1), (4, 1))
_ASYNC: Final = _shapes((2, 10), (2, 50))

SIDES: Final = {
    side.name: side
    for side in [
        Side("evalstore", "a", "evalstore", _EVALUATIONS, _shapes((2, 2), (1, 2)), _dramatiq("worker.tasks"), 30_000),
        Side("stock", "b", "Dramatiq, storing", _EVALUATIONS, _shapes((2, 4), (2, 8)), _dramatiq("bench.sides.stock"), 900),
        Side(
            *("nothing", "c", "Dramatiq, doing nothing", _EVALUATIONS),
            *(_shapes((2, 8), (2, 2)), _dramatiq("bench.sides.nothing"), 4_000, "nothing"),
        ),
        Side("celery", "d", "Celery", "celery", _CORES, _celery, 600, is_peer=True),
        Side("rq", "e", "RQ", "rq:queue:evaluations", _CORES, _rq, 250, is_peer=True),
        Side(
            *("arq", "f", "arq", "arq:queue", _ASYNC, _module("arq", "bench.sides.arq.WorkerSettings"), 500),
            each=True,
            is_peer=True,
        ),
        Side("taskiq", "f", "taskiq", "taskiq", _ASYNC, _taskiq, 900, is_peer=True, group="taskiq"),
        Side(
            *("saq", "f", "SAQ", "saq:default:queued", _ASYNC, _module("saq", "bench.sides.saq.worker_settings"), 700),
            each=True,
            is_peer=True,
        ),
        Side(
            *("stream", "g", "a loop over a stream", "evaluations"),
            *(_shapes((2, 500), (2, 2000)), _module("bench.sides.stream"), 10_000, "events"),
            each=True,
            group="storage",
        ),
        Side("floor", "h", "the floor", _EVALUATIONS, _shapes((2, 1)), _module("bench.sides.floor"), 30_000, each=True),
    ]
}
