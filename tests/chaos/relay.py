"""A TCP relay between client and server that loses what a network can lose, at a moment of the test's choosing."""

import hashlib
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import dramatiq

ROOT = Path(__file__).parents[2]
STOCK = os.environ.get("EVALSTORE_CHAOS_BROKER") == "stock"
DISPATCH = Path(dramatiq.__file__).parent / "brokers/redis/dispatch.lua"
Loss = Literal["request", "reply", "hold"]


def script(name: str) -> bytes:
    """What a request to run a script of ours contains: its hash, as EVALSHA sends it. The stock broker's only one, for that."""
    if STOCK:
        return hashlib.sha1(DISPATCH.read_bytes()).hexdigest().encode()  # noqa: S324
    [path] = [path for room in ("worker", "tasks") for path in (ROOT / room / "lua").glob(f"{name}.lua")]
    return hashlib.sha1(path.read_bytes()).hexdigest().encode()  # noqa: S324  Redis names scripts so


class Relay:
    """Listens on a port of its own and forwards to `port`, both on 127.0.0.1."""

    def __init__(self, port: int) -> None:
        self.upstream = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Condition()
        self._rules: dict[bytes, tuple[Loss, int]] = {}
        self._seen: dict[bytes, int] = {}
        self._open: set[socket.socket] = set()
        self._away = False
        threading.Thread(target=self._accept, daemon=True).start()

    def lose(self, needle: bytes, loss: Loss, times: int = 1) -> None:
        """Of the next `times` requests that contain `needle`: break the connection before the server has read it, after it
        answered and before the client has the answer, or leave it and the answer where they are."""
        with self._lock:
            self._rules[needle], self._seen[needle] = (loss, times), 0

    def lost(self, needle: bytes) -> int:
        """How many were."""
        with self._lock:
            return self._seen.get(needle, 0)

    def cut(self) -> None:
        """Break every connection there is."""
        with self._lock:
            for sock in self._open:
                _close(sock)

    def away(self, away: bool) -> None:
        """Whether new connections are closed at once."""
        self._away = away
        if away:
            self.cut()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _close(self._listener)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._away:
                    client.close()
                    continue
                try:
                    server = socket.create_connection(("127.0.0.1", self.upstream))
                except OSError:
                    client.close()
                    continue
                for sock in (client, server):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                swallow = threading.Event()
                with self._lock:
                    self._open |= {client, server}
                threading.Thread(target=self._forward, args=(client, server, swallow), daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket, swallow: threading.Event) -> None:
        replies = threading.Thread(target=self._replies, args=(server, client, swallow), daemon=True)
        replies.start()
        self._requests(client, server, swallow)
        replies.join()
        with self._lock:
            self._open -= {client, server}
        client.close()
        server.close()

    def _requests(self, client: socket.socket, server: socket.socket, swallow: threading.Event) -> None:
        before, held = b"", False
        with suppress(OSError):
            while chunk := client.recv(65536):
                loss = self._match(before + chunk)
                before = b"" if loss else (before + chunk)[-64:]
                held = held or loss == "hold"
                if loss == "request":
                    break
                if held:
                    continue
                if loss == "reply":
                    swallow.set()
                server.sendall(chunk)
        _close(client)
        _close(server)

    def _replies(self, server: socket.socket, client: socket.socket, swallow: threading.Event) -> None:
        with suppress(OSError):
            while chunk := server.recv(65536):
                if swallow.is_set():
                    break
                client.sendall(chunk)
        _close(client)
        _close(server)

    def _match(self, text: bytes) -> Loss | None:
        with self._lock:
            for needle, (loss, times) in self._rules.items():
                if times > 0 and needle in text:
                    self._rules[needle] = (loss, times - 1)
                    self._seen[needle] += 1
                    return loss
        return None


def _close(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
