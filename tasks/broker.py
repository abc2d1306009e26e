"""The sending half of the broker. It is imported at the first send, because it imports redis."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from itertools import count, repeat
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import msgspec
import redis
from dramatiq import Message
from dramatiq.brokers.redis import RedisBroker
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import NoScriptError
from redis.retry import Retry
from uuid_utils import uuid4

from models.errors import NotDurable, RedisOutage
from models.settings import DEFAULT_REDIS_NAMESPACE, Settings, settings
from models.unknown_settings import warn_unknown_env
from tasks import tracing
from tasks.connections import DeadlineConnection, as_bytes, connect, deadline, is_located, pack, run_script, run_transaction
from tasks.keys import QUEUE, Keys, Names, fence
from tasks.spool import Spool, folder_of
from tasks.touch import ObjectToucher
from tasks.uploads import Uploader

MessageState = Literal["queued", "dead"]
_MAX_DELAY_MS: Final = 365 * 86_400_000
# A large message extends the timeout: 100 MiB on a slow network are no outage.
_SLOWEST_BYTES_PER_S: Final = 10_000_000
_SLOWEST_SPOOL_BYTES_PER_S: Final = 1_000_000  # No caller waits for the spool.
# Smaller messages do not extend the timeout. To change a socket's timeout is a system call.
_LARGE_BYTES: Final = 256 * 1024
# Below this number of messages the script is as fast as a transaction, which has one more round trip.
_TRANSACTION_MESSAGES: Final = 64
_MESSAGES_PER_COMMAND: Final = 100
# How long a primary without replica counts as one that had a replica: the default of repl-backlog-ttl.
_REPLICA_TTL_S: Final = 3600
_WITHOUT_RESENT: Final = 2  # keys: the queue and the bodies


class _Replication(NamedTuple):
    """Whether a durable send waits for a replica, and the value of its fence."""

    expects_replica: bool
    fence: str | bytes


def encode(message: Message[Any], event: bytes | None = None) -> bytes:
    """Encode `message` in Dramatiq's JSON. `event` is its argument as JSON, if already encoded.

    Messages of other queues, and values that msgspec refuses, go through Dramatiq's encoder, which the application may have
    replaced (`dramatiq.set_encoder`). Workers always read JSON.
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
    # `asdict` looks up the field names each time. `vars` leaves a dictionary on each message, and garbage collection then
    # runs twice as often in a bulk send.
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
    """Dramatiq's Redis broker with repeatable sends, bulk sends, and durable sends.

    It takes RedisBroker's parameters, except those of its maintenance. With `spool`, events that Redis does not accept are kept
    on disk, unless they are delayed or durable.
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
            client = connect(
                url,
                parameters.get("namespace", DEFAULT_REDIS_NAMESPACE),
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
        """Register a Lua script. The server loads it at the first call."""
        return self.client.register_script(path.read_text(encoding="utf-8"))

    def reset_if_readonly(self, error: redis.RedisError) -> None:
        """Disconnect from a server that became a replica. The same name may lead to the new primary."""
        if isinstance(error, redis.ReadOnlyError):
            self.client.connection_pool.disconnect(inuse_connections=False)

    def keys(self, queue: str) -> Keys:
        """Return the names of the keys of a queue."""
        return Keys.of(self.namespace, queue)

    @cached_property
    def names(self) -> Names:
        """The names in Redis outside the queues."""
        return Names(self.namespace)

    def declare_queue(self, queue_name: str) -> None:
        """Declare a queue. Unlike Dramatiq's, it has no second queue for delayed messages."""
        if queue_name not in self.queues:
            self.emit_before("declare_queue", queue_name)
            self.queues.add(queue_name)
            self.emit_after("declare_queue", queue_name)

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        """Send a message, to be processed after `delay` ms.

        With the option `durable=True`, return only after the append-only file is on disk or a replica has the message.
        Raises RedisOutage within about `timeout_s`, plus 0.1 s for each MB: send the same message again, it is stored once.
        Raises NotDurable. With a spool, an event that is neither delayed nor durable goes to the spool instead, behind those
        already there; SpoolFull if it has no room.
        """
        options = message.options | {"redis_message_id": str(uuid4())}
        durable = bool(options.pop("durable", False))  # `message` keeps the option: the caller may send it again
        sent: Message[Any] = Message(**_fields(message) | {"options": options})
        self.emit_before("enqueue", sent, delay)
        with tracing.sending(sent.queue_name, [sent]):
            keys = self.keys(sent.queue_name)
            redis_id, body = sent.options["redis_message_id"], encode(sent)
            if delay is None:
                self._send_or_spool(sent.queue_name, [redis_id, body], durable)
            elif 0 <= delay <= _MAX_DELAY_MS:
                self._send(self._delay, [keys.bodies, keys.delayed], [redis_id, body, str(int(delay))], durable)
            else:
                raise ValueError(f"expected a delay of 0 to {_MAX_DELAY_MS} ms, not {delay}")
        self.emit_after("enqueue", sent, delay)
        return sent

    def enqueue_many(
        self, messages: Sequence[Message[Any]], *, events: Iterable[bytes | None] = repeat(None), durable: bool = False
    ) -> None:
        """Send messages of one queue, all or none. Uses the spool and raises as `enqueue` does.

        `events`: the argument of each message as JSON, if it is encoded already.
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
            self._send_or_spool(queue, arguments, durable)

    def send_spooled(self, arguments: list[str | bytes]) -> None:
        """Send messages from the spool. Raises RedisOutage."""
        keys = self.keys(QUEUE)
        script_keys = [keys.queue, keys.bodies, keys.resent]
        self._send(self._enqueue, script_keys, arguments, False, slowest_bytes_per_s=_SLOWEST_SPOOL_BYTES_PER_S)

    def _send_or_spool(self, queue: str, arguments: list[str | bytes], durable: bool) -> None:
        spool = None if durable or queue != QUEUE else self.spool
        # While the spool holds events, append to it: this keeps their order, and only the first event waits for Redis.
        if spool is None or not spool.holds():
            keys = self.keys(queue)
            is_bulk = not durable and len(arguments) >= 2 * _TRANSACTION_MESSAGES
            script_keys = [keys.queue, keys.bodies, keys.resent] if is_bulk else [keys.queue, keys.bodies]
            try:
                self._send(self._enqueue, script_keys, arguments, durable, is_bulk=is_bulk)
            except RedisOutage:
                if spool is None:
                    raise
            else:
                return
        try:
            spool.append(arguments)
        finally:
            spool.keep_forwarding(self.send_spooled)

    def _send(  # noqa: C901 - one loop, with an except for each cause
        self,
        script: Any,
        keys: list[str],
        arguments: list[Any],
        durable: bool,
        *,
        slowest_bytes_per_s: float = _SLOWEST_BYTES_PER_S,
        is_bulk: bool = False,
    ) -> None:
        """Run a sending script, and repeat it after connection errors: it adds no message twice.

        `is_bulk`: try a transaction first, which costs Redis half as much.
        """
        give_up_at = time.monotonic() + self.timeout_s / 2
        size = sum(map(len, arguments))
        with deadline(self.timeout_s, size / slowest_bytes_per_s if size > _LARGE_BYTES else 0.0):
            for attempt in count(1):
                try:
                    if durable:
                        self._send_durably(script, keys, arguments)
                    elif attempt > 1 or not is_bulk or not self._send_in_transaction(keys, arguments):
                        run_script(self.client.connection_pool, script, keys, arguments)
                except (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError, NoScriptError) as error:
                    # Try at least twice: the pool's connection may have been closed before.
                    if attempt > 1 and time.monotonic() > give_up_at:
                        raise RedisOutage(str(error)) from error
                    self.reset_if_readonly(error)
                    time.sleep(0.02)
                except redis.RedisError as error:
                    if not isinstance(error, redis.exceptions.NoPermissionError) or len(keys) == _WITHOUT_RESENT:
                        raise RedisOutage(str(error)) from error
                    # A user without rights on the third key cannot have begun a transaction either: that watches the key.
                    keys = keys[:_WITHOUT_RESENT]
                except Exception as error:
                    if sys.is_finalizing():  # for example, a codec cannot be loaded any more. The spool needs none.
                        raise RedisOutage(f"the interpreter ends: {error}") from error
                    raise
                else:
                    return

    def _send_in_transaction(self, keys: list[str], arguments: list[Any]) -> bool:
        """Append new messages to a queue, without the script's check for repeats; return whether that happened.

        A script copies each message twice more. A late transaction has no effect, because a repeating script writes to the
        last of `keys`, which the transaction watches.
        """
        queue, bodies, resent = keys
        step = 2 * _MESSAGES_PER_COMMAND
        parts = [arguments[start : start + step] for start in range(0, len(arguments), step)]
        pairs = ((("HSET", bodies, *part), ("RPUSH", queue, *part[::2])) for part in parts)
        commands = (pack(*command) for pair in pairs for command in pair)
        return run_transaction(self.client.connection_pool, resent, commands)

    def _send_durably(self, script: Any, keys: list[str], arguments: list[Any]) -> None:
        """Send, then wait on the same connection: these commands cover only the connection's own writes.

        Wait for a replica if the primary has one, or lost its last one: then a failover may be near, and drops the primary's
        file. Else wait for the file. https://redis.io/docs/latest/commands/waitaof/, https://redis.io/docs/latest/commands/wait/
        """
        wait_ms = int(self.timeout_s * 350)  # less than the socket's timeout
        for_file, for_replica = ("WAITAOF", 1, 0, wait_ms), ("WAIT", 1, wait_ms)
        replication = self._replication(fence(keys[0]))
        why: object = None
        for wait in (for_replica,) if replication.expects_replica else (for_file, for_replica):
            with self.client.pipeline(transaction=False) as pipeline:
                script(keys=keys, args=arguments, client=pipeline)
                # After a lost reply, the repeated script writes nothing on the new connection, so WAIT would return at once.
                # This write comes after the write of the messages.
                pipeline.set(fence(keys[0]), replication.fence, ex=_REPLICA_TTL_S)
                pipeline.execute_command(*wait)
                sent, fenced, confirmed = pipeline.execute(raise_on_error=False)
            for reply in (sent, fenced):
                if isinstance(reply, Exception):
                    raise reply
            if not isinstance(confirmed, Exception) and (confirmed[0] if isinstance(confirmed, list) else confirmed) >= 1:
                return
            unconfirmed = "no replica had it in time" if wait is for_replica else "the append-only file was not on disk in time"
            why = why or (confirmed if isinstance(confirmed, Exception) else unconfirmed)
        raise NotDurable(f"sent, but not known to be durable: {why}")

    def _replication(self, fence_key: str) -> "_Replication":
        """Ask whether the primary has or recently had a replica. The fence holds the last history that had one, and when.

        A promoted primary begins a new history: its file alone counts until it has a replica. Where the user may not ask, a
        primary has a replica if Sentinel or a cluster named it.
        """
        with self.client.pipeline(transaction=False) as pipeline:
            pipeline.get(fence_key)
            pipeline.info("replication")
            had, info = pipeline.execute(raise_on_error=False)
        if isinstance(info, Exception) or isinstance(had, Exception):
            return _Replication(is_located(self.client), "1")
        history, now = str(info.get("master_replid")), int(time.time())
        if info.get("connected_slaves"):
            return _Replication(True, f"{history} {now}")
        had_history, _, had_at = as_bytes(had or b"").decode().partition(" ")
        is_recent = had_history == history and now - int(had_at or 0) < _REPLICA_TTL_S
        was_never_promoted = info.get("second_repl_offset") == -1
        return _Replication(is_recent or bool(was_never_promoted and info.get("repl_backlog_active")), had or "1")

    def held(self, queue: str) -> Iterator[tuple[MessageState, bytes]]:
        """Yield every message that Redis holds for `queue`. A message that moves may come twice. Raises RedisOutage."""
        keys = self.keys(queue)
        places: list[tuple[MessageState, str]] = [
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
        """Count the messages of `queue` that are ready, in flight, delayed and dead. Raises RedisOutage."""
        keys = self.keys(queue)
        pipeline = self.client.pipeline(transaction=True)
        pipeline.llen(keys.queue)
        pipeline.llen(keys.woken)
        pipeline.hlen(keys.bodies)
        pipeline.zcard(keys.delayed)
        pipeline.hlen(keys.stock_delayed_bodies)
        pipeline.zcard(keys.dead)
        try:
            in_queue, woken, stored, delayed, stock_delayed, dead = pipeline.execute()
        except redis.RedisError as error:
            raise RedisOutage(str(error)) from error
        ready = in_queue + woken
        inflight = max(0, stored - ready - delayed)
        return {"ready": ready, "inflight": inflight, "delayed": delayed + stock_delayed, "dead": dead}

    def do_qsize(self, queue: str) -> int:
        """Count the unfinished messages of `queue`. Dramatiq's `join` waits until there are none."""
        keys = self.keys(queue.removesuffix(".DQ"))
        return int(self.client.hlen(keys.bodies)) + int(self.client.hlen(keys.stock_delayed_bodies))

    def flush(self, queue_name: str) -> None:
        """Delete the messages of a queue. Dead letters stay."""
        keys = self.keys(queue_name)
        places = [keys.queue, keys.woken, keys.bodies, keys.delayed, keys.suspects, keys.deaths]
        self.client.delete(*places, keys.stock_delayed, keys.stock_delayed_bodies)


class GatewayBroker(SendingBroker):
    """The broker of a process that sends, with its settings, spool and object store. It connects at the first send."""

    def __init__(self, settings: Settings) -> None:
        folder = folder_of(settings)
        toucher = ObjectToucher(settings)
        super().__init__(
            url=settings.redis_url.get_secret_value(),
            namespace=settings.redis_namespace,
            timeout_s=settings.send_timeout_s,
            spool=Spool(folder, max_bytes=settings.spool_max_bytes, on_outage=toucher) if folder else None,
            middleware=[],
        )
        self.settings = settings
        self.uploader = Uploader(settings)


@cache
def broker() -> GatewayBroker:
    """Return this process's broker. The first call reads the settings."""
    warn_unknown_env()
    return GatewayBroker(settings())


# A forked child makes its own broker: a thread of the parent may hold a lock of the connection pool or of the object store.
os.register_at_fork(after_in_child=broker.cache_clear)
