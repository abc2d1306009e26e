"""Real worker processes between a real Redis and a real PostgreSQL, and the audit that every test ends with."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import msgspec
import psycopg
import redis
from dramatiq import Message

from evalstore.local import processes, supervisor
from models.errors import RedisOutage
from tasks.actor import store_evaluation
from tasks.broker import SendingBroker
from tasks.connections import connect
from tasks.keys import QUEUE, Keys
from tests.chaos.relay import ROOT, STOCK
from tests.polling import looks

KEYS = Keys.of("dramatiq", QUEUE)
_STOCK_MAY_REST_S = 12.0  # Stock Dramatiq is much slower, but not stuck.
_READY = b"Worker process is ready for action"


def wait_until(is_so: Callable[[], object], *, within_s: float = 20.0, what: str) -> None:
    """Poll until that is true; a server that is away meanwhile is no answer."""
    for _ in looks(within_s):
        with suppress(redis.RedisError, psycopg.OperationalError):
            if is_so():
                return
    raise AssertionError(f"within {within_s:g} s: {what}")


def evaluation(eval_id: str, **fields: Any) -> list[dict[str, Any]]:
    """The three events of an evaluation's life, its output told from its name."""
    common = {"eval_id": eval_id}
    ending = {"type": "evaluation:completed", "exit_code": len(eval_id), "output": f"output of {eval_id}"}
    return [
        _event(common | {"type": "evaluation:queued", "code": f"print({eval_id!r})"} | fields, 0),
        _event(common | {"type": "evaluation:started", "executor_id": "chaos"}, 1),
        _event(common | ending, 2),
    ]


def evaluations(number: int, name: str = "eval") -> list[dict[str, Any]]:
    """The events of that many evaluations, an evaluation's events apart."""
    lives = [evaluation(f"{name}-{position}-{uuid4().hex[:6]}") for position in range(number)]
    return [life[phase] for phase in range(3) for life in lives]


def _event(fields: dict[str, Any], minute: int) -> dict[str, Any]:
    return fields | {"event_id": str(uuid4()), "occurred_at": f"2026-01-31T09:{30 + minute}:00Z"}


class Workers:
    """`dramatiq MODULE` with its processes, under a guard that outlives no test."""

    def __init__(self, folder: Path, env: dict[str, str], module: str, processes_: int, threads: int) -> None:
        self.folder, self.env, self.module, self.size, self.threads = folder, env, module, processes_, threads
        self.log = folder / f"worker-{uuid4().hex[:6]}.log"
        self.prefix: list[str] = []  # A command prefix, to run commands elsewhere.
        self.cwd = ROOT  # The folder of the release that runs.
        self._guard: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        """Start, and return when all processes are ready to work."""
        so_far = self.log.read_bytes().count(_READY) if self.log.exists() else 0
        command = [*self.prefix, sys.executable, "-m", "dramatiq", self.module, "-p", str(self.size), "-t", str(self.threads)]
        with self.log.open("ab") as output:
            self._guard = processes.start(
                command, mark=self.folder, output=output, grace_s=60, cwd=self.cwd, env={**os.environ, **self.env}
            )
        if wait:
            wait_until(lambda: self.log.read_bytes().count(_READY) >= so_far + self.size, what="the workers are ready")

    @property
    def running(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    @property
    def exit_status(self) -> int | None:
        return self._guard.poll() if self._guard else None

    @property
    def pids(self) -> list[int]:
        """Of the processes that work; the first descendant is the one that watches over them."""
        return supervisor.descendants(self._guard.pid)[1:] if self._guard else []

    def kill(self) -> None:
        """SIGKILL every process at once."""
        if self._guard:
            processes.kill_now(self._guard)
            self._guard.wait(timeout=20)

    def freeze(self) -> None:
        if self._guard:
            processes.freeze(self._guard)

    def thaw(self) -> None:
        if self._guard:
            processes.thaw(self._guard)

    def ask_to_stop(self) -> None:
        """SIGTERM."""
        assert self._guard
        self._guard.terminate()

    def stop(self, *, within_s: float = 60) -> float:
        """SIGTERM, and wait; returns how long that took."""
        assert self._guard
        began = time.monotonic()
        self._guard.terminate()
        try:
            self._guard.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running {within_s:g} s after SIGTERM") from None
        return time.monotonic() - began

    @contextmanager
    def supervised(self) -> Iterator[None]:
        """Started again whenever they end, as a supervisor would. Use `tend` while waiting."""
        self.start()
        try:
            yield
        finally:
            self.kill()

    def tend(self) -> bool:
        """Start them again if they ended; always false, to be part of a condition."""
        if not self.running:
            self.start(wait=False)
        return False


class World:
    """Servers, workers and what was sent."""

    def __init__(self, database_url: str, redis_url: str, folder: Path, namespace: str = "dramatiq") -> None:
        self.database_url, self.redis_url, self.folder, self.namespace = database_url, redis_url, folder, namespace
        self.keys = Keys.of(namespace, QUEUE)
        self.fleet: list[Workers] = []
        self.broker = SendingBroker(url=redis_url, namespace=namespace, middleware=[])
        self.client: Any = connect(redis_url, namespace, socket_timeout=10)  # redis-py's types ignore decode_responses.
        self.sent: dict[str, dict[str, Any]] = {}

    def workers(self, *, n: int = 1, threads: int = 2, module: str = "worker.tasks", **env: str) -> Workers:
        """Not started yet."""
        defaults = {
            "EVALSTORE_DATABASE_URL": self.database_url,
            "EVALSTORE_REDIS_URL": self.redis_url,
            "EVALSTORE_REDIS_NAMESPACE": self.namespace,
            "EVALSTORE_METRICS_PORT": "0",
            "EVALSTORE_CHAOS_FOLDER": str(self.folder),
        }
        made = Workers(self.folder, defaults | env, "tests.chaos.stock" if STOCK else module, n, threads)
        self.fleet.append(made)
        return made

    def send(self, events: Iterable[dict[str, Any]]) -> None:
        """Send, and remember for the audit. What raises was not sent."""
        events = list(events)
        for start in range(0, len(events), 1000):
            chunk = events[start : start + 1000]
            self.broker.enqueue_many([store_evaluation.message(event) for event in chunk])
            self.sent |= {event["event_id"]: event for event in chunk}

    @contextmanager
    def sending(self) -> Iterator[None]:
        """500 events a second, until the end of the block."""
        done = threading.Event()

        def send() -> None:
            while not done.wait(0.2):
                with suppress(RedisOutage):  # The events may have arrived. They are sent again, and stored once.
                    pending.extend([] if pending else evaluations(33))
                    self.send(pending)
                    pending.clear()

        pending: list[dict[str, Any]] = []
        sender = threading.Thread(target=send)
        sender.start()
        try:
            yield
        finally:
            done.set()
            sender.join()
            self.send(pending)

    def is_waiting(self) -> bool:
        """Whether every worker process has said that it waits for an outage to end."""
        states = self.client.hvals(self.keys.processes)
        return bool(states) and all(state.startswith(b"waiting") for state in states)

    def raw(self, body: bytes | str, redis_id: str | None = None) -> str:
        """Put a body in the queue as a sender without Dramatiq does; returns its id."""
        redis_id = redis_id or str(uuid4())
        self.client.hset(self.keys.bodies, redis_id, body)
        self.client.rpush(self.keys.queue, redis_id)
        return redis_id

    def message(self, event: object, **changes: Any) -> Message[Any]:
        fields = {"queue_name": QUEUE, "actor_name": "store_evaluation", "args": (event,), "kwargs": {}, "options": {}}
        return Message(**fields | changes)

    def applied(self) -> int:
        """How many events are in the log."""
        with psycopg.connect(self.database_url, connect_timeout=5) as conn:
            [(number,)] = conn.execute("SELECT count(*) FROM evaluation_events").fetchall()
            return int(number)

    def dead(self) -> list[tuple[bytes, str]]:
        """Every dead letter's message and the class of its cause, wherever it is by now."""
        found: dict[bytes, str] = {}
        for keys in (self.keys, Keys.of(self.namespace, "jobs")):
            for redis_id, body in self.client.hgetall(keys.dead_bodies).items():
                found[body] = msgspec.json.decode(self.client.hget(keys.causes, redis_id) or b"{}").get("error_class", "none")
        with psycopg.connect(self.database_url, connect_timeout=5) as conn:
            if conn.execute("SELECT to_regclass('dead_letters')").fetchall() != [(None,)]:
                found |= dict(conn.execute("SELECT message, error_class FROM dead_letters").fetchall())
        found |= dict.fromkeys(self.client.hvals(f"{self.keys.queue}.XQ.msgs"), "stock")
        return list(found.items())

    def left(self) -> dict[str, int]:
        """What is not done with: per key, how much is there."""
        found: dict[str, int] = {}
        sizes: dict[bytes, Callable[[bytes], Any]] = {
            b"zset": self.client.zcard,
            b"list": self.client.llen,
            b"hash": self.client.hlen,
            b"set": self.client.scard,
        }
        for key in self.client.scan_iter("*"):
            name = key.decode()
            if re.fullmatch(
                rf"(evalstore:)?{re.escape(self.namespace)}:.*(evaluations|jobs)"
                r"(\.DQ)?(\.msgs|:delayed|:suspects|:deaths|:unacked:.*)?",
                name,
            ):
                kind = self.client.type(key)
                found |= {name: sizes[kind](key)} if kind in sizes else {}
        return found

    def settled(self) -> bool:
        return not self.left()

    def wait_settled(self, *, within_s: float = 60, tend: Workers | None = None) -> None:
        """Until nothing is waiting, delayed, suspected or in flight. Where the stock broker is tried: or nothing moves."""
        before, since = (0, 0), time.monotonic()

        def done() -> bool:
            nonlocal before, since
            if tend:
                tend.tend()
            if STOCK and (now := (self.applied(), sum(self.left().values()))) != before:
                before, since = now, time.monotonic()
            if STOCK and time.monotonic() - since > _STOCK_MAY_REST_S:
                raise AssertionError(f"nothing moved for {_STOCK_MAY_REST_S:g} s")
            return self.settled()

        try:
            wait_until(done, within_s=300 if STOCK else within_s, what="everything is settled")
        except AssertionError as error:
            raise AssertionError(f"{error}; left: {self.left()}; {self.applied()} of {len(self.sent)} applied") from None

    def audit(
        self, *, dead: dict[str, str] | None = None, others_dead: Iterable[str] = (), settled_within_s: float = 60
    ) -> None:
        """Every event sent is applied once, and its record right, but for those `dead` by their cause; and nothing is left.

        `others_dead`: the causes of the dead letters that are no events of ours.
        """
        dead = dead or {}
        self.wait_settled(within_s=settled_within_s)
        causes, others = {}, []
        for body, why in self.dead():
            event_id = _event_id(body)
            if event_id in self.sent:
                causes[event_id] = why
            else:
                others.append(why)
        assert causes == dead, f"dead: {causes}, and not {dead}"
        assert sorted(others) == sorted(others_dead), f"also dead: {sorted(others)}, and not {sorted(others_dead)}"
        with psycopg.connect(self.database_url) as conn:
            applied = [str(event_id) for (event_id,) in conn.execute("SELECT event_id FROM evaluation_events")]
            wanted = set(self.sent) - set(dead)
            assert Counter(applied) == Counter(wanted), (
                f"{len(wanted - set(applied))} lost, {len(set(applied) - wanted)} from nowhere"
            )
            records = {
                eval_id: (status, version, exit_code)
                for eval_id, status, version, exit_code in conn.execute(
                    "SELECT eval_id, status, version, exit_code FROM evaluations"
                )
            }
        events_of: dict[str, list[str]] = {}
        for event_id in wanted:
            events_of.setdefault(self.sent[event_id]["eval_id"], []).append(self.sent[event_id]["type"])
        expected = {eval_id: _record(eval_id, types) for eval_id, types in events_of.items()}
        wrong = {eval_id: found for eval_id, found in records.items() if found != expected.pop(eval_id, None)}
        assert not wrong, f"{len(wrong)} records are wrong: {wrong}"
        assert not expected, f"{len(expected)} records are missing: {expected}"

    def close(self) -> None:
        for workers in self.fleet:
            workers.kill()
        self.broker.close()
        self.client.close()


def _record(eval_id: str, types: list[str]) -> tuple[str, int, int | None]:
    if "evaluation:completed" in types:
        return "completed", len(types), len(eval_id)
    return "running" if "evaluation:started" in types else "queued", len(types), None


def _event_id(body: bytes) -> str | None:
    try:
        return str(msgspec.json.decode(body)["args"][0]["event_id"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def through(url: str, port: int) -> str:
    """`url` with another port: that of a relay."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=re.sub(r":\d+$", f":{port}", parts.netloc)))


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port
    return port


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
