"""The alerts that fire are those of what is wrong, and no others: rules as shipped, over what real processes told.

What two looks at them showed is drawn out to half an hour, for `promtool` to say what would be firing then: counters grow by as
much a minute, and gauges stay.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from evalstore.local import processes
from evalstore.local.servers import Postgres, Valkey, free_port
from evalstore.storage import migrations
from tests.chaos.relay import ROOT
from tests.chaos.world import World, evaluations, wait_until
from tests.house.test_watching import DASHBOARDS, RULES, promtool
from tests.house.test_watching import panels as panels_of

Look = dict[str, tuple[bool, float]]  # By series: whether it must match, and its value.
_AT_S = 1800


class Watched:
    """Endpoints of process groups, and the alerts that would come of what they tell."""

    def __init__(self, folder: Path, program: Path, *ports: int) -> None:
        self._folder, self._program, self.ports = folder, program, ports
        self._before: Look = {}

    def look(self) -> Look:
        """What can be scraped now; nothing of those that do not answer."""
        found: Look = {}
        for port in self.ports:
            try:
                text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=8).text
            except httpx.HTTPError:
                continue
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    labels = {**sample.labels, "job": "evalstore", "instance": f"127.0.0.1:{port}"}
                    series = ", ".join(f'{name}="{value}"' for name, value in labels.items())
                    shift = _AT_S - time.time() if sample.name.endswith("_timestamp_seconds") else 0
                    counts = family.type in {"counter", "histogram"}
                    found[f"{sample.name}{{{series}}}"] = counts, sample.value + shift
        return found

    def firing(self) -> set[str]:
        """What would fire, if it all went on like this."""
        told = self._evaluate(['count by (alertname) (ALERTS{alertstate="firing"})'])
        return set(re.findall(r'alertname="(\w+)"', told))

    def without_data(self, expressions: list[str]) -> set[str]:
        """Those of which nothing would come, if it all went on like this."""
        told = self._evaluate([f"count({expression})" for expression in expressions])
        return {expression for expression in expressions if f"expr: {json.dumps(f'count({expression})')}" not in told}

    def _evaluate(self, expressions: list[str]) -> str:
        """What promtool tells, which is told to expect nothing of any, of those of which something comes."""
        before, self._before = self._before, self.look()
        series = [
            {"series": name, "values": _values(value, value - before.get(name, (counts, value))[1] if counts else 0)}
            for name, (counts, value) in self._before.items()
            if math.isfinite(value)
        ]
        asks = [{"expr": expression, "eval_time": f"{_AT_S}s", "exp_samples": []} for expression in expressions]
        test = {"interval": "1m", "input_series": series, "promql_expr_test": asks}
        path = self._folder / "alerts.yml"
        path.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}))
        done = subprocess.run([self._program, "test", "rules", path], capture_output=True, text=True, check=False)
        told = done.stdout + done.stderr
        assert done.returncode == 0 or "got:" in told, told
        return told

    def comes_to(self, *alerts: str, besides: tuple[str, ...] = (), within_s: float = 90) -> None:
        """Until these fire and nothing else does."""
        fired: set[str] = set()

        def as_expected() -> bool:
            nonlocal fired
            fired = self.firing() - set(besides)
            return fired == set(alerts)

        try:
            wait_until(as_expected, within_s=within_s, what=f"{alerts} fire")
        except AssertionError:
            pytest.fail(f"not {set(alerts)} but {fired} fire")


def _values(value: float, growth: float) -> str:
    return f"{value!r}+{growth!r}x{_AT_S // 60}" if growth > 0 else f"{value!r}x{_AT_S // 60}"


@pytest.fixture
def program() -> Path:
    found = next(promtool(), None)
    if found is None:
        pytest.skip("promtool is not here: Debian's package prometheus has it, and .ci/run fetches it")
    return found


@pytest.fixture
def world(worlds: Callable[..., World], postgres_server: Postgres, valkey_server: Valkey) -> World:
    migrations.upgrade(postgres_server.url())
    return worlds(postgres_server.url(), valkey_server.url())


@pytest.fixture
def scheduler(world: World, tmp_path: Path) -> Iterator[Callable[[dict[str, str]], None]]:
    started: list[Any] = []

    def start(settings: dict[str, str]) -> None:
        command = [sys.executable, "-c", "from periodiq import entrypoint; entrypoint()", "worker.tasks"]
        env = {**os.environ, "EVALSTORE_DATABASE_URL": world.database_url, "EVALSTORE_REDIS_URL": world.redis_url, **settings}
        with (tmp_path / "scheduler.log").open("ab") as log:
            started.append(processes.start(command, mark=tmp_path, output=log, cwd=ROOT, env=env))

    yield start
    for guard in started:
        guard.terminate()
        guard.wait()


def test_each_trouble_fires_its_own_alert_and_nothing_else(
    world: World,
    postgres_server: Postgres,
    valkey_server: Valkey,
    scheduler: Callable[[dict[str, str]], None],
    program: Path,
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {
        "EVALSTORE_RUNTIME_DIR": str(tmp_path / "runtime"),
        "EVALSTORE_METRICS_PORT": str(free_port()),
        "EVALSTORE_SCHEDULER_METRICS_PORT": str(free_port()),
    }
    ports = int(settings["EVALSTORE_METRICS_PORT"]), int(settings["EVALSTORE_SCHEDULER_METRICS_PORT"])
    watched = Watched(tmp_path, program, *ports)
    watched.comes_to("EvalstoreMetricsAbsent")
    workers = world.workers(**settings)
    workers.start()
    world.send(evaluations(20))
    world.wait_settled()
    watched.comes_to("EvalstoreNoScheduler")
    scheduler(settings)
    # The first job is due within a minute.
    early = ("EvalstoreNoScheduler",)

    world.raw(b"nonsense")
    wait_until(lambda: len(world.dead()) == 1, what="it is a dead letter")
    watched.comes_to("EvalstoreDeadLetters", besides=early)
    watched.comes_to(besides=early)

    postgres_server.stop()
    world.send(evaluations(5, "in-an-outage"))
    watched.comes_to("EvalstoreOutage", besides=early)
    postgres_server.start()
    world.wait_settled()
    watched.comes_to(besides=early)

    world.client.config_set("maxmemory", int(world.client.info("memory")["used_memory"] * 1.1))
    watched.comes_to("EvalstoreRedisMemory", besides=early)
    world.client.config_set("maxmemory", 0)

    with psycopg.connect(world.database_url) as conn:
        ((head,),) = conn.execute(
            "UPDATE evalstore_schema_version SET version_num = '0001' RETURNING old.version_num"
        ).fetchall()
    watched.comes_to("EvalstoreSchemaMismatch", besides=early)
    with psycopg.connect(world.database_url) as conn:
        conn.execute("UPDATE evalstore_schema_version SET version_num = %s", [head])

    watched.comes_to(within_s=150)  # The scheduler reports now too.
    # No alert may fire for thresholds that healthy values stay below.
    panels = [panel["expr"] for board in DASHBOARDS for one in panels_of(board) for panel in one.get("targets", [])]
    always = sorted({expression for expression in panels if not re.search(r"> 0|ALERTS|evalstore_(http|disk)_", expression)})
    world.send(evaluations(20, "for-the-dashboards"))
    world.wait_settled()
    assert watched.without_data(always) == set()
    valkey_server.stop()
    watched.comes_to("EvalstoreOutage")
    valkey_server.start()
    watched.comes_to()

    frozen = _freeze(watched, workers.pids)
    watched.comes_to("EvalstoreProcessStuck", besides=("EvalstoreNoWorkers",))
    os.kill(frozen, signal.SIGCONT)
    watched.comes_to()

    workers.stop()
    watched.comes_to("EvalstoreNoWorkers")
    # The state of unavailable servers still shows.
    assert watched.without_data([one for one in always if "server_up" in one]) == set()


def _freeze(watched: Watched, pids: list[int]) -> int:
    """Stop the process that works, and not the one that answers."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
        if watched.look():
            return pid
        os.kill(pid, signal.SIGCONT)
    raise AssertionError(pids)
