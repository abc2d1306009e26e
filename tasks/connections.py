"""Connections to Redis that keep to a time, and commands packed for them."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from redis import ResponseError
from redis.connection import AbstractConnection


class _Time(threading.local):
    until = math.inf
    more_s = 0.0

    def left_s(self) -> float:
        return max(self.until - time.monotonic(), 0.001)


_time = _Time()


@contextmanager
def deadline(timeout_s: float, more_s: float) -> Iterator[None]:
    """Whatever this thread waits for on its connections ends after both together; each step may take that much more."""
    _time.until, _time.more_s = time.monotonic() + timeout_s + more_s, more_s
    try:
        yield
    finally:
        _time.until, _time.more_s = math.inf, 0.0


class DeadlineConnection(AbstractConnection):
    """What makes a connection keep to that. Redis's own time-outs are for each step: a slow server has many, and the look-up of
    its name has none."""

    def _connect(self) -> Any:
        connect: Callable[[], Any] = super()._connect  # type: ignore[safe-super]
        if _time.until == math.inf:
            return connect()
        connected: Future[Any] = Future()
        threading.Thread(target=_settle, args=(connected, connect), daemon=True).start()
        try:
            return connected.result(timeout=_time.left_s())
        except TimeoutError:
            connected.add_done_callback(_close)
            raise

    def send_packed_command(self, *given: Any, **options: Any) -> None:
        self._limit()
        super().send_packed_command(*given, **options)  # type: ignore[no-untyped-call]

    def read_response(self, *given: Any, **options: Any) -> Any:
        self._limit()
        return super().read_response(*given, **options)

    def _limit(self) -> None:
        if self._sock:
            wait_s = min(self.socket_timeout + _time.more_s, _time.left_s())
            if self._sock.gettimeout() != wait_s:
                self._sock.settimeout(wait_s)


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except Exception as error:  # noqa: BLE001 - raised again where it is waited for
        future.set_exception(error)


def _close(connected: Future[Any]) -> None:
    if not connected.exception():
        connected.result().close()


def as_bytes(answer: str | bytes) -> bytes:
    """What Redis said, also where a client decodes what it says."""
    return answer.encode(errors="surrogateescape") if isinstance(answer, str) else answer


def packed(*arguments: str | bytes) -> bytes:
    """A command as Redis reads it. What redis-py does it with takes five times as long for some thousands of arguments."""
    parts = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        data = argument.encode() if isinstance(argument, str) else argument
        parts += (b"$%d\r\n" % len(data), data, b"\r\n")
    return b"".join(parts)


def transact(connection: AbstractConnection, watched: str, commands: Iterable[bytes]) -> bool:
    """Run packed commands in one transaction. Each is sent while Redis reads those before; all are run at the end, or none.

    False if none was: Redis refused something, or `watched` was written to meanwhile; that also where this reaches Redis long
    after its sender gave it up. Raises ResponseError if some failed when they were run, or what went wrong with the
    connection, and then nobody knows. The connection is broken off where Redis does not say that they were run.
    """
    number, answers = 0, None
    try:
        # By themselves, and waited for: where these are refused, each that follows would be run at once.
        connection.send_packed_command([packed("WATCH", watched), packed("MULTI")])
        for _ in range(2):
            connection.read_response()
        for number, command in enumerate(commands, 1):  # noqa: B007
            connection.send_packed_command([command], check_health=False)  # that would wait for an answer of its own
        connection.send_packed_command([packed("EXEC")], check_health=False)
        for _ in range(number):
            connection.read_response()
        answers = connection.read_response()
    except ResponseError:
        return False
    finally:
        if answers is None:
            connection.disconnect()
    for answer in answers or ():
        if isinstance(answer, ResponseError):
            raise answer
    return answers is not None
