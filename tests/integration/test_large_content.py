"""100 MiB of content go from a sender to the store and back, and neither the worker nor the reader holds them."""

import base64
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import psycopg
import pytest

from evalstore.local import processes
from models.content import MAX_CONTENT_BYTES
from models.settings import settings
from tasks import store_evaluation
from tasks.broker import broker

ROOT = Path(__file__).parents[2]
MIB = 1024 * 1024


@pytest.fixture(params=["file", "s3"])
def worker(
    request: pytest.FixtureRequest, tmp_path: Path, database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    """A worker with an object store, the same that this process sends with; the id of its guard."""
    given = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "OBJECT_STORE_URL": f"file://{tmp_path}/objects"}
    if request.param == "s3":
        given["OBJECT_STORE_URL"] = request.getfixturevalue("s3_url")
        given["S3_ENDPOINT_URL"] = request.getfixturevalue("s3_server").endpoint
    for name, value in given.items():
        monkeypatch.setenv(f"EVALSTORE_{name}", value)
    forget()
    log = tmp_path / "worker.log"
    command = [sys.executable, "-m", "dramatiq", "worker.tasks", "--processes", "1", "--threads", "2"]
    with log.open("wb") as output:
        guard = processes.start(command, mark=tmp_path, output=output, cwd=ROOT, env=dict(os.environ))
    yield guard.pid
    guard.terminate()
    guard.wait()
    broker().client.close()
    monkeypatch.undo()
    forget()
    print(log.read_text(errors="replace")[-4000:])


def forget() -> None:
    settings.cache_clear()
    broker.cache_clear()


def memory(pid: int) -> int:
    """The most that the largest process of a worker has had so far."""
    return max(peak(Path(f"/proc/{one.pid}/status").read_text()) for one in psutil.Process(pid).children(recursive=True))


def peak(status: str) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def stored(database_url: str) -> int:
    with psycopg.connect(database_url) as conn:
        return len(conn.execute("SELECT 1 FROM contents WHERE store = 'objects' AND data IS NULL").fetchall())


READ = """
import sys
from evalstore.cli.app import main
try:
    main()
finally:
    print(open("/proc/self/status").read(), file=sys.stderr)
"""


def read(eval_id: str, to: Path) -> int:
    """Let `evalstore get --output` write to a file; returns the most memory it had."""
    with to.open("wb") as output:
        command = [sys.executable, "-c", READ, "get", eval_id, "--output"]
        return peak(subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=True, cwd=ROOT).stderr)


def test_100_mib_come_back_byte_for_byte_and_are_in_nobodys_memory(
    worker: int, database_url: str, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    block = b"".join(hashlib.sha256(bytes([number % 256, number // 256])).digest() for number in range(65_536))
    data = block * (MAX_CONTENT_BYTES // len(block))
    assert len(data) == MAX_CONTENT_BYTES
    ended = {"type": "evaluation:completed", "exit_code": 0}
    for number in range(20):  # Load everything that a worker needs first.
        store_evaluation.send(ended | {"eval_id": f"small-{number}", "output": f"{number}" * 70_000})
    eventually(lambda: stored(database_url) == 20, within_s=60)
    before = memory(worker)
    store_evaluation.send(ended | {"eval_id": "large", "output_b64": base64.b64encode(data).decode()})
    eventually(lambda: stored(database_url) == 21, within_s=120)
    assert memory(worker) - before < 32 * MIB

    least = read("small-7", tmp_path / "small")
    assert (tmp_path / "small").read_bytes() == b"7" * 70_000
    most = read("large", tmp_path / "large")
    assert hashlib.sha256((tmp_path / "large").read_bytes()).digest() == hashlib.sha256(data).digest()
    assert most - least < 64 * MIB
    print(f"worker: {(memory(worker) - before) / MIB:.1f} MiB more, reader: {(most - least) / MIB:.1f} MiB more")
