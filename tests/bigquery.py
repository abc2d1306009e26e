"""A BigQuery on this machine: bqemulator, with the extensions of DuckDB from their wheels.

`make setup-integrations` installs it, and Google's clients; without them the tests are skipped. A restart keeps its tables and
loses its streams. All requests share a connection, so a query beside an append may return the answer to the append.
"""

import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from evalstore.local import processes
from evalstore.local.servers import Server, ServerState, free_port
from models import extras

if TYPE_CHECKING:
    from google.cloud.bigquery import Client

PROGRAM = Path(__file__).parents[1] / ".tools/bqemulator/bin/bqemulator"
PROJECT = "evaluations"
_EXTENSIONS = ("spatial", "icu", "json")


class BigQuery(Server):
    """Like those of `evalstore up`; `port` is that of REST, `storage_port` that of gRPC."""

    name = "bqemulator"
    stop_signal = signal.SIGTERM
    defaults: ClassVar = {}
    storage_port = 0

    @property
    def keys(self) -> dict[str, str]:
        """The keys of a sink."""
        return {
            "type": "bigquery",
            "project": PROJECT,
            "api_endpoint": f"http://127.0.0.1:{self.port}",
            "storage_endpoint": f"127.0.0.1:{self.storage_port}",
        }

    def client(self) -> "Client":
        from google.api_core.client_options import ClientOptions  # noqa: PLC0415 - they may be missing
        from google.auth.credentials import AnonymousCredentials  # noqa: PLC0415
        from google.cloud.bigquery import Client  # noqa: PLC0415

        at = ClientOptions(api_endpoint=f"http://127.0.0.1:{self.port}")
        return Client(PROJECT, credentials=AnonymousCredentials(), client_options=at)

    def query(self, sql: str) -> list[dict[str, Any]]:
        client = self.client()
        try:
            return [dict(row) for row in client.query(sql).result()]
        finally:
            client.close()

    def _spawn(self) -> subprocess.Popen[bytes]:
        # DuckDB looks for extensions in the home, and would download those that it does not find.
        environment = {**os.environ, "HOME": str(self.folder)}
        if not (self.folder / ".duckdb").exists():
            imports = f"import duckdb_extensions as d\nfor name in {_EXTENSIONS}: d.import_extension(name)"
            subprocess.run([PROGRAM.with_name("python"), "-c", imports], env=environment, check=True, cwd=self.folder)
        self.data.mkdir(mode=0o700, exist_ok=True)
        self.storage_port = self.storage_port or free_port()
        given = ["--rest-port", str(self.port), "--grpc-port", str(self.storage_port), "--persistent", "--log-level", "error"]
        with self.log.open("ab") as log:
            command: list[str | Path] = [PROGRAM, "start", *given, "--data-dir", self.data]
            return processes.start(
                command, mark=self.data, output=log, stop_signal=self.stop_signal, cwd=self.folder, env=environment
            )

    def _probe(self) -> ServerState:
        for port in (self.port, self.storage_port):
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex(("127.0.0.1", port)) != 0:
                    return "silent"
        return "ready"


def is_installed() -> bool:
    return PROGRAM.exists() and extras.is_installed("bigquery")
