"""Send dead letters again at the pace that an operator chose. Each is sent once, even if processes die."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Final
from uuid import NAMESPACE_URL, UUID, uuid5

import dramatiq
import redis
from dramatiq import Message, Retry
from sqlalchemy import Connection

from evalstore.storage import dead_letters, event_store, redrives
from evalstore.storage.dead_letters import Selection
from evalstore.storage.redrives import SINK_QUEUES, DeadLetterRef, Sent
from models.errors import PASSING, EvalstoreError, InvalidEvent, RedisOutage
from models.jobs import QUEUE
from models.logs import EventLogger
from tasks.actor import store_evaluation
from tasks.broker import SendingBroker, encode
from tasks.redrives import ACTOR, REDRIVEN, ask, job_id
from worker.dead_letter_mover import record_stored
from worker.in_flight import InFlight
from worker.messages import read_envelope, read_message
from worker.scripts import Scripts
from worker.time_budget import time_budget
from worker.verified_database import VerifiedDatabase

log = EventLogger("evalstore.worker")

_SHORT_S: Final = 0.2
_QUESTIONABLE_S: Final = 10.0
_LONGEST_S: Final = 20.0
_CHUNK: Final = 500
# Dramatiq's counts of earlier attempts. If they stayed, the first failure would be the last.
_OLD_OPTIONS: Final = frozenset({"retries", "traceback", "requeue_timestamp", "eta"})


def declare(broker: SendingBroker, connections: VerifiedDatabase, scripts: Scripts, in_flight: InFlight) -> None:
    """Declare the redrive actor, and a middleware that records the outcome of redriven messages without a batch."""
    broker.add_middleware(_Outcomes(connections))

    # The actor raises Retry until the redrive ends. It may retry without limit. With `throws`, Dramatiq logs outages without a
    # traceback.
    @dramatiq.actor(broker=broker, queue_name=QUEUE, actor_name=ACTOR, retry_when=_asked, throws=PASSING)
    def redrive_dead_letters(redrive_id: str) -> None:
        work_on(connections, broker, scripts, in_flight, UUID(redrive_id))


def _asked(_tries: int, error: BaseException) -> bool:
    return isinstance(error, Retry)


class _Outcomes(dramatiq.Middleware):
    def __init__(self, connections: VerifiedDatabase) -> None:
        self._connections = connections

    def after_process_message(
        self,
        broker: Any,  # noqa: ARG002 - Dramatiq's signature
        message: Any,
        *,
        result: Any = None,  # noqa: ARG002 - Dramatiq's signature
        exception: BaseException | None = None,
    ) -> None:
        redis_id = str(message.options.get("redis_message_id", "")).encode(errors="replace")
        if exception is None and redis_id.startswith(REDRIVEN):
            record_stored(self._connections, [redis_id])


def work_on(
    connections: VerifiedDatabase, broker: SendingBroker, scripts: Scripts, in_flight: InFlight, redrive_id: UUID
) -> None:
    """Send as many letters of a redrive as its pace and one turn allow.

    Raises Retry while letters remain, Outage (retry). Any other error ends the redrive with that reason: its unsent letters are
    dead letters again.
    """
    try:
        with connections.connect(_LONGEST_S) as conn:
            wait_s = _turn(conn, lambda letters: send(broker, scripts, letters), in_flight, redrive_id)
    except PASSING:
        raise
    except Exception as error:
        with connections.connect(_LONGEST_S) as conn:
            redrives.end(conn, redrive_id, "failed", f"{type(error).__name__}: {error}"[:1000])
        raise
    if wait_s is not None:
        raise Retry(delay=int(wait_s * 1000))


def _turn(
    conn: Connection, send_letters: Callable[[Sequence[DeadLetterRef]], None], in_flight: InFlight, redrive_id: UUID
) -> float | None:
    """Send letters for one turn. Return the seconds until the next turn, or None if no letter remains."""
    goes_on = time_budget()
    while True:
        wait_s = redrives.step(conn, redrive_id, send_letters).wait_s
        if wait_s is None or wait_s > _SHORT_S or not goes_on() or in_flight.stopping:
            return wait_s
        in_flight.sleep_unless_stopping(wait_s)


def send(broker: SendingBroker, scripts: Scripts, letters: Sequence[DeadLetterRef]) -> None:
    """Put letters in their queues, each once: its id determines the id in Redis. Raises RedisOutage (retry).

    Letters of a sink stay: its runner reads from the table which are due.
    """
    by_queue: dict[str, list[bytes]] = {}
    for letter in letters:
        if letter.queue.startswith(SINK_QUEUES):
            continue
        by_queue.setdefault(letter.queue, []).extend([redis_id_of(letter.id), _renewed(letter.message)])
    try:
        for queue, arguments in by_queue.items():
            keys = broker.keys(queue)
            scripts.run("redrive", [keys.queue, keys.bodies, keys.dead_bodies], *arguments)
    except redis.RedisError as error:
        raise RedisOutage(str(error)) from error


def redis_id_of(letter_id: UUID) -> bytes:
    """Return the id of a redriven letter in Redis."""
    return REDRIVEN + str(letter_id).encode()


def _renewed(body: bytes) -> bytes:
    """Return a message without Dramatiq's counts of earlier attempts."""
    try:
        message = read_envelope(body)
    except InvalidEvent:
        return body
    options = {name: value for name, value in message.options.items() if name not in _OLD_OPTIONS}
    return body if options == message.options else encode(Message(**message.asdict() | {"options": options}))


def sweep(conn: Connection, broker: SendingBroker, max_content_bytes: int) -> dict[str, int]:
    """Restart redrives whose job was lost, and find the outcome of redriven messages that left Redis without a record.

    Return the number of restarted redrives, of stored letters, and of letters that are dead again. Raises DatabaseOutage,
    RedisOutage (retry).
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
        done = {letter_id for letter_id in gone if _is_stored(conn, letter_id, max_content_bytes)}
        redrives.stored(conn, sorted(done))
        stored += len(done)
        dead += redrives.lost(conn, {letter_id: sent_at for letter_id, sent_at in gone.items() if letter_id not in done})
    if dead:
        log.error("redriven_lost", count=dead)
    return {"redrives": asked, "stored": stored, "dead": dead}


def _gone(broker: SendingBroker, letters: Sequence[Sent]) -> dict[UUID, datetime]:
    """Return the letters that are neither queued nor dead in Redis. Their outcome, if any, was written before they left."""
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


def _is_stored(conn: Connection, letter_id: UUID, max_content_bytes: int) -> bool:
    """Return whether the event of a letter is in the log, with the same body under its id."""
    letter = dead_letters.get(conn, letter_id)
    if letter is None or letter["actor"] != store_evaluation.actor_name:
        return False
    key = letter["eval_id"], letter["event_id"]
    if None in key or not event_store.applied(conn, [key]):
        return False
    try:
        event = read_message(letter["message"], max_content_bytes)
    except EvalstoreError:
        return False
    # Storing an event again changes nothing, and shows whether the body is the same.
    return event_store.store(conn, [event]).outcomes[0] != "reused"
