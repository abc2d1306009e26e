"""An HTTP relay between a client and an S3 server that does what networks and busy servers do, when a test says so."""

import http.client
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import boto3  # type: ignore[import-untyped]
from botocore.auth import S3SigV4Auth  # type: ignore[import-untyped]
from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]

Action = Literal[
    "answer", "hold", "cut", "spoil the answer", "spoil the request", "lose the answer", "reset", "ignore", "strip"
]


class Fault(NamedTuple):
    """`at`: of an answer, its status and code; of a body that is cut or spoiled, where, from its begin (or, below 0, end).

    "ignore" drops the headers `names` from the request, "strip" from the answer; without Content-Length that is chunked.
    """

    action: Action
    at: tuple[int, str] | int = 0
    names: tuple[str, ...] = ()


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]


class S3Relay:
    """Listens on a port of its own and forwards to `port`, both on 127.0.0.1. `seen` are the requests that came in."""

    def __init__(self, port: int) -> None:
        self._lock = threading.Lock()
        self._rules: list[list[Any]] = []
        self.seen: list[Request] = []
        self.done = threading.Event()
        handler = type("Handler", (_Handler,), {"relay": self, "upstream": port})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fail(self, which: Callable[[Request], bool], fault: Fault, times: int = 1_000_000) -> None:
        """Of the requests to come that `which` picks, let the first `times` fare so."""
        with self._lock:
            self._rules.append([which, fault, times])

    def heal(self) -> None:
        with self._lock:
            self._rules.clear()

    def fault_of(self, request: Request) -> Fault | None:
        with self._lock:
            self.seen.append(request)
            for rule in self._rules:
                which, fault, times = rule
                if times > 0 and which(request):
                    rule[2] -= 1
                    return Fault(*fault)
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.done.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is what the test asked for."""


class _Handler(BaseHTTPRequestHandler):
    relay: S3Relay
    upstream: int
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Tests tell what matters."""

    def _relay(self) -> None:
        fault = self.relay.fault_of(Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        if fault and fault.action == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        body = bytearray(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        if fault and fault.action == "hold":
            self.close_connection = True
            self.relay.done.wait(30)
            return
        if fault and fault.action == "answer" and isinstance(fault.at, tuple):
            status, code = fault.at
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no such header here</Message></Error>".encode()
            self._answer(status, [("Content-Type", "application/xml")], text, len(text))
            return
        if fault and fault.action == "spoil the request" and body:
            body[len(body) // 2] ^= 1
        status, headers, data = self._forward(bytes(body), fault.names if fault and fault.action == "ignore" else ())
        if fault and fault.action == "lose the answer":
            self.close_connection = True
            return
        length, at = len(data), fault.at if fault and isinstance(fault.at, int) else 0
        if fault and fault.action == "cut":
            data = data[:at]
            self.close_connection = True
        if fault and fault.action == "spoil the answer" and data:
            spoiled = bytearray(data)
            spoiled[at] ^= 1
            data = bytes(spoiled)
        self._answer(status, headers, data, length, fault.names if fault and fault.action == "strip" else ())

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _relay  # noqa: N815  names of http.server

    def _signed_without(self, ignored: tuple[str, ...], body: bytes) -> dict[str, str]:
        """The headers as of a client that did not send those."""
        left_out = {*ignored, "authorization", "x-amz-date", "x-amz-content-sha256", "connection", "expect"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in left_out}
        request = AWSRequest(self.command, f"http://{self.headers['Host']}{self.path}", headers, body)
        S3SigV4Auth(boto3.session.Session().get_credentials(), "s3", "us-east-1").add_auth(request)
        return dict(request.headers.items())

    def _forward(self, body: bytes, ignored: tuple[str, ...] = ()) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=30)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in (self._signed_without(ignored, body) if ignored else self.headers).items():
            if name.lower() not in {"expect", "connection"}:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), data

    def _answer(
        self, status: int, headers: list[tuple[str, str]], data: bytes, length: int, stripped: tuple[str, ...] = ()
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in {"content-length", "transfer-encoding", "connection", *stripped}:
                self.send_header(name, value)
        stated = dict(headers).get("Content-Length", str(length)) if self.command == "HEAD" else str(length)
        is_chunked = "content-length" in stripped and self.command == "GET"
        self.send_header(*(("Transfer-Encoding", "chunked") if is_chunked else ("Content-Length", stated)))
        self.end_headers()
        self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if is_chunked and data else data)
