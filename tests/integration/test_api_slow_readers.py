"""Clients that read large content slowly, many of them: what they cost, and what they leave to others."""

import base64
import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from evalstore.objects import object_store
from evalstore.objects.object_store import Stores
from evalstore.storage import database
from models.content import FRAME_BYTES
from models.settings import Settings
from tests.integration.test_reading_objects import store

E = "/storage/evaluations"
MIB = 1024 * 1024
READERS = 100
# Random bytes do not compress, so frames have the largest size.
LARGE = os.urandom(FRAME_BYTES) * 6
PACKED = b"the database unpacks it in large pieces\n" * 500_000


class SlowReader:
    """A client of its own that has asked for some content, and takes next to nothing of it."""

    def __init__(self, port: int, path: str) -> None:
        self._conn = socket.socket()
        self._conn.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._conn.settimeout(60)
        self._conn.connect(("127.0.0.1", port))
        self._conn.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: read-key-0001\r\n\r\n".encode())

    def begin(self) -> bytes:
        """Its status line, once the answer has begun."""
        return self._conn.recv(12)

    def rest(self) -> bytes:
        """The body, read to the end as fast as it comes."""
        received = bytearray()
        while b"\r\n\r\n" not in received or len(received) < received.index(b"\r\n\r\n") + 4 + len(LARGE):
            received += self._conn.recv(MIB) or pytest.fail("the answer broke off")
        return bytes(received[received.index(b"\r\n\r\n") + 4 :])

    def close(self) -> None:
        self._conn.close()


@pytest.mark.parametrize("place", ["file", "s3"])
def test_a_hundred_clients_that_read_large_content_slowly_cost_little_and_keep_nobody_from_it(
    place: str, request: Any, tmp_path: Path, start_api: Callable[..., Any], peak_rss: Any, eventually: Callable[..., None]
) -> None:
    given = {"EVALSTORE_OBJECT_STORE_URL": f"file://{tmp_path}/objects"}
    if place == "s3":
        given["EVALSTORE_OBJECT_STORE_URL"] = request.getfixturevalue("s3_url")
        given["EVALSTORE_S3_ENDPOINT_URL"] = request.getfixturevalue("s3_server").endpoint
    api = start_api(**given)
    engine = database.engine(api.database_url)
    stores = Stores(Settings.from_environment(given))
    store(
        engine,
        "e",
        output_ref=object_store.put(stores["objects"], LARGE).reference,
        error_b64=base64.b64encode(PACKED).decode(),
    )
    stores.close()
    engine.dispose()
    assert api.read.get(f"{E}/e/output").content == LARGE  # Load all modules first.
    service = psutil.Process(api.pid)
    with contextlib.ExitStack() as stack, peak_rss(api.pid) as peak:
        slow = []
        for number in range(READERS):
            slow.append(SlowReader(api.port, f"{E}/e/{'error' if number % 4 == 3 else 'output'}"))
            stack.callback(slow[-1].close)
        begun = [threading.Thread(target=one.begin) for one in slow]
        for thread in begun:
            thread.start()
        for thread in begun:
            thread.join()
        # A fast reader does not wait for slow readers.
        assert api.client("read-key-0001").get(f"{E}/e/output").content == LARGE
        assert service.num_threads() < READERS / 2
        at_s3 = given.get("EVALSTORE_S3_ENDPOINT_URL", "").rpartition(":")[2]
        to_s3 = [one for one in service.net_connections("tcp") if one.raddr and str(one.raddr.port) == at_s3]
        assert len(to_s3) < READERS / 2
        assert slow[0].rest() == LARGE
    print(f"{place}: {peak.grown_bytes / MIB:.0f} MiB more, {len(to_s3)} connections to S3")
    assert peak.grown_bytes < 4 * MIB * READERS
    eventually(lambda: service.num_fds() < READERS / 2, what="an end of all they held open")
    assert "unexpected error" not in api.said
