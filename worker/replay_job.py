"""Replay records in the background, in turns that leave the worker's thread to events in between."""

import time
from typing import Final
from uuid import NAMESPACE_URL, UUID, uuid5

import dramatiq
from dramatiq import Retry
from sqlalchemy import Connection

from evalstore.storage import dead_letters, replay_jobs
from evalstore.storage.dead_letters import Selection
from models.errors import PASSING
from models.jobs import QUEUE
from tasks.broker import SendingBroker
from tasks.replays import ACTOR, ask, job_id
from worker.archive_jobs import STEP_S, Progress
from worker.in_flight import InFlight
from worker.time_budget import time_budget
from worker.verified_database import VerifiedDatabase

_TURN_S: Final = 0.5


def declare(broker: SendingBroker, connections: VerifiedDatabase, in_flight: InFlight, progress: Progress) -> None:
    """Declare the actor that works through a range. It raises Retry until the range ends, without limit."""

    @dramatiq.actor(broker=broker, queue_name=QUEUE, actor_name=ACTOR, retry_when=_has_more, throws=PASSING)
    def replay_evaluations(replay_id: str, number: int) -> None:
        progress.begin()
        work_on(connections, in_flight, progress, UUID(replay_id), number)


def _has_more(_tries: int, error: BaseException) -> bool:
    return isinstance(error, Retry)


def work_on(connections: VerifiedDatabase, in_flight: InFlight, progress: Progress, replay_id: UUID, number: int) -> None:
    """Work on a range for one turn.

    Raises Retry while records remain, Outage (retry). Any other error ends the replay with that reason.
    """
    began = time.monotonic()
    try:
        with connections.connect(STEP_S) as conn:
            wait_s = _turn(conn, in_flight, progress, replay_id, number)
    except PASSING:
        raise
    except Exception as error:
        with connections.connect(STEP_S) as conn:
            replay_jobs.end(conn, replay_id, "failed", f"{type(error).__name__}: {error}"[:1000])
        raise
    if wait_s is not None:
        # The pause equals the turn: events get half of a thread's time at least.
        raise Retry(delay=int(max(wait_s, time.monotonic() - began) * 1000))


def _turn(conn: Connection, in_flight: InFlight, progress: Progress, replay_id: UUID, number: int) -> float | None:
    goes_on = time_budget(_TURN_S)
    while True:
        wait_s = replay_jobs.step(conn, replay_id, number, progress.step)
        if wait_s is None or wait_s > 0 or not goes_on() or in_flight.stopping:
            return wait_s


def run_once(conn: Connection, broker: SendingBroker) -> dict[str, int]:
    """Ask again for the jobs of running replays: a job may be lost with Redis. Return the number of ranges left.

    A replay whose job is a dead letter ends as failed. Raises DatabaseOutage, RedisOutage (retry).
    """
    unfinished = replay_jobs.unfinished(conn)
    for replay_id, number in unfinished:
        letter = uuid5(NAMESPACE_URL, f"evalstore:dead:{QUEUE}:{job_id(replay_id, number).encode().hex()}")
        if dead_letters.count_of(conn, Selection(states=("dead",), ids=(letter,))):
            replay_jobs.end(conn, replay_id, "failed", f"a job is a dead letter: {letter}")
        else:
            ask(broker, replay_id, number)
    return {"ranges": len(unfinished)}
