"""Senders at a steady rate while workers, Redis and PostgreSQL are killed at random: `make soak`, or with other numbers

    python -m tests.chaos.soak --seconds 600 --rate 2000 --seed 1

One pair of workers is never killed: what it uses must not grow. Ends with the audit; exit status 1 if anything is amiss.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

from evalstore.local.servers import Postgres, Valkey
from evalstore.storage.migrations import upgrade
from models.errors import RedisOutage
from tests.chaos.watcher import Watcher
from tests.chaos.world import KEYS, Workers, World, evaluations, kill

_BATCH = 99  # events a send: 33 evaluations
_MOST_GROWTH_BYTES = 48 * 1024 * 1024
# Dramatiq's main process ignores signals for up to 30 s while it waits for a process that died at its start.
_STOPPED_WITHIN_S = 45
_LOSSLESS = {"fsync": "off", "full_page_writes": "off"}  # Only a crash of the machine would lose data with these settings.


class Soak:
    """A run, and what came of it."""

    def __init__(self, folder: Path, *, seconds: float, rate: int, seed: int, watch: bool = False) -> None:
        self.folder, self.seconds, self.rate, self.watch = folder, seconds, rate, watch
        self.random = random.Random(seed)  # noqa: S311
        self.done = threading.Event()
        self.busy = threading.Lock()
        self.kills: Counter[str] = Counter()
        self.refused = 0

    def run(self) -> dict[str, Any]:
        """The numbers. Raises AssertionError where something was lost, left or grew."""
        with Postgres(self.folder / "postgres", settings=_LOSSLESS) as postgres, Valkey(self.folder / "valkey") as valkey:
            upgrade(postgres.url())
            world = World(postgres.url(), valkey.url(), self.folder)
            try:
                return self._run(world, postgres, valkey)
            finally:
                self.done.set()
                world.close()

    def _run(self, world: World, postgres: Postgres, valkey: Valkey) -> dict[str, Any]:
        steady, *fragile = (world.workers(n=1) for _ in range(3))
        for workers in (steady, *fragile):
            workers.start()
        sender = threading.Thread(target=self._send, args=(world,))
        chaos = threading.Thread(target=self._harass, args=(fragile, postgres, valkey))
        supervisor = threading.Thread(target=self._supervise, args=(fragile,))
        watcher = Watcher(world) if self.watch else None
        if watcher:
            watcher.start()
        began = time.monotonic()
        sender.start()
        chaos.start()
        supervisor.start()
        time.sleep(self.seconds * 0.3)  # Long enough that the process has loaded everything.
        before = _use(steady)
        sender.join()
        after = _use(steady)
        self.done.set()
        chaos.join()
        supervisor.join()
        for workers in fragile:
            if not workers.running:
                workers.start()
        drained = time.monotonic()
        world.audit(settled_within_s=180)
        if watcher:
            watcher.audit(within_s=180)
        drained = time.monotonic() - drained
        numbers = {
            "sent": len(world.sent),
            "seconds": round(time.monotonic() - began - drained, 1),
            "sends refused": self.refused,
            "kills": dict(self.kills),
            "seconds to drain": round(drained, 1),
            "before": before,
            "after": after,
            "idle": _use(steady),
            "connections": self._connections(world),
            "keys": world.client.dbsize() - (len(watcher.seen) if watcher else 0),
            "steady worker's log": len(steady.log.read_text().splitlines()),
        }
        stopped_s = [steady.stop(within_s=15), *(workers.stop(within_s=_STOPPED_WITHIN_S) for workers in fragile)]
        assert world.client.hlen(KEYS.processes) == 0, "somebody left without a word"
        self._check(numbers)
        return numbers | {"seconds to stop": [round(seconds, 1) for seconds in stopped_s]}

    def _send(self, world: World) -> None:
        """Each batch until it is sent, as a sender that means it; what comes twice by that is stored once."""
        began, number = time.monotonic(), 0
        while (elapsed := time.monotonic() - began) < self.seconds:
            if number * _BATCH > elapsed * self.rate:
                time.sleep(0.01)
                continue
            number += 1
            events = evaluations(_BATCH // 3, f"soak-{number}")
            while True:
                try:
                    world.send(events)
                except RedisOutage:
                    self.refused += 1
                else:
                    break
            for event in events:  # Keep only what the audit needs of a million events.
                world.sent[event["event_id"]] = {"eval_id": event["eval_id"], "type": event["type"]}

    def _harass(self, fragile: list[Workers], postgres: Postgres, valkey: Valkey) -> None:
        deeds: list[tuple[str, Callable[[], None]]] = [
            ("worker process killed", lambda: self._kill_one(fragile)),
            ("workers killed", lambda: self.random.choice(fragile).kill()),
            ("workers deployed", lambda: self._deploy(fragile)),
            ("redis killed", lambda: _restart(valkey)),
            ("postgres killed", lambda: _restart(postgres)),
            ("redis frozen", lambda: self._freeze(valkey)),
            ("postgres frozen", lambda: self._freeze(postgres)),
        ]
        while not self.done.wait(self.random.uniform(1, 5)):
            name, deed = self.random.choice(deeds)
            with self.busy:
                deed()
            self.kills[name] += 1

    def _kill_one(self, fragile: list[Workers]) -> None:
        if pids := self.random.choice(fragile).pids:
            kill(self.random.choice(pids))

    def _deploy(self, fragile: list[Workers]) -> None:
        workers = self.random.choice(fragile)
        if workers.running:
            workers.stop(within_s=_STOPPED_WITHIN_S)

    def _freeze(self, server: Postgres | Valkey) -> None:
        server.freeze()
        time.sleep(self.random.uniform(0.5, 3))
        server.thaw()

    def _supervise(self, fragile: list[Workers]) -> None:
        while not self.done.wait(0.5):
            for workers in fragile:
                if self.busy.acquire(blocking=False):
                    workers.tend()
                    self.busy.release()

    def _connections(self, world: World) -> dict[str, int]:
        with psycopg.connect(world.database_url) as conn:
            [(postgres,)] = conn.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'evalstore%'"
            ).fetchall()
        return {"postgres": postgres, "redis": len(world.client.client_list())}

    def _check(self, numbers: dict[str, Any]) -> None:
        before, after = numbers["before"], numbers["after"]
        assert after["memory"] - before["memory"] < _MOST_GROWTH_BYTES, f"memory grew: {numbers}"
        assert after["files"] - before["files"] < 12, f"file descriptors grew: {numbers}"
        assert after["threads"] - before["threads"] < 6, f"threads grew: {numbers}"
        assert numbers["keys"] < 20, f"keys grew: {numbers}"
        assert numbers["connections"]["postgres"] <= 3 * 10, f"connections grew: {numbers}"
        assert numbers["connections"]["redis"] <= 3 * 12, f"connections grew: {numbers}"
        assert numbers["sent"] > self.rate * self.seconds * 0.5, f"little was sent: {numbers}"


def _restart(server: Postgres | Valkey) -> None:
    server.kill()
    server.start()


def _use(workers: Workers) -> dict[str, int]:
    """What the one process of `workers` keeps of memory by itself, of files and of threads."""
    [pid] = workers.pids
    status = Path(f"/proc/{pid}/status").read_text()
    memory = int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) * 1024
    return {
        "memory": memory,
        "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(re.findall(r"Threads:\s+(\d+)", status)[0]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--rate", type=int, default=2000, help="events a second")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))  # noqa: S311
    parser.add_argument("--watch", action="store_true", help="read confirmations throughout, and check them in the end, too")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), seconds=given.seconds, rate=given.rate, seed=given.seed, watch=given.watch)
        try:
            print(json.dumps(soak.run(), indent=2))
        except AssertionError as error:
            print(f"{error}\n{dict(soak.kills)}", file=sys.stderr)
            for log in Path(folder).glob("worker-*.log"):
                print(f"--- {log.name}\n{log.read_text()[-4000:]}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
