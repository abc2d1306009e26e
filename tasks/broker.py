"""The sending half of the broker. Imported at the first send: it imports redis."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from itertools import count, repeat
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import redis
from dramatiq import Message
from dramatiq.brokers.redis import RedisBroker
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry
from uuid_utils import uuid4

from models.errors import NotDurable, RedisOutage
from models.settings import settings, warn_unknown_env
from tasks import tracing
from tasks.actor import QUEUE
from tasks.connections import DeadlineConnection, deadline, packed, transact
from tasks.keys import Keys, Names, fence
from tasks.spool import Spool, folder_of
from tasks.touch import ObjectToucher

Queued = Literal["queued", "dead"]
_MAX_DELAY_MS: Final = 365 * 86_400_000
# 100 MiB take their time on a slow network, and Redis is not away because of that.
_SLOWEST_BYTES_PER_S: Final = 10_000_000
# What is smaller takes no time to speak of.
_USUAL_BYTES: Final = 256 * 1024
# Of fewer messages the script takes no longer than the transaction, which has a round trip more; of which so many go together.
_MANY, _TOGETHER = 64, 100
_WITHOUT_RESENT: Final = 2  # keys: the queue and the bodies


def encode(message: Message[Any], event: bytes | None = None) -> bytes:
    """`message` as Dramatiq's JSON; faster than its own encoder, and UTF-8 instead of escapes. One that is no event is for its
    encoder, which refuses what JSON has no form for, or is another (`dramatiq.set_encoder`): workers read JSON all the same.

    `event`: its one argument, where that is written already.
    """
    if message.queue_name != QUEUE:
        return message.encode()
    try:
        fields = _fields(message)
        if event is not None:
            fields["args"] = (msgspec.Raw(event),)
        return msgspec.json.encode(fields)
    except (UnicodeEncodeError, TypeError):
        return message.encode()


def _fields(message: Message[Any]) -> dict[str, Any]:
    # `asdict` looks the names of the fields up anew each time, and `vars` makes a dictionary that stays with the message: where
    # thousands are sent together, Python's collector of circles went through all its objects twice as often.
    if type(message) is not Message:
        return message.asdict()
    return {
        "queue_name": message.queue_name,
        "actor_name": message.actor_name,
        "args": message.args,
        "kwargs": message.kwargs,
        "options": message.options,
        "message_id": message.message_id,
        "message_timestamp": message.message_timestamp,
    }


class SendingBroker(RedisBroker):
    """Dramatiq's Redis broker, with sending that can be repeated, bulk sends, and durability on request.

    Takes what RedisBroker takes; of its maintenance nothing is left to set. `spool` keeps events while Redis takes none: those
    that are sent at once, and without `durable`, which promises more.
    """

    def __init__(
        self,
        *,
        url: str | None = None,
        client: redis.Redis | None = None,
        timeout_s: float = 5,
        spool: Spool | None = None,
        **parameters: Any,
    ) -> None:
        if client is None and url is not None:
            client = redis.Redis.from_url(
                url,
                socket_timeout=timeout_s / 2,
                socket_connect_timeout=timeout_s / 2,
                health_check_interval=30,
                retry=Retry(ExponentialWithJitterBackoff(base=0.01, cap=0.1), 1),
                retry_on_error=[redis.ConnectionError, redis.TimeoutError],
            )
            pool = client.connection_pool
            pool.connection_class = type("DeadlineConnection", (DeadlineConnection, pool.connection_class), {})
        super().__init__(client=client, **parameters)  # type: ignore[no-untyped-call]
        self.timeout_s, self.spool = timeout_s, spool
        self._enqueue = self.script(Path(__file__).parent / "lua" / "enqueue.lua")
        self._delay = self.script(Path(__file__).parent / "lua" / "delay.lua")
        self.waiting = self.script(Path(__file__).parent / "lua" / "waiting.lua")

    def script(self, path: Path) -> Any:
        """A script of ours; it is loaded at its first use."""
        return self.client.register_script(path.read_text(encoding="utf-8"))

    def reset_if_readonly(self, error: redis.RedisError) -> None:
        """Of a server that is no primary any more, leave it: behind the same name there may be another by now."""
        if isinstance(error, redis.ReadOnlyError):
            self.client.connection_pool.disconnect(inuse_connections=False)

    def keys(self, queue: str) -> Keys:
        """The keys of a queue."""
        return Keys.of(self.namespace, queue)

    @cached_property
    def names(self) -> Names:
        """The names of all else in Redis."""
        return Names(self.namespace)

    def declare_queue(self, queue_name: str) -> None:
        """Declare a queue. There is no second queue for its delayed messages."""
        if queue_name not in self.queues:
            self.emit_before("declare_queue", queue_name)
            self.queues.add(queue_name)
            self.emit_after("declare_queue", queue_name)

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        """Send a message, to be processed after `delay` ms.

        With the option `durable=True` this returns only when the append-only file is on disk or a replica has it.
        Raises RedisOutage within about `timeout_s`, and 0.1 s more for each MB (send the same again; what arrived twice is
        stored once), NotDurable. With a spool, an event that is neither delayed nor durable is kept there instead, behind those
        kept before; SpoolFull if not.
        """
        options = message.options | {"redis_message_id": str(uuid4())}
        durable = bool(options.pop("durable", False))  # of `message` it stays, which may be sent again
        sent: Message[Any] = Message(**_fields(message) | {"options": options})
        self.emit_before("enqueue", sent, delay)
        with tracing.sending(sent.queue_name, [sent]):
            keys = self.keys(sent.queue_name)
            redis_id, body = sent.options["redis_message_id"], encode(sent)
            if delay is None:
                self._send_or_keep(sent.queue_name, [redis_id, body], durable)
            elif 0 <= delay <= _MAX_DELAY_MS:
                self._send(self._delay, [keys.bodies, keys.delayed], [redis_id, body, str(int(delay))], durable)
            else:
                raise ValueError(f"expected a delay of 0 to {_MAX_DELAY_MS} ms, not {delay}")
        self.emit_after("enqueue", sent, delay)
        return sent

    def enqueue_many(
        self, messages: Sequence[Message[Any]], *, events: Iterable[bytes | None] = repeat(None), durable: bool = False
    ) -> None:
        """Send all of one queue's messages together, or none. Keeps and raises as `enqueue` does.

        `events`: the one argument of each as JSON, where that is written already.
        """
        if not messages:
            return
        queue = messages[0].queue_name
        with tracing.sending(queue, messages):
            arguments: list[str | bytes] = []
            for message, event in zip(messages, events, strict=False):
                redis_id = str(uuid4())
                message.options["redis_message_id"] = redis_id
                arguments += (redis_id, encode(message, event))
            self._send_or_keep(queue, arguments, durable)

    def send_on(self, arguments: list[str | bytes]) -> None:
        """Send what the spool kept. Raises RedisOutage; the slower the network may be, as nobody waits for it."""
        keys = self.keys(QUEUE)
        resent = [keys.queue, keys.bodies, keys.resent]
        self._send(self._enqueue, resent, arguments, durable=False, slowest_bytes_per_s=1_000_000)

    def _send_or_keep(self, queue: str, arguments: list[str | bytes], durable: bool) -> None:
        spool = None if durable or queue != QUEUE else self.spool
        # Behind what is kept already: so the order is kept, and no event after the first waits for Redis.
        if spool is None or not spool.holds():
            keys = self.keys(queue)
            are_many = not durable and len(arguments) >= 2 * _MANY
            places = [keys.queue, keys.bodies, keys.resent] if are_many else [keys.queue, keys.bodies]
            try:
                self._send(self._enqueue, places, arguments, durable, are_many=are_many)
            except RedisOutage:
                if spool is None:
                    raise
            else:
                return
        try:
            spool.append(arguments)
        finally:
            spool.keep_forwarding(self.send_on)

    def _send(
        self,
        script: Any,
        keys: list[str],
        arguments: list[Any],
        durable: bool,
        slowest_bytes_per_s: float = _SLOWEST_BYTES_PER_S,
        *,
        are_many: bool = False,
    ) -> None:
        """Run a sending script, again where that may help: it does nothing twice. `are_many`: first try what costs half."""
        size = sum(map(len, arguments))
        # To set a socket's patience anew is a call of the system.
        with deadline(self.timeout_s, size / slowest_bytes_per_s if size > _USUAL_BYTES else 0.0):
            self._send_with_retries(script, keys, arguments, durable, are_many)

    def _send_with_retries(self, script: Any, keys: list[str], arguments: list[Any], durable: bool, are_many: bool) -> None:
        deadline = time.monotonic() + self.timeout_s / 2
        for attempt in count(1):
            try:
                if attempt > 1 or not are_many or not self._send_in_transaction(keys, arguments):
                    (self._send_durably if durable else self._call)(script, keys, arguments)
            except (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError) as error:
                # Twice at least: the first connection may have been dead before.
                if attempt > 1 and time.monotonic() > deadline:
                    raise RedisOutage(str(error)) from error
                self.reset_if_readonly(error)
                time.sleep(0.02)
            except redis.RedisError as error:
                if not isinstance(error, redis.exceptions.NoPermissionError) or len(keys) == _WITHOUT_RESENT:
                    raise RedisOutage(str(error)) from error
                # A user who may not touch the third key cannot have begun a transaction either, as that watches it.
                keys = keys[:_WITHOUT_RESENT]
            except Exception as error:
                if sys.is_finalizing():  # a codec, say, can be loaded no more: the spool needs none
                    raise RedisOutage(f"the interpreter ends: {error}") from error
                raise
            else:
                return

    def _send_in_transaction(self, keys: list[str], arguments: list[Any]) -> bool:
        """Put messages that were never sent before at the tail of a queue; whether that is done.

        What enqueue.lua does, but without looking whether they are there, and without Lua, through which each is copied twice
        more. Where this comes late, after its sender asked the script, that has written to the last of `keys`.
        """
        queue, bodies, resent = keys
        parts = [arguments[start : start + 2 * _TOGETHER] for start in range(0, len(arguments), 2 * _TOGETHER)]
        commands = (packed(*one) for part in parts for one in (("HSET", bodies, *part), ("RPUSH", queue, *part[::2])))
        pool = self.client.connection_pool
        connection = pool.get_connection()
        try:
            return transact(connection, resent, commands)
        finally:
            pool.release(connection)

    def _call(self, script: Any, keys: list[str], arguments: list[Any]) -> None:
        """What redis-py's client does to run a script, and not what it does besides, which costs as much again."""
        pool = self.client.connection_pool
        connection = pool.get_connection()
        try:
            evalsha = [packed("EVALSHA", script.sha, str(len(keys)), *keys, *arguments)]
            try:
                connection.send_packed_command(evalsha)
                connection.read_response()
            except redis.exceptions.NoScriptError:
                connection.send_command("SCRIPT LOAD", script.script)
                connection.read_response()
                connection.send_packed_command(evalsha)
                connection.read_response()
        except redis.ResponseError:
            raise
        except BaseException:
            connection.disconnect()  # the answer may be on its way
            raise
        finally:
            pool.release(connection)

    def _send_durably(self, script: Any, keys: list[str], arguments: list[Any]) -> None:
        """Send, then wait on the same connection, as these commands speak of the writes of theirs.

        https://redis.io/docs/latest/commands/waitaof/, https://redis.io/docs/latest/commands/wait/
        """
        wait_ms = int(self.timeout_s * 350)  # less than the connection's patience
        why: object = None
        for wait in (("WAITAOF", 1, 0, wait_ms), ("WAIT", 1, wait_ms)):
            with self.client.pipeline(transaction=False) as pipeline:
                script(keys=keys, args=arguments, client=pipeline)
                # On a new connection, after the answer was lost, the script finds its messages there and writes nothing, and
                # there would be nothing to wait for. This is a write, and later than theirs.
                pipeline.set(fence(keys[0]), 1, ex=60)
                pipeline.execute_command(*wait)
                sent, fenced, confirmed = pipeline.execute(raise_on_error=False)
            for answer in (sent, fenced):
                if isinstance(answer, Exception):
                    raise answer
            if not isinstance(confirmed, Exception) and (confirmed[0] if isinstance(confirmed, list) else confirmed) >= 1:
                return
            why = why or (confirmed if isinstance(confirmed, Exception) else "the append-only file was not on disk in time")
        raise NotDurable(f"sent, but not known to be durable: {why}")

    def held(self, queue: str) -> Iterator[tuple[Queued, bytes]]:
        """Every message that Redis holds for `queue`: to be worked on now or later, or dead.

        One that moves meanwhile may be given twice. Raises RedisOutage.
        """
        keys = self.keys(queue)
        places: list[tuple[Queued, str]] = [
            ("queued", keys.stock_delayed_bodies),
            ("queued", keys.bodies),
            ("dead", keys.dead_bodies),
        ]
        try:
            for state, key in places:
                for _, body in self.client.hscan_iter(key, count=500):
                    yield state, body
        except redis.RedisError as error:
            raise RedisOutage(str(error)) from error

    def counts(self, queue: str) -> dict[str, int]:
        """How many messages of `queue` are ready, in flight, delayed and dead. Raises RedisOutage."""
        keys = self.keys(queue)
        pipeline = self.client.pipeline(transaction=True)
        pipeline.llen(keys.queue)
        pipeline.llen(keys.woken)
        pipeline.hlen(keys.bodies)
        pipeline.zcard(keys.delayed)
        pipeline.hlen(keys.stock_delayed_bodies)
        pipeline.zcard(keys.dead)
        try:
            in_queue, woken, held, delayed, stock_delayed, dead = pipeline.execute()
        except redis.RedisError as error:
            raise RedisOutage(str(error)) from error
        ready = in_queue + woken
        inflight = max(0, held - ready - delayed)
        return {"ready": ready, "inflight": inflight, "delayed": delayed + stock_delayed, "dead": dead}

    def do_qsize(self, queue: str) -> int:
        """How many messages of `queue` are not done with; `join` waits until there is none."""
        keys = self.keys(queue.removesuffix(".DQ"))
        return int(self.client.hlen(keys.bodies)) + int(self.client.hlen(keys.stock_delayed_bodies))

    def flush(self, queue_name: str) -> None:
        """Drop the messages of a queue. Dead letters stay."""
        keys = self.keys(queue_name)
        places = [keys.queue, keys.woken, keys.bodies, keys.delayed, keys.suspects, keys.deaths]
        self.client.delete(*places, keys.stock_delayed, keys.stock_delayed_bodies)


@cache
def broker() -> SendingBroker:
    """This process's broker for sending, made at the first call; no connection is opened before something is sent."""
    from tasks.actor import store_evaluation

    read = settings()
    warn_unknown_env()
    folder = folder_of(read)
    spool = Spool(folder, max_bytes=read.spool_max_bytes, in_outage=ObjectToucher(read)) if folder else None
    made = SendingBroker(
        url=read.redis_url.get_secret_value(),
        namespace=read.redis_namespace,
        timeout_s=read.send_timeout_s,
        spool=spool,
        middleware=[],
    )
    made.declare_actor(store_evaluation)
    return made


# A thread of the parent may have held a lock of the pool.
os.register_at_fork(after_in_child=broker.cache_clear)
