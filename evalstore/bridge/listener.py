"""Listen to an old platform's pub/sub, and send what is heard to the queue.

Pub/sub keeps nothing: messages that are published while nobody listens are lost, and Redis does not say how many. So the
listening thread does nothing else, and each time without a subscription is logged and counted.
"""

import json
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import redis
from dramatiq import Message
from redis.backoff import NoBackoff
from redis.retry import Retry

from evalstore.bridge.mapping import Mapped, to_event, unreadable
from evalstore.telemetry.counters import Counters
from models.errors import InvalidEvent, Outage
from models.logs import EventLogger
from models.record import rfc3339
from tasks import connections, store_evaluation
from tasks.actor import ACTOR
from tasks.broker import broker
from tasks.keys import QUEUE

log = EventLogger("evalstore.bridge")

_POLL_S: Final = 0.5
_PING_S: Final = 3.0
_SILENT_S: Final = 10.0
_BACKOFF_S: Final = (0.1, 5.0)
_DEADLINE_S: Final = 60.0
_BATCH: Final = 500
# The bridge holds so many bytes while the queue's Redis is away and there is no spool. Then the source's output buffer fills.
_BUFFER_BYTES: Final = 64 * 1024 * 1024
_AGREED_S: Final = 86_400
STOP_S: Final = 8.0


class Heard(NamedTuple):
    """A message of the source."""

    channel: str
    payload: bytes
    at: datetime


def connect(url: str) -> "redis.Redis":
    """Return a client that reports a lost connection at once, and makes no new one by itself.

    Any server of a cluster hears all that is published. Raises ValueError for a bad address.
    """
    return connections.connect(
        url, "{bridge}", socket_timeout=5, socket_connect_timeout=5, socket_keepalive=True, retry=Retry(NoBackoff(), 0)
    )


class Bridge:
    """Listens in the calling thread of `run`, and sends in another one, until `stop`."""

    def __init__(self, mapped: Mapped, source: "redis.Redis", counters: Counters) -> None:
        self._mapped, self._source, self._counters = mapped, source, counters
        self._stopping, self._ended = threading.Event(), threading.Event()
        self._arrived = threading.Event()
        self._heard = deque[Heard]()
        self._bytes = 0
        self._listened_at: float | None = None
        self._is_coordinated = True

    def run(self) -> int:
        """Work until `stop`. Return the number of messages that were heard and could not be sent."""
        sender = threading.Thread(target=self._send_all, name="bridge sender", daemon=True)
        sender.start()
        self._counters.watch_thread("listener")
        backoff_s = _BACKOFF_S[0]
        while not self._stopping.is_set():
            self._counters.set_deadline(_DEADLINE_S)
            try:
                self._listen()
            except redis.RedisError as error:
                self._counters.set("evalstore_bridge_connected", to=0)
                backoff_s = _BACKOFF_S[0] if self._is_fresh() else backoff_s
                log.warning("bridge_away", error=error)
                self._stopping.wait(backoff_s * random.uniform(0.5, 1))  # noqa: S311 - spreads the copies
                backoff_s = min(2 * backoff_s, _BACKOFF_S[1])
        self._counters.set_deadline(None)
        self._ended.set()
        self._arrived.set()
        sender.join(STOP_S)
        return len(self._heard)

    def stop(self) -> None:
        """Stop listening, and send what was heard. Safe in a signal handler."""
        self._stopping.set()

    def _is_fresh(self) -> bool:
        return self._listened_at is not None and time.monotonic() - self._listened_at < _SILENT_S + _PING_S

    def _listen(self) -> None:
        """Subscribe and take messages until `stop`. Raises RedisError."""
        pubsub = self._source.pubsub()
        try:
            pubsub.psubscribe(*self._mapped.channels)
            missing = len(set(self._mapped.channels))
            answered = pinged = time.monotonic()
            while not self._stopping.is_set():
                self._counters.set_deadline(_DEADLINE_S)
                self._wait_for_room()
                message = pubsub.get_message(timeout=_POLL_S)
                now = time.monotonic()
                if message is not None:
                    answered = now
                    missing -= message["type"] == "psubscribe"
                    if missing == 0 and message["type"] == "psubscribe":
                        self._report_listening()
                    elif message["type"] == "pmessage":
                        self._take(message)
                if missing == 0:
                    self._listened_at = answered
                if now - answered > _SILENT_S:
                    raise redis.ConnectionError(f"it has not answered for {now - answered:.0f} s")
                if now - pinged > _PING_S:
                    pubsub.ping()
                    pinged = now
        finally:
            with suppress(redis.RedisError, OSError):
                pubsub.close()

    def _report_listening(self) -> None:
        self._counters.set("evalstore_bridge_connected", to=1)
        patterns = ", ".join(self._mapped.channels)
        if self._listened_at is None:
            log.info("bridge_listening", patterns=patterns)
            return
        gap_s = time.monotonic() - self._listened_at
        self._counters.add("evalstore_bridge_gaps_total")
        self._counters.add("evalstore_bridge_disconnected_seconds_total", by=gap_s)
        log.error("bridge_gap", patterns=patterns, seconds=gap_s)

    def _take(self, message: dict[str, Any]) -> None:
        channel = message["channel"].decode(errors="backslashreplace")
        self._heard.append(Heard(channel, bytes(message["data"]), datetime.now(UTC)))
        self._bytes += len(message["data"])
        self._counters.set("evalstore_bridge_buffered_messages", to=len(self._heard))
        self._arrived.set()

    def _wait_for_room(self) -> None:
        while self._bytes > _BUFFER_BYTES and not self._stopping.wait(0.05):
            self._counters.set_deadline(_DEADLINE_S)

    def _send_all(self) -> None:
        self._counters.watch_thread("sender")
        while self._heard or not self._ended.is_set():
            self._counters.set_deadline(_DEADLINE_S)
            if not self._heard:
                self._arrived.wait(_POLL_S)
                self._arrived.clear()
                continue
            batch = [self._heard[at] for at in range(min(_BATCH, len(self._heard)))]
            self._until_taken(batch)
            for heard in batch:
                self._heard.popleft()
                self._bytes -= len(heard.payload)
            self._counters.set("evalstore_bridge_buffered_messages", to=len(self._heard))
        self._counters.leave_thread()

    def _until_taken(self, batch: Sequence[Heard]) -> None:
        """Send a batch. During an outage of the queue's Redis, try again until it ends: a repeat is stored once."""
        events = [self._event(heard) for heard in batch]
        self._agree_on_times([(heard, event) for heard, event in zip(batch, events, strict=True) if isinstance(event, dict)])
        messages: list[Message[Any]] = []
        bad = 0
        backoff_s = _BACKOFF_S[0]
        while True:
            try:
                for heard, event in zip(batch[len(messages) :], events[len(messages) :], strict=True):
                    message, is_bad = _message(heard, event)
                    bad += is_bad
                    messages.append(message)
                broker().enqueue_many(messages)
                break
            except Outage as error:
                if backoff_s == _BACKOFF_S[0]:
                    log.warning("bridge_waits", messages=len(self._heard), error=error)
                self._counters.set_deadline(_DEADLINE_S)
                time.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _BACKOFF_S[1])
        self._count("sent", len(batch) - bad)
        self._count("bad", bad)

    def _event(self, heard: Heard) -> dict[str, Any] | InvalidEvent:
        try:
            return to_event(self._mapped, heard.channel, heard.payload)
        except InvalidEvent as error:
            return error

    def _count(self, outcome: str, number: int) -> None:
        self._counters.add("evalstore_bridge_messages_total", outcome, by=number)

    def _agree_on_times(self, work: Sequence[tuple[Heard, dict[str, Any]]]) -> None:
        """Give events without a time the time at which the first copy of the bridge heard them.

        Copies agree on it in the source's Redis. With different times, the second event would become a dead letter.
        """
        untimed = [(heard, event) for heard, event in work if "occurred_at" not in event]
        if not untimed:
            return
        times = [rfc3339(heard.at) for heard, _ in untimed]
        try:
            with self._source.pipeline(transaction=False) as pipeline:
                for (_, event), time_ in zip(untimed, times, strict=True):
                    key = f"evalstore:bridge:{event['event_id']}"
                    pipeline.set(key, time_, nx=True, ex=_AGREED_S)
                    pipeline.get(key)
                times = [reply.decode() for reply in pipeline.execute()[1::2]]
        except (redis.RedisError, AttributeError) as error:  # AttributeError: the key was evicted at once
            if self._is_coordinated:
                log.warning("bridge_uncoordinated", error=error)
            self._is_coordinated = False
        for (_, event), time_ in zip(untimed, times, strict=True):
            event["occurred_at"] = time_


def _message(heard: Heard, event: dict[str, Any] | InvalidEvent) -> tuple[Message[Any], bool]:
    """Return the message to send, and whether it is bad. A bad one goes to the queue too: a worker makes it a dead letter.

    Raises Outage.
    """
    try:
        if isinstance(event, InvalidEvent):
            raise event
        return store_evaluation.message(event), False
    except InvalidEvent as error:
        log.warning("bridge_bad_message", channel=heard.channel, error=error)
    kept = event if isinstance(event, dict) and _is_json(event) else unreadable(heard.channel, heard.payload)
    return Message(QUEUE, ACTOR, (kept,), {}, {}), True


def _is_json(event: dict[str, Any]) -> bool:
    """Tell whether the message can be encoded with this event in it."""
    try:
        json.dumps(event, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError):
        return False
    return True
