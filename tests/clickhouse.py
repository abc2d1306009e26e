"""ClickHouse's engine (chdb) behind the part of its HTTP interface that the sink uses, as a process of its own.

    python -m tests.clickhouse PORT FOLDER

`make setup-integrations` installs chdb; without it the tests are skipped.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import HTTPError
from urllib.parse import parse_qsl, urlencode, urlsplit
from urllib.request import urlopen

from evalstore.local import processes
from evalstore.local.servers import Server, ServerState

ROOT = Path(__file__).parents[1]
_CODE = re.compile(r"Code: (\d+)\.")
# Settings of the HTTP interface itself.
_OF_HTTP = {"query", "database", "wait_end_of_query"}
USER, PASSWORD = "evalstore", "s3cret"


class ClickHouse(Server):
    """Like those of `evalstore up`. It asks for USER and PASSWORD."""

    name = "ClickHouse"
    stop_signal = signal.SIGTERM
    defaults: ClassVar = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def query(self, sql: str) -> list[dict[str, Any]]:
        """The rows of a query, as a client has them."""
        return [json.loads(line) for line in self.execute(f"{sql} FORMAT JSONEachRow").splitlines()]

    def execute(self, sql: str) -> bytes:
        """The answer to a statement."""
        words = urlencode({"query": sql, "user": USER, "password": PASSWORD})
        try:
            with urlopen(f"{self.url}/?{words}", data=b"", timeout=60) as answer:  # noqa: S310
                return bytes(answer.read())
        except HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.data.mkdir(mode=0o700, exist_ok=True)
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "tests.clickhouse", str(self.port), str(self.data)]
            return processes.start(
                command, mark=self.data, output=log, stop_signal=self.stop_signal, cwd=ROOT, env={**os.environ}
            )

    def _probe(self) -> ServerState:
        try:
            with urlopen(f"{self.url}/ping", timeout=2):  # noqa: S310
                return "ready"
        except OSError:
            return "silent"


def is_installed() -> bool:
    return find_spec("chdb") is not None


def main() -> None:
    from chdb import session  # noqa: PLC0415

    port, folder = int(sys.argv[1]), sys.argv[2]
    engine, lock = session.Session(folder), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(200, b"Ok.\n")

        def do_POST(self) -> None:
            given = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            user = given.pop("user", self.headers.get("X-ClickHouse-User"))
            password = given.pop("password", self.headers.get("X-ClickHouse-Key"))
            if (user, password) != (USER, PASSWORD):
                text = b"Code: 516. DB::Exception: Authentication failed: password is incorrect. (AUTHENTICATION_FAILED)"
                self._answer(403, text, 516)
                return
            query = given["query"]
            parameters = {name[6:]: given.pop(name) for name in list(given) if name.startswith("param_")}
            settings = ", ".join(f"{name} = '{value}'" for name, value in given.items() if name not in _OF_HTTP)
            if settings and query.startswith("INSERT"):
                query = re.sub(r" FORMAT ", f" SETTINGS {settings} FORMAT ", query, count=1)
            elif settings:
                query += f" SETTINGS {settings}"
            try:
                with lock:
                    found = engine.query(query + "\n" + body.decode("utf-8", "surrogateescape"), params=parameters)
                self._answer(200, found.bytes() or b"")
            except RuntimeError as error:
                code = int(match[1]) if (match := _CODE.search(str(error))) else 1000
                self._answer(404 if code == 60 else 500, str(error).encode(errors="replace"), code)

        def _answer(self, status: int, body: bytes, code: int | None = None) -> None:
            self.send_response(status)
            if code is not None:
                self.send_header("X-ClickHouse-Exception-Code", str(code))
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's signature
            pass

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
