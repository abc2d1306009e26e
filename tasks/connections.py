"""Connections to Redis with a deadline, and the commands that send messages over them."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import redis
from redis import ResponseError
from redis.connection import AbstractConnection

from models import threads
from models.addresses import parse_redis_url


class _Deadline(threading.local):
    """redis-py passes no deadline through its pool to a connection, so the calling thread carries its own."""

    at = math.inf
    extra_s = 0.0

    def remaining_s(self) -> float:
        return max(self.at - time.monotonic(), 0.001)


_deadline = _Deadline()


@contextmanager
def deadline(timeout_s: float, extra_s: float) -> Iterator[None]:
    """End every wait of this thread on a DeadlineConnection after `timeout_s + extra_s`.

    `extra_s` is also added to the socket timeout of each step.
    """
    before = _deadline.at, _deadline.extra_s  # a signal handler may send while this thread sends
    _deadline.at, _deadline.extra_s = time.monotonic() + timeout_s + extra_s, extra_s
    try:
        yield
    finally:
        _deadline.at, _deadline.extra_s = before


class DeadlineConnection(AbstractConnection):
    """Mix-in for redis-py connections that keep the deadline of the calling thread.

    redis-py's timeouts apply to each step: a slow server has many steps. Its DNS lookup has no timeout.
    """

    def _connect(self) -> Any:
        connect: Callable[[], Any] = super()._connect  # type: ignore[safe-super]
        if _deadline.at == math.inf:
            return connect()
        connected: Future[Any] = Future()
        if threads.start(_settle, connected, connect) is None:
            return connect()
        try:
            return connected.result(timeout=_deadline.remaining_s())
        except TimeoutError:
            connected.add_done_callback(_close)
            raise

    def send_packed_command(self, *args: Any, **options: Any) -> None:
        self._set_timeout()
        super().send_packed_command(*args, **options)  # type: ignore[no-untyped-call]

    def read_response(self, *args: Any, **options: Any) -> Any:
        self._set_timeout()
        return super().read_response(*args, **options)

    def _set_timeout(self) -> None:
        if self._sock:
            timeout_s = min(self.socket_timeout + _deadline.extra_s, _deadline.remaining_s())
            if self._sock.gettimeout() != timeout_s:
                self._sock.settimeout(timeout_s)


def connect(url: str, namespace: str, **options: Any) -> redis.Redis:
    """Return a client for the server that holds `namespace`. It connects at its first command.

    `options` are redis-py's. Raises ValueError for a bad address, without repeating it.
    """
    address = parse_redis_url(url)
    if address.kind == "server":
        return redis.Redis.from_url(address.url, **options)
    from tasks.failover import locate

    return locate(address, namespace, options)


def is_located(client: redis.Redis) -> bool:
    """Return whether Sentinel or a cluster names the server of this client."""
    return "locator" in client.connection_pool.connection_kwargs


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except Exception as error:  # noqa: BLE001 - the waiting thread raises it again
        future.set_exception(error)


def _close(connected: Future[Any]) -> None:
    if not connected.exception():
        connected.result().close()


def as_bytes(reply: str | bytes) -> bytes:
    """Undo the decoding of a client with `decode_responses`."""
    return reply.encode(errors="surrogateescape") if isinstance(reply, str) else reply


def pack(*arguments: str | bytes) -> bytes:
    """Encode one command in RESP. redis-py's own encoder takes five times as long for thousands of arguments."""
    parts = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        data = argument.encode() if isinstance(argument, str) else argument
        parts += (b"$%d\r\n" % len(data), data, b"\r\n")
    return b"".join(parts)


def run_script(pool: redis.ConnectionPool, script: Any, keys: list[str], arguments: list[Any]) -> None:
    """Run a registered script, which is loaded if the server lost it. Raises redis.RedisError.

    A send through redis-py's client takes 16 % longer (docs/decisions/0027).
    """
    connection = pool.get_connection()
    try:
        command = [pack("EVALSHA", script.sha, str(len(keys)), *keys, *arguments)]
        try:
            connection.send_packed_command(command)
            connection.read_response()
        except redis.exceptions.NoScriptError:
            connection.send_command("SCRIPT LOAD", script.script)
            connection.read_response()
            connection.send_packed_command(command)
            connection.read_response()
    except ResponseError:
        raise
    except BaseException:
        connection.disconnect()  # a reply may still arrive
        raise
    finally:
        pool.release(connection)


def run_transaction(pool: redis.ConnectionPool, watched: str, commands: Iterable[bytes]) -> bool:
    """Run packed commands in one transaction, and return whether they ran. Redis reads each while the next is packed.

    Returns False, with no effect, if Redis refuses a command or another client writes to `watched` before the end. A
    transaction that arrives after its sender gave up has no effect either, if the sender wrote to `watched`.
    Raises ResponseError if some commands failed at EXEC. Raises redis.ConnectionError or TimeoutError: the outcome is unknown.
    """
    connection = pool.get_connection()
    count, results = 0, None
    try:
        # Wait for these two replies: if Redis refused MULTI, it would run each command that follows at once.
        connection.send_packed_command([pack("WATCH", watched), pack("MULTI")])
        for _ in range(2):
            connection.read_response()
        for count, command in enumerate(commands, 1):  # noqa: B007
            connection.send_packed_command([command], check_health=False)  # a health check would wait for a reply
        connection.send_packed_command([pack("EXEC")], check_health=False)
        for _ in range(count):
            connection.read_response()
        results = connection.read_response()
    except ResponseError:
        return False
    finally:
        if results is None:
            connection.disconnect()
        pool.release(connection)
    for result in results or ():
        if isinstance(result, ResponseError):
            raise result
    return results is not None
