"""Receive traces and discard them: `python -m bench.collector` prints its port, and at the end the number of bytes received."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from bench.place import ROOT


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    received = 0

    def do_POST(self) -> None:
        _Handler.received += len(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *values: Any) -> None:
        pass


@contextmanager
def collecting() -> Iterator[dict[str, str]]:
    """Run a collector, and return the environment of processes that send traces to it."""
    command = [sys.executable, "-m", "bench.collector"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            port = process.stdout.readline().strip() if process.stdout else ""
            yield {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}
        finally:
            process.terminate()
            if not process.communicate(timeout=20)[0].strip("0\n"):
                raise RuntimeError("no traces were sent")


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(print(_Handler.received)))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
