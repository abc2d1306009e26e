"""A worker, a scheduler and what they show, for tests; and `dramatiq tests.integration.watched`: a worker that gets stuck.

There, storing an evaluation whose id is `stick` never ends.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from signal import SIGKILL
from typing import Any, NamedTuple

import httpx
import psutil  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from evalstore.local.servers import free_port
from models.events import Event
from models.record import EventRow

WORKER = ("-m", "dramatiq", "worker.tasks", "--processes", "2", "--threads", "2")
STICKING = ("-m", "dramatiq", "tests.integration.watched", "--processes", "2", "--threads", "2")
SCHEDULER = ("-c", "from periodiq import entrypoint; entrypoint()", "worker.tasks")

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Seen(NamedTuple):
    """What a scrape gave."""

    values: Values
    types: dict[str, str]
    seconds: float

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.values.get((name, frozenset(labels.items())))

    def total(self, name: str, **labels: str) -> float:
        """Over all series of a metric that have these labels."""
        return sum(value for (one, having), value in self.values.items() if one == name and labels.items() <= having)


class Watched:
    """Processes of one kind with an endpoint, as a supervisor starts them."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, setting: str) -> None:
        self.command, self.port, self.log = command, free_port(), log
        self.env = {**os.environ, **environment, setting: str(self.port)}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Watched":
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([sys.executable, *self.command], env=self.env, stdout=log, stderr=log)
        return self

    @property
    def workers(self) -> list[psutil.Process]:
        """Dramatiq's worker processes; the last child serves metrics."""
        assert self.process
        return [
            one for one in psutil.Process(self.process.pid).children() if "resource_tracker" not in " ".join(one.cmdline())
        ][:2]

    @property
    def endpoint(self) -> psutil.Process:
        """The process that answers: the child of one that a worker process forked."""
        (found,) = (answers for one in self.workers for keeper in one.children() for answers in keeper.children())
        return found

    def kill(self) -> None:
        assert self.process
        for one in psutil.Process(self.process.pid).children(recursive=True):
            one.send_signal(SIGKILL)
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.kill()

    def get(self, path: str) -> httpx.Response | None:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=15)
        except httpx.TransportError:
            return None

    def health(self, kind: str) -> int:
        """The status of the answer; 0 without one."""
        answer = self.get(f"/health/{kind}")
        return answer.status_code if answer else 0

    def scrape(self) -> Seen:
        answer = self.get("/metrics")
        return seen(answer) if answer else Seen({}, {}, 0)

    def until(
        self, is_so: Callable[[Seen], object], *, eventually: Callable[..., None], what: str, within_s: float = 120
    ) -> Seen:
        last = Seen({}, {}, 0)

        def look() -> bool:
            nonlocal last
            last = self.scrape()
            return bool(last.values and is_so(last))

        try:
            eventually(look, within_s=within_s, what=what)
        except BaseException:
            print(
                {
                    (name, *sorted(labels)): value
                    for (name, labels), value in last.values.items()
                    if value and "bucket" not in name
                }
            )
            raise
        return last


def seen(answer: httpx.Response) -> Seen:
    assert answer.status_code == 200
    found: Values = {}
    types = {}
    for family in text_string_to_metric_families(answer.text):
        types[family.name] = family.type
        for sample in family.samples:
            found[sample.name, frozenset(sample.labels.items())] = sample.value
    return Seen(found, types, answer.elapsed.total_seconds())


if "dramatiq" in sys.argv[0]:
    from evalstore.storage import event_store

    _store = event_store.store

    def _stick(conn: Any, events: Sequence[Event | EventRow], *args: Any, **given: Any) -> Any:
        if any(event.eval_id == "stick" for event in events):
            threading.Event().wait()
        return _store(conn, events, *args, **given)

    event_store.store = _stick

    from worker import tasks

    broker = tasks.broker
