"""Sending dead letters again, as an operator asked: paced, carefully at first, and whoever dies meanwhile, each once."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Final
from uuid import NAMESPACE_URL, UUID, uuid5

import dramatiq
import redis
from dramatiq import Message, Retry
from sqlalchemy import Connection, Engine

from evalstore.storage import dead_letters, event_store, redrives
from evalstore.storage.dead_letters import Selection
from evalstore.storage.redrives import DeadLetterRef, Sent
from models.errors import PASSING, EvalstoreError, InvalidEvent, Outage, RedisOutage
from models.jobs import QUEUE
from models.logs import EventLogger
from tasks.actor import store_evaluation
from tasks.broker import encode
from tasks.redrives import ACTOR, REDRIVEN, ask, job_id
from worker.batches import read
from worker.broker import Broker, time_budget
from worker.dead_letter_mover import record_stored
from worker.handler import read_message

log = EventLogger("evalstore.worker")

_SHORT_S: Final = 0.2
_QUESTIONABLE_S: Final = 10.0
_LONGEST_S: Final = 20.0
_CHUNK: Final = 500
# What an earlier life left in the message: with it, the first failure of the new one would be the last.
_OLD_OPTIONS: Final = frozenset({"retries", "traceback", "requeue_timestamp", "eta"})


def declare(broker: Broker, engine: Callable[[], Engine]) -> None:
    """Declare the actor that works on redrives, and note what comes of redriven messages that no batch holds."""
    broker.add_middleware(_Outcomes(engine))

    # Never a dead letter by the count: it ends when the redrive does, and until then asks to come again as often as it takes.
    # What it `throws` is told without a traceback, as it may be for every few seconds of an outage.
    @dramatiq.actor(broker=broker, queue_name=QUEUE, actor_name=ACTOR, retry_when=_asked, throws=PASSING)
    def redrive_dead_letters(redrive_id: str) -> None:
        work_on(engine(), broker, UUID(redrive_id))


def _asked(_tries: int, error: BaseException) -> bool:
    return isinstance(error, Retry)


class _Outcomes(dramatiq.Middleware):
    def __init__(self, engine: Callable[[], Engine]) -> None:
        self._engine = engine

    def after_process_message(
        self,
        broker: Any,
        message: Any,
        *,
        result: Any = None,  # noqa: ARG002 - Dramatiq's signature
        exception: BaseException | None = None,
    ) -> None:
        redis_id = str(message.options.get("redis_message_id", "")).encode(errors="replace")
        if exception is None and redis_id.startswith(REDRIVEN):
            record_stored(self._engine(), [redis_id], broker.watch)


def work_on(engine: Engine, broker: Broker, redrive_id: UUID) -> None:
    """Send as many letters of a redrive as its pace and this turn allow.

    Raises Retry while there is something left to do, Outage (retry). What else goes wrong ends the redrive: its other letters
    are dead again, and the reason is with it.
    """
    try:
        with engine.connect() as conn, broker.watch.bounded(conn, _LONGEST_S):
            wait_s = _turn(conn, broker, redrive_id)
    except Outage:
        raise
    except Exception as error:
        with engine.connect() as conn:
            redrives.end(conn, redrive_id, "failed", f"{type(error).__name__}: {error}"[:1000])
        raise
    if wait_s is not None:
        raise Retry(delay=int(wait_s * 1000))


def _turn(conn: Connection, broker: Broker, redrive_id: UUID) -> float | None:
    """Send for a while; returns in how many seconds to go on, or None where nothing is left to send."""
    goes_on = time_budget()
    while True:
        wait_s = redrives.step(conn, redrive_id, lambda letters: send(broker, letters)).wait_s
        if wait_s is None or wait_s > _SHORT_S or not goes_on() or broker.in_flight.stopping:
            return wait_s
        broker.in_flight.sleep_unless_stopping(wait_s)


def send(broker: Broker, letters: Sequence[DeadLetterRef]) -> None:
    """Put letters in their queues, each under an id of its own, so that it is there once. Raises RedisOutage (retry)."""
    by_queue: dict[str, list[bytes]] = {}
    for letter in letters:
        by_queue.setdefault(letter.queue, []).extend([redis_id_of(letter.id), _renewed(letter.message)])
    try:
        for queue, arguments in by_queue.items():
            keys = broker.keys(queue)
            broker.run("redrive", [keys.queue, keys.bodies, keys.dead_bodies], *arguments)
    except redis.RedisError as error:
        raise RedisOutage(str(error)) from error


def redis_id_of(letter_id: UUID) -> bytes:
    """The id under which a letter is in Redis."""
    return REDRIVEN + str(letter_id).encode()


def _renewed(body: bytes) -> bytes:
    """The message as received, but for what Dramatiq noted in it when it failed."""
    try:
        message = read(body)
    except InvalidEvent:
        return body
    options = {name: value for name, value in message.options.items() if name not in _OLD_OPTIONS}
    return body if options == message.options else encode(Message(**message.asdict() | {"options": options}))


def sweep(conn: Connection, broker: Broker) -> dict[str, int]:
    """Settle what nobody else did: jobs that were lost are asked for again, and so are messages that left Redis unnoticed.

    Returns how many redrives were asked for, and how many letters turned out stored, and dead.
    Raises DatabaseOutage, RedisOutage (retry).
    """
    asked = 0
    for redrive_id in redrives.unsent(conn):
        job_letter = uuid5(NAMESPACE_URL, f"evalstore:dead:{QUEUE}:{job_id(redrive_id).encode().hex()}")
        if dead_letters.count_of(conn, Selection(states=("dead",), ids=(job_letter,))):
            redrives.end(conn, redrive_id, "failed", f"its job is a dead letter: {job_letter}")
        else:
            ask(broker, redrive_id)
            asked += 1
    stored = dead = 0
    after = UUID(int=0)
    while found := redrives.in_question(conn, after=after, older_than_s=_QUESTIONABLE_S, limit=_CHUNK):
        after = found[-1].id
        gone = _gone(broker, found)
        done = {letter_id for letter_id in gone if _is_stored(conn, letter_id)}
        redrives.stored(conn, sorted(done))
        stored += len(done)
        dead += redrives.lost(conn, {letter_id: sent_at for letter_id, sent_at in gone.items() if letter_id not in done})
    if dead:
        log.error("redriven_lost", count=dead)
    return {"redrives": asked, "stored": stored, "dead": dead}


def _gone(broker: Broker, letters: Sequence[Sent]) -> dict[UUID, datetime]:
    """Those that Redis does not hold, at one moment; what came of them was written before they left."""
    try:
        with broker.client.pipeline(transaction=True) as pipeline:
            for letter in letters:
                keys, redis_id = broker.keys(letter.queue), redis_id_of(letter.id)
                pipeline.hexists(keys.bodies, redis_id)
                pipeline.hexists(keys.dead_bodies, redis_id)
            held = pipeline.execute()
    except redis.RedisError as error:
        raise RedisOutage(str(error)) from error
    return {letter.id: letter.sent_at for at, letter in enumerate(letters) if not held[2 * at] and not held[2 * at + 1]}


def _is_stored(conn: Connection, letter_id: UUID) -> bool:
    """Whether the event that a letter carries is in the log: that very event, not another one under its id."""
    letter = dead_letters.get(conn, letter_id)
    if letter is None or letter["actor"] != store_evaluation.actor_name:
        return False
    key = letter["eval_id"], letter["event_id"]
    if None in key or not event_store.applied(conn, [key]):
        return False
    try:
        event = read_message(letter["message"])
    except EvalstoreError:
        return False
    # Storing what is stored changes nothing, and tells whether it is the same.
    return event_store.store(conn, [event]).outcomes[0] != "reused"
