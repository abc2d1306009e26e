"""`evalstore archive`: what an operator types, what is printed and noted, and how it ends."""

import base64
import json
import os
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import dict_row

from evalstore.storage import database, event_store
from models.events import parse
from tests.chaos.world import World, wait_until
from tests.integration.commands import python
from tests.integration.shell import Done

ROOT = Path(__file__).parents[2]


class Shell:
    """An operator at a shell, and the database beside it."""

    def __init__(self, database_url: str, redis_url: str, folder: Path) -> None:
        self.url, self.objects = database_url, folder / "objects"
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("EVALSTORE_")},
            "EVALSTORE_DATABASE_URL": database_url,
            "EVALSTORE_REDIS_URL": redis_url,
            "EVALSTORE_OBJECT_STORE_URL": f"file://{self.objects}",
            "EVALSTORE_ACTOR": "ada",
            "COLUMNS": "120",
        }

    def archive(self, *words: object, **env: str) -> Done:
        return self.evalstore("archive", *words, **env)

    def evalstore(self, *words: object, **env: str) -> Done:
        command = [*python(), "-m", "evalstore.cli.app", *map(str, words)]
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        done = subprocess.run(command, cwd=ROOT, env=self.env | env, timeout=120, check=False, **streams)
        return Done(done.returncode, done.stdout, done.stderr)

    def rows(self, query: str) -> list[dict[str, Any]]:
        with psycopg.connect(self.url, row_factory=dict_row) as conn:
            return conn.execute(query).fetchall()

    def finish(self, outputs: dict[str, bytes]) -> None:
        """Store the results of evaluations."""
        engine = database.engine(self.url)
        for eval_id, output in outputs.items():
            given = {"event_id": uuid4(), "occurred_at": datetime.now(UTC).isoformat(), "exit_code": 0}
            given |= {"output_b64": base64.b64encode(output).decode()}
            with engine.connect() as conn:
                event_store.store(conn, [parse({"type": "evaluation:completed", "eval_id": eval_id, **given})])
        engine.dispose()

    def paths(self) -> dict[str, Path]:
        """The object of each evaluation's output."""
        found = self.rows(
            "SELECT eval_id, encode(sha256, 'hex') || CASE encoding WHEN 'zstd' THEN '.zst' ELSE '' END k FROM contents"
        )
        return {row["eval_id"]: self.objects / row["k"][:2] / row["k"][2:4] / row["k"] for row in found}


@pytest.fixture
def shell(database_url: str, redis_url: str, tmp_path: Path) -> Shell:
    return Shell(database_url, redis_url, tmp_path)


def test_content_is_moved_checked_brought_back_and_swept(shell: Shell) -> None:
    outputs = {f"e{number}": os.urandom(3_000_000) for number in range(3)}
    shell.finish(outputs | {"small": os.urandom(5000)})

    before = shell.archive("status", "-o", "json").json
    assert before["due"].items() >= {"contents": 3, "bytes": 9_000_000}.items()
    moved = shell.archive("run", "-o", "json", "--reason", "room")
    assert (moved.status, moved.json) == (0, {"moved": 3, "bytes": 9_000_000, "failed": 0})
    shown = shell.archive("status")
    assert shown.status == 0
    assert "objects" in shown.out
    assert "9,000,000" in shown.out
    assert "due to move: 0 contents" in shown.err

    assert shell.archive("verify", "--sample", 2).status == 0
    path = shell.paths()["e0"]
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    shell.paths()["e1"].unlink()
    found = shell.archive("verify", "-o", "json")
    assert found.status == 4
    assert {(one["contents"][0]["eval_id"], one["state"]) for one in found.json} == {("e0", "damaged"), ("e1", "missing")}

    restored = shell.archive("restore", "e0", "e2", "-o", "jsonl")
    assert restored.status == 4
    assert json.loads(restored.out)["eval_id"] == "e0"
    path.write_bytes(good)
    assert shell.archive("restore", "e0").status == 0
    assert shell.archive("restore", "e0").status == 3
    back = {row["eval_id"]: row["data"] for row in shell.rows("SELECT eval_id, data FROM contents WHERE store IS NULL")}
    assert {name: back[name] for name in ("e0", "e2")} == {name: outputs[name] for name in ("e0", "e2")}
    assert shell.archive("run", "-o", "json").json["moved"] == 0  # Restored content stays for a while.
    assert shell.archive("restore", "--all").status == 5

    month_ago = (datetime.now(UTC) - timedelta(days=30)).timestamp()
    for found_path in shell.objects.glob("*/*/*"):
        os.utime(found_path, (month_ago, month_ago))
    assert len(shell.archive("sweep", "--dry-run", "-o", "jsonl").out.splitlines()) == 2
    assert shell.archive("sweep").status == 5
    assert len(list(shell.objects.glob("*/*/*"))) == 2
    assert shell.archive("sweep", "--yes", "-o", "json").json == {"removed": 2, "bytes": 2 * len(good)}
    assert list(shell.objects.glob("*/*/*")) == []
    actions = shell.rows("SELECT verb, actor, count, reason FROM operator_actions ORDER BY id")
    assert actions[0] == {"verb": "archive run", "actor": "ada", "count": 3, "reason": "room"}
    assert {action["verb"] for action in actions} == {"archive run", "archive restore", "archive sweep"}


def test_what_an_operator_has_to_know_is_said_by_the_exit_status(shell: Shell, tmp_path: Path) -> None:
    assert shell.archive("run", EVALSTORE_OBJECT_STORE_URL="").status == 2
    shell.finish({f"e{number}": os.urandom(1_000_001) for number in range(3)})
    away = shell.archive("run", EVALSTORE_ARCHIVE_URL=f"file://{tmp_path}/no/mount")
    assert away.status == 7
    assert "the object store cannot be used" in away.err
    with psycopg.connect(shell.url) as conn:
        conn.execute("UPDATE contents SET data = '\\x00' || substring(data, 2) WHERE eval_id = 'e0'")
    assert shell.archive("run", "--retry", "-o", "json").json == {"moved": 2, "bytes": 2_000_002, "failed": 1}
    failing = shell.archive("status", "-o", "json").json
    assert failing["failing"] == 1
    assert failing["failures"][0]["eval_id"] == "e0"


def test_workers_move_what_is_due(world: World, shell: Shell) -> None:
    shell.finish({"e": os.urandom(3_000_000)})
    workers = world.workers(EVALSTORE_OBJECT_STORE_URL=shell.env["EVALSTORE_OBJECT_STORE_URL"])
    workers.start()
    for job in ("archive_large_outputs", "sweep_objects"):
        done = shell.evalstore("cron", "run", job)
        assert done.status == 0, done.err
    wait_until(lambda: shell.rows("SELECT store FROM contents") == [{"store": "objects"}], what="it is moved")
    assert shell.archive("verify").status == 0
