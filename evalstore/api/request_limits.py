"""The id, size, pace and answer of every request, as ASGI middleware around the application.

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

# docs/decisions/0033 says what happens without these limits.
STEP_S: Final = 60.0
PACE_BYTES_S: Final = 16_384  # of a body, after the first STEP_S
# Read on for this time after an answer to an unfinished request. Closing the connection at once would lose the answer.
LINGER_S: Final = 2.0

_SOCKET_BUFFER_BYTES: Final = 65_536
_SLICE_BYTES: Final = 262_144
_REQUEST_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")

Observe = Callable[[Scope, int, float], None]  # the request, the status (0: no answer), seconds


class RequestLimitsMiddleware:
    """Gives each request an id, and enforces its limits."""

    def __init__(self, app: ASGIApp, *, max_request_bytes: int, observe: Observe) -> None:
        self._app, self._max_request_bytes, self._observe = app, max_request_bytes, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._max_request_bytes)
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
            # Answer HEAD like GET, but without a body (RFC 9110, 9.3.2) and without ranges (14.2).
            scope = {**scope, "method": "GET", "headers": [header for header in scope["headers"] if header[0] != b"range"]}
        self.scope = scope
        self._receive, self._send, self._max_bytes = receive, send, max_bytes
        self._read = 0
        self._all_read = False
        self._time_left_s = STEP_S
        self._answered = False
        self.status = 0
        own_id = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        self.request_id = own_id.decode() if _REQUEST_ID.fullmatch(own_id) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = self.request_id

    async def run(self, app: ASGIApp) -> None:
        with contextlib.suppress(_HeadAnswered):
            try:
                self._check_content_length()
                await app(self.scope, self.receive, self.send)
            except Exception as error:  # noqa: BLE001 - every request is answered
                if self._answered:
                    return
                if self.status:
                    cause = error.__cause__ or error
                    log.warning("response_aborted", request_id=self.request_id, kind=type(cause).__name__, error=cause)
                    # The server then closes the connection. The client must not take the answer for complete.
                    raise _RequestAborted from None
                await problems.response(problems.of(error), self.request_id)(self.scope, self.receive, self.send)

    def _check_content_length(self) -> None:
        for name, value in self.scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self._max_bytes:
                raise self._too_large()

    def _too_large(self) -> Problem:
        return Problem(413, "too-large", f"a request may have {self._max_bytes:,} bytes", headers={"Connection": "close"})

    async def receive(self) -> Message:
        if self._all_read:
            return await self._receive()  # the client's disconnect, which Starlette waits for during a stream
        started = time.monotonic()
        try:
            async with asyncio.timeout(min(STEP_S, self._time_left_s)):
                message = await self._receive()
        except TimeoutError:
            detail = f"the body arrived too slowly: nothing for {STEP_S:g} s, or less than {PACE_BYTES_S:,} bytes a second"
            raise Problem(408, "too-slow", detail, headers={"Connection": "close"}) from None
        self._time_left_s += len(message.get("body", b"")) / PACE_BYTES_S - (time.monotonic() - started)
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
                *((name.lower().encode(), value.encode()) for name, value in self._rate_headers().items()),
            ]
            await self._send(message)
            return
        if self._is_head:
            await self._send({"type": "http.response.body"})
            raise _HeadAnswered
        more = message.get("more_body", False)
        if not more and not self._all_read and self._has_unread_body():
            await self._send_slices({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b""}
        if more or len(message.get("body", b"")) > _SOCKET_BUFFER_BYTES:
            self._answered = not more
            await self._send_slices(message)
        else:
            self._answered = True
            await self._send(message)  # Small: the socket's buffer takes it without a time-out.

    def _rate_headers(self) -> dict[str, str]:
        """Return the fields that tell the rate of the caller's key. An answer 429 has its own."""
        found: dict[str, str] = self.scope["state"].get("rate_headers", {})
        return found

    def _has_unread_body(self) -> bool:
        """Tell whether the client sends more than was read.

        A client that sent `Expect` waits for permission, which it did not get.
        """
        names = {name for name, _ in self.scope["headers"]}
        waits = b"expect" in names and not self._read
        return not waits and bool(names & {b"content-length", b"transfer-encoding"})

    async def _linger(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (message := await self._receive())["type"] == "http.request" and message.get("more_body", False):
                    pass

    async def _send_slices(self, message: Message) -> None:
        """Send in slices, so that the time-out is for a slice and not for the whole answer."""
        body, more = message.get("body", b""), message.get("more_body", False)
        for start in range(0, len(body) or 1, _SLICE_BYTES):
            slice_ = body[start : start + _SLICE_BYTES]
            async with asyncio.timeout(STEP_S):
                await self._send({**message, "body": slice_, "more_body": more or start + _SLICE_BYTES < len(body)})
            await asyncio.sleep(0)  # Notice a disconnect: asyncio warns of each write to a closed connection.


class _RequestAborted(Exception):
    """The answer could not be finished."""


class _HeadAnswered(BaseException):
    """Stops the application after the headers of HEAD. Middleware would catch an Exception and log or answer it."""
