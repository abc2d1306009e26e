"""One HTTP request to a receiver that is not trusted: it cannot lead the request elsewhere, nor keep it open.

httpcore follows no redirect and reads no proxy settings. Each request resolves the name once, checks the addresses and connects
to one of them. The Host header, SNI and the certificate's name stay those of the URL.
"""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any, Final, NamedTuple

import httpcore

from models.errors import printable
from models.networks import Network
from models.webhooks import AddressRefused, check_address

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

_CONNECT_S: Final = 5.0
_ADDRESSES: Final = 4
# A receiver that closes properly can end its answer. Beyond this the connection breaks.
_BODY_BYTES: Final = 4096
_BODY_S: Final = 1.0


class Answer(NamedTuple):
    """The status of an answer, or why there is none. `error` is None for 2xx alone."""

    status_code: int | None
    error: str | None


def resolver(threads: Executor) -> Resolve:
    """Return the system's resolver, which blocks threads of `threads`."""

    async def resolve(host: str, port: int) -> list[str]:
        call = asyncio.get_running_loop().run_in_executor(threads, _addresses, host, port)
        return await call

    return resolve


def _addresses(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects to the addresses that it checked."""

    def __init__(self, resolve: Resolve, networks: Sequence[Network], *, is_tls: bool) -> None:
        self._resolve, self._networks, self._is_tls = resolve, networks, is_tls
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._resolve(host, port)
        for address in addresses:
            check_address(address, self._networks, is_tls=self._is_tls)
        failure: Exception = httpcore.ConnectError("the name has no address")
        for address in addresses[:_ADDRESSES]:
            try:
                return await self._backend.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


class Requests(NamedTuple):
    """The limits of requests. `timeout_s` covers a request from the look-up of the name to the head of the answer."""

    resolve: Resolve
    networks: Sequence[Network]
    tls: ssl.SSLContext
    timeout_s: float

    async def post(self, url: str, headers: Mapping[str, str], content: bytes) -> Answer:
        """Send a POST with a JSON body. Raises nothing but cancellation."""
        target = httpcore.URL(url)
        backend = _CheckedBackend(self.resolve, self.networks, is_tls=target.scheme == b"https")
        connection = httpcore.AsyncHTTPConnection(
            target.origin, ssl_context=self.tls, http1=True, http2=False, network_backend=backend
        )
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._exchange(connection, target, headers, content)
        except TimeoutError:
            return Answer(None, f"no answer within {self.timeout_s:g} s")
        except AddressRefused as error:
            return Answer(None, f"address refused: {error}")
        except (socket.gaierror, UnicodeError) as error:
            return Answer(None, f"the name cannot be resolved: {error}")
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            return Answer(None, printable(f"{type(error).__name__}: {error}".rstrip(": "))[:500])
        finally:
            with suppress(Exception):
                await connection.aclose()

    async def _exchange(
        self, connection: httpcore.AsyncHTTPConnection, target: httpcore.URL, headers: Mapping[str, str], content: bytes
    ) -> Answer:
        sent = {"content-type": "application/json", "user-agent": "evalstore-webhooks", "connection": "close", **headers}
        limits = {"connect": min(_CONNECT_S, self.timeout_s), "read": self.timeout_s, "write": self.timeout_s}
        async with connection.stream(
            "POST", target, headers=list(sent.items()), content=content, extensions={"timeout": limits}
        ) as response:
            status = response.status
            with suppress(TimeoutError, httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException):
                await _drain(response)
        if 200 <= status < 300:
            return Answer(status, None)
        hint = ": redirects are not followed" if 300 <= status < 400 else ""
        return Answer(status, f"the receiver answered {status}{hint}")


async def _drain(response: httpcore.Response) -> None:
    size = 0
    async with asyncio.timeout(_BODY_S):
        async for piece in response.aiter_stream():
            size += len(piece)
            if size >= _BODY_BYTES:
                return
