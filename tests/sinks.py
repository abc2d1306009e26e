"""Runners of sinks, and a kind of sink that tests steer: it appends events to a file, and does what files beside it say."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from evalstore.local import processes

ROOT = Path(__file__).parents[1]
# FILE.away: it is away; FILE.hangs: it does not come back, and makes FILE.hung; FILE.refused: ids of events that it refuses.
_STEERED = """
import json, os, pathlib, time
from evalstore.sinks import BadMessage, Outage

class Steered:
    def __init__(self, name, options):
        self.path = pathlib.Path(options.model_extra["path"])

    def is_told(self, what):
        return pathlib.Path(f"{self.path}.{what}").exists()

    def write(self, batch):
        while self.is_told("hangs"):
            pathlib.Path(f"{self.path}.hung").touch()
            time.sleep(0.05)
        if self.is_told("away"):
            raise Outage("it is away")
        if self.is_told("refused"):
            refused = set(pathlib.Path(f"{self.path}.refused").read_text().split())
            if any(event.event_id in refused for event in batch):
                raise BadMessage("it does not fit")
        now = time.time()
        lines = [json.dumps(event.fields | {"at": now, "pid": os.getpid()}).encode() for event in batch]
        with self.path.open("ab") as file:
            file.write(b"".join(line + b"\\n" for line in lines))

    def erase(self, eval_id):
        with self.path.open("ab") as file:
            file.write(json.dumps({"eval_id": eval_id, "erased": True}).encode() + b"\\n")
"""


def installed(folder: Path) -> dict[str, str]:
    """The environment in which two packages with kinds of sinks are installed: `steered`, and the example's `jsonl`."""
    found = folder / "installed"
    if not found.exists():
        info = found / "sinks_of_tests-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sinks-of-tests\nVersion: 1\n")
        points = "[evalstore.sinks]\nsteered = steered_sink:Steered\njsonl = evalstore_sink_jsonl:JsonLines\n"
        (info / "entry_points.txt").write_text(points)
        (found / "steered_sink.py").write_text(_STEERED)
    return {"PYTHONPATH": f"{found}:{ROOT / 'examples/sink_jsonl'}:{ROOT}"}


class Runner:
    """`evalstore sinks run` as a process of its own."""

    def __init__(self, folder: Path, environment: Mapping[str, str], sinks: str) -> None:
        self.folder, self.file, self.log = folder, folder / "sinks.toml", folder / "sinks.log"
        self.file.write_text(sinks)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("EVALSTORE_")},
            "EVALSTORE_SINKS_METRICS_PORT": "0",
            "EVALSTORE_RUNTIME_DIR": str(folder / "run"),
            **environment,
            **installed(folder),
            "EVALSTORE_SINKS_FILE": str(self.file),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            command = [sys.executable, "-c", "from evalstore.cli.entry import main; main()", "sinks", "run"]
            self._process = processes.start(command, mark=self.folder, output=log, env=self.environment, cwd=self.folder)

    def kill(self) -> None:
        """As a crash would."""
        if self._process is not None:
            processes.kill_now(self._process)
            self._process.wait()

    def freeze(self) -> None:
        assert self._process is not None
        processes.freeze(self._process)

    def thaw(self) -> None:
        assert self._process is not None
        processes.thaw(self._process)

    def stop(self) -> int:
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(timeout=30)


def received(path: Path) -> list[dict[str, Any]]:
    """The lines that a sink wrote, but for one that a kill cut short."""
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in whole.splitlines()]


def firsts(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each event where it was received first."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        found.setdefault((line["eval_id"], line["event_id"]), line)
    return list(found.values())


def versions(lines: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Of each evaluation the versions, in the order in which its events were received first."""
    found: dict[str, list[int]] = {}
    for line in firsts(lines):
        found.setdefault(line["eval_id"], []).append(line["version"])
    return found


# It holds up the cursor after a batch, as long as somebody has the advisory lock 15.
HOLD_CURSOR = """
CREATE FUNCTION hold_cursor() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM pg_advisory_xact_lock(15); RETURN NEW; END $$;
CREATE TRIGGER hold_cursor BEFORE UPDATE ON sinks FOR EACH ROW
    WHEN (OLD.batch_limit IS NOT NULL AND NEW.batch_limit IS NULL) EXECUTE FUNCTION hold_cursor()
"""


@contextmanager
def cursor_held(database_url: str) -> Iterator[Callable[[], bool]]:
    """Let no cursor advance. The function that this gives says whether a sink has written a batch and waits."""
    waiting = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 15 AND NOT granted"
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("SELECT pg_advisory_lock(15)")
        yield lambda: conn.execute(waiting).rowcount > 0


def documented_query(containing: str) -> str:
    """The SQL of the page about sinks that contains this text."""
    page = (ROOT / "docs/how-to/pass-events-on.md").read_text()
    (found,) = [text for text in re.findall(r"```sql\n(.*?)```", page, re.DOTALL) if containing in text]
    return str(found)


def table(**keys: object) -> str:
    """The table of a sink `main` with these keys."""
    return "[main]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in keys.items())
