"""What holds for every request, as plain ASGI around the application: its id, its size, its pace, and that it is answered.

https://asgi.readthedocs.io/en/stable/specs/www.html
"""

import asyncio
import contextlib
import re
import time
from collections.abc import Callable
from typing import Final
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evalstore.api import problems
from evalstore.api.problems import Problem
from models.logs import EventLogger

log = EventLogger("evalstore.api")

# A client that is slower than this at a single step has gone, or wants to hold us.
STEP_S: Final = 60.0
# Beyond that, a body may take as long as it takes at this pace: a byte now and then must not hold what others wait for.
PACE_BYTES_S: Final = 16_384
# For how long what a client still sends is read after it was answered. A connection closed at once takes the answer with it.
LINGER_S: Final = 2.0

_AT_ONCE: Final = 65_536
_SLICE: Final = 262_144
_REQUEST_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")

Observe = Callable[[Scope, int, float], None]  # the request, the status of its answer (0: none), seconds


class RequestLimitsMiddleware:
    """The outermost application: gives each request its id and its limits."""

    def __init__(self, app: ASGIApp, *, max_request_bytes: Callable[[], int], observe: Observe) -> None:
        self._app, self._max_request_bytes, self._observe = app, max_request_bytes, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._max_request_bytes())
        started = time.perf_counter()
        try:
            await exchange.run(self._app)
        finally:
            self._observe(exchange.scope, exchange.status, time.perf_counter() - started)


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_bytes: int) -> None:
        self._is_head = scope["method"] == "HEAD"
        if self._is_head:
            # The answer is the same, up to its body (RFC 9110, 9.3.2); ranges are for GET alone (14.2).
            scope = {**scope, "method": "GET", "headers": [one for one in scope["headers"] if one[0] != b"range"]}
        self.scope = scope
        self._receive, self._send, self._max_bytes = receive, send, max_bytes
        self._read = 0
        self._all_read = False
        self._patience_s = STEP_S
        self._answered = False
        self.status = 0
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        self.request_id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = self.request_id

    async def run(self, app: ASGIApp) -> None:
        with contextlib.suppress(_HeadAnswered):
            try:
                self._check_announced()
                await app(self.scope, self.receive, self.send)
            except Exception as error:  # noqa: BLE001 - every request is answered
                if self._answered:
                    return  # with a problem; what it was is in the log
                if self.status:
                    why = error.__cause__ or error  # Starlette says no more than that it came too late to be answered
                    log.warning("response_aborted", request_id=self.request_id, kind=type(why).__name__, error=why)
                    raise _RequestAborted from None  # the server closes the connection: an answer cut short must not look whole
                await problems.response(problems.of(error), self.request_id)(self.scope, self.receive, self.send)

    def _check_announced(self) -> None:
        for name, value in self.scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self._max_bytes:
                raise self._too_large()

    def _too_large(self) -> Problem:
        return Problem(413, "too-large", f"a request may hold {self._max_bytes:,} bytes", headers={"Connection": "close"})

    async def receive(self) -> Message:
        if self._all_read:
            return await self._receive()  # until the client goes away: whoever streams an answer waits for that beside it
        begun = time.monotonic()
        try:
            async with asyncio.timeout(min(STEP_S, self._patience_s)):
                message = await self._receive()
        except TimeoutError:
            detail = f"nothing came for {STEP_S:g} s, or less than {PACE_BYTES_S:,} bytes a second"
            raise Problem(408, "too-slow", detail, headers={"Connection": "close"}) from None
        self._patience_s += len(message.get("body", b"")) / PACE_BYTES_S - (time.monotonic() - begun)
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            self._all_read = not message.get("more_body", False)
            if self._read > self._max_bytes:
                raise self._too_large()
        else:
            self._all_read = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [
                *message.get("headers", ()),
                (b"x-request-id", self.request_id.encode()),
                (b"x-content-type-options", b"nosniff"),
            ]
            await self._send(message)
            return
        if self._is_head:
            await self._send({"type": "http.response.body"})
            raise _HeadAnswered  # so that nothing more of it is read
        more = message.get("more_body", False)
        if not more and not self._all_read and self._is_sending():
            await self._pass_on({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b""}
        if more or len(message.get("body", b"")) > _AT_ONCE:
            self._answered = not more
            await self._pass_on(message)
        else:
            self._answered = True
            await self._send(message)  # it fits into the socket's buffer: nobody has to wait for the client

    def _is_sending(self) -> bool:
        """Whether the client has more to send than was read."""
        names = {name for name, _ in self.scope["headers"]}
        waits = b"expect" in names and not self._read  # for a leave it was not given
        return not waits and bool(names & {b"content-length", b"transfer-encoding"})

    async def _linger(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (message := await self._receive())["type"] == "http.request" and message.get("more_body", False):
                    pass

    async def _pass_on(self, message: Message) -> None:
        """In slices: of each the client has to take something in time, not of all there is."""
        body, more = message.get("body", b""), message.get("more_body", False)
        for start in range(0, len(body) or 1, _SLICE):
            slice_ = body[start : start + _SLICE]
            async with asyncio.timeout(STEP_S):
                await self._send({**message, "body": slice_, "more_body": more or start + _SLICE < len(body)})
            await asyncio.sleep(0)  # or it is written on to who has gone, unseen, which asyncio complains of each time


class _RequestAborted(Exception):
    """The answer could not be finished."""


class _HeadAnswered(BaseException):
    """That was all. No error, which somebody on the way would log or answer."""
