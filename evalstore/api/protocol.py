"""Uvicorn's HTTP/1.1 with a time limit for the head of a request, and problems for malformed requests.

Use it as `uvicorn evalstore.api.app:app --http evalstore.api.protocol:Protocol`. Uvicorn has no such limit. So connections
that send a byte now and then, without any key, take all file descriptors: docs/decisions/0033.
"""

from models.extras import require

require("api")

import asyncio
from typing import Any, Final
from uuid import uuid4

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from evalstore.api import problems
from evalstore.api.problems import Problem

HEAD_S: Final = 30.0  # from the connection, or the first byte of a further request, to the end of the head


class Protocol(H11Protocol):
    """One connection."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_S, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self.transport.close)

    def shutdown(self) -> None:
        """Begin a graceful shutdown. Requests that wait for changes, which may last for ever, end now."""
        super().shutdown()
        if stop_following := self.app_state.get("stop_following"):
            stop_following()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's signature
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            request_id, problem = (
                uuid4().hex,
                Problem(400, "malformed", "not a valid HTTP/1.1 request, or its head is too large"),
            )
            response = problems.response(problem, request_id)
            headers: list[Any] = [*response.raw_headers, (b"x-request-id", request_id.encode()), (b"connection", b"close")]
            answer = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (answer, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
