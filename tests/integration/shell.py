"""An operator at a shell, and dead letters to mend: for the tests of `evalstore dlq`."""

import json
import os
import pty
import select
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import psycopg
from psycopg.rows import dict_row
from sqlalchemy import Engine

from evalstore.storage import dead_letters
from evalstore.storage.dead_letters import DeadLetterInsert
from tasks.keys import Keys
from tests import factories
from tests.chaos.relay import ROOT
from tests.chaos.world import Workers, World, wait_until
from tests.integration.commands import python

Json = dict[str, Any]
KEYS, JOBS = Keys.of("dramatiq", "evaluations"), Keys.of("dramatiq", "jobs")
SMALL: dict[str, Any] = {"EVALSTORE_MAX_CONTENT_BYTES": "100"}  # Simulates a release with a fault.
DIES = '''
"""worker.tasks, in a process that dies of SIGKILL right {when} it runs the script {script}, once."""
import os, pathlib, signal
from worker.tasks import broker
run = broker.lua.run
mark = pathlib.Path({mark!r})
def dying(name, *args):
    if name == {script!r} and not mark.exists():
        if {when!r} == "after":
            run(name, *args)
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return run(name, *args)
broker.lua.run = dying
'''


def dying(folder: Path, *, script: str, when: str) -> tuple[Json, Path]:
    """How to start a worker that dies once, right before or after it runs a script; and a file that is there once it died."""
    mark = folder / "died"
    (folder / "dying.py").write_text(DIES.format(script=script, when=when, mark=str(mark)))
    return {"module": "dying", "PYTHONPATH": str(folder)}, mark


class Done(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Operator:
    """At a shell, in a folder."""

    def __init__(self, database_url: str, redis_url: str, folder: Path) -> None:
        self.folder = folder
        self.database_url = database_url
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("EVALSTORE_")},
            "EVALSTORE_DATABASE_URL": database_url,
            "EVALSTORE_REDIS_URL": redis_url,
            "EVALSTORE_ACTOR": "ada",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "80",
        }

    def start(self, *words: object, group: tuple[str, ...] = ("dlq",), **given: Any) -> "subprocess.Popen[str]":
        command = [*python(), "-m", "evalstore.cli.app", *group, *map(str, words)]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | given
        return subprocess.Popen(command, cwd=self.folder, env=self.env, text=True, **streams)

    def dlq(self, *words: object, within_s: float = 60) -> Done:
        return self.evalstore("dlq", *words, within_s=within_s)

    def evalstore(self, *words: object, within_s: float = 60) -> Done:
        with self.start(*words, group=()) as process:
            out, err = process.communicate(timeout=within_s)
        return Done(process.returncode, out, err)

    def at_terminal(self, *words: object, types: str) -> Done:
        """The same at a terminal of its own, where something is typed once it is asked for."""
        ours, theirs = pty.openpty()
        try:
            with self.start(*words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
                shown, typed = _read(ours, until="? "), os.write(ours, types.encode())
                shown += _read(ours, until=None, ended=lambda: process.poll() is not None)
                assert typed
            return Done(process.returncode, shown, "")
        finally:
            os.close(ours)
            os.close(theirs)

    def letters(self) -> list[Json]:
        """The table as it is."""
        return self.rows("SELECT * FROM dead_letters ORDER BY id")

    def rows(self, query: str) -> list[Json]:
        with psycopg.connect(self.database_url, row_factory=dict_row) as conn:
            return conn.execute(query).fetchall()


def _read(terminal: int, *, until: str | None, ended: Callable[[], bool] = lambda: False) -> str:
    shown, give_up = "", time.monotonic() + 30
    while time.monotonic() < give_up:
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 65536).decode()
            if until and shown.rstrip(" ").endswith((":", "?", "]", "on")):
                return shown
            if until and (until in shown or "[y/N]" in shown):
                return shown
        elif ended():
            return shown
    raise AssertionError(f"nothing came of it; shown so far: {shown}")


def event(number: int, **fields: Any) -> Json:
    """Return a valid event, except for `fields`. A release with a limit of 100 bytes refuses its content."""
    given = {"occurred_at": "2026-01-31T09:30:00Z", "output": "x" * 200, **fields}
    return factories.event("completed", number + 1, eval_id=f"run-{number}") | given


def body(world: World, given: object, **changes: Any) -> bytes:
    return world.message(given, **changes).encode()


def bury(engine: Engine, world: World, number: int, *, events: Sequence[Json] | None = None) -> list[UUID]:
    """That many dead letters, without a worker that buried them."""
    burials = [
        DeadLetterInsert(
            id=uuid4(),
            queue="evaluations",
            actor="store_evaluation",
            eval_id=given["eval_id"],
            event_id=UUID(given["event_id"]),
            message=body(world, given),
            error_class="InvalidEvent",
            error_message=f"output: {position} bytes, expected at most 0",
            traceback="Traceback: \x1b[31mred\x1b[0m",
            signature=dead_letters.signature("InvalidEvent", "output"),
            attempts=1,
            died_at=datetime.now(UTC),
            host="here",
            release="0",
        )
        for position, given in enumerate(events or [event(number) for number in range(number)])
    ]
    with engine.connect() as conn:
        dead_letters.write(conn, burials)
    return [one.id for one in burials]


def dead_by(world: World, operator: Operator, workers: Workers, events: Sequence[Json]) -> None:
    """Have a faulty release turn them into dead letters, and end it."""
    world.send(events)
    workers.start()
    wait_until(lambda: len(operator.letters()) == len(events), what="all are dead letters")
    workers.stop()


def states(operator: Operator) -> Counter[str]:
    return Counter(letter["state"] for letter in operator.letters())


def counts(redrive: Json) -> Json:
    return {name: redrive[name] for name in ("state", "total", "sent", "stored", "died", "returned")}
