"""The lake's sink: each committed event is in the lake once, whatever is killed, and whoever else writes."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from sqlalchemy import Connection, Engine

from evalstore.lake import maintenance
from evalstore.lake.lake import Lake
from evalstore.lake.schema import EVENTS
from evalstore.storage import event_reader, event_store
from models.events import parse
from models.settings import Settings
from tests.integration.shell import Operator
from tests.sinks import Runner

pytest.importorskip("pyiceberg", reason="the lake needs the extra `lake`: make setup-integrations")


class Logged(NamedTuple):
    """An event of the log."""

    fields: dict[str, Any]


_RANDOM = random.Random()  # noqa: S311 - moments of kills
Eventually = Callable[..., None]
Store = Callable[..., list[tuple[str, str]]]


@pytest.fixture
def lake_settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings.from_environment({"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_LAKE_URL": f"file://{tmp_path}/lake"})


@pytest.fixture
def runner(tmp_path: Path, database_url: str, redis_url: str) -> Iterator[Runner]:
    """A runner whose lake gathers for a moment only; not started."""
    folder = tmp_path / "runner"
    folder.mkdir()
    environment = {
        "EVALSTORE_DATABASE_URL": database_url,
        "EVALSTORE_REDIS_URL": redis_url,
        "EVALSTORE_LAKE_URL": f"file://{tmp_path}/lake",
    }
    found = Runner(folder, environment, '[lake]\ntype = "lake"\nbatch_s = 0.1\n')
    yield found
    found.kill()
    print(found.log.read_text()[-4000:] if found.log.exists() else "")


def store(conn: Connection, eval_ids: list[str]) -> list[tuple[str, str]]:
    """Store an event of each; returns their keys."""
    keys = [(eval_id, str(uuid4())) for eval_id in eval_ids]
    given = {"type": "evaluation:started", "occurred_at": "2026-01-01T00:00:00Z", "executor_id": "x"}
    event_store.store(conn, [parse({**given, "eval_id": eval_id, "event_id": event_id}) for eval_id, event_id in keys])
    return keys


def counted(settings: Settings) -> Counter[tuple[str, str]]:
    """How often each event is in the lake."""
    lake = Lake.open(settings)
    try:
        found = lake.load(EVENTS)
        rows = [
            keys.to_pylist()
            for file in lake.files[EVENTS].of_snapshot(found)
            for keys in lake.files[EVENTS].keys(found.io, file)
        ]
        return Counter((row["eval_id"], row["event_id"]) for part in rows for row in part)
    finally:
        lake.close()


def test_a_new_lake_is_filled_from_the_log_and_then_follows(
    runner: Runner, conn: Connection, lake_settings: Settings, eventually: Eventually
) -> None:
    keys = store(conn, [f"old-{number}" for number in range(500)])
    with conn.begin():
        conn.exec_driver_sql("DELETE FROM confirmations")
    runner.start()
    eventually(lambda: counted(lake_settings) == Counter(keys), within_s=30)
    keys += store(conn, [f"new-{number}" for number in range(20)])
    eventually(lambda: counted(lake_settings) == Counter(keys), within_s=30)
    assert runner.stop() == 0


def test_each_event_is_there_once_through_kills_a_second_writer_and_maintenance(
    runner: Runner, engine: Engine, conn: Connection, lake_settings: Settings, eventually: Eventually
) -> None:
    keys: list[tuple[str, str]] = []
    stop = threading.Event()

    def write_beside() -> None:
        """As retention does: append events of the log directly, and maintain the lake."""
        lake = Lake.open(lake_settings)
        with engine.connect() as own:
            while not stop.wait(0.05):
                found = event_reader.by_key(own, _RANDOM.sample(keys, min(20, len(keys))))
                lake.append_events([Logged(fields) for fields in found.values()])
                if _RANDOM.random() < 0.2:
                    maintenance.run_once(lake)
        lake.close()

    second = threading.Thread(target=write_beside)
    keys += store(conn, [f"first-{number}" for number in range(50)])
    runner.start()
    second.start()
    for turn in range(8):
        keys += store(conn, [f"e{turn}-{number}" for number in range(50)])
        time.sleep(_RANDOM.uniform(0.5, 2.0))  # a kill at any step
        runner.kill()
        runner.start()
    keys += store(conn, ["last"])
    eventually(lambda: len(counted(lake_settings)) == len(keys), within_s=60)
    stop.set()
    second.join()
    assert counted(lake_settings) == Counter(keys)


def test_a_rewound_sink_adds_nothing_twice_and_an_erasure_reaches_the_lake(
    runner: Runner, conn: Connection, operator: Operator, lake_settings: Settings, eventually: Eventually
) -> None:
    keys = store(conn, [f"e{number}" for number in range(100)])
    runner.start()
    eventually(lambda: len(counted(lake_settings)) == 100, within_s=30)
    assert operator.evalstore("sinks", "rewind", "lake", "--to", "start", "--reason", "again").status == 0
    done = operator.evalstore("erase", "e7", "--reason", "asked", "--yes")
    assert done.status == 0, done
    keys += store(conn, ["last"])
    wanted = Counter(key for key in keys if key[0] != "e7")
    eventually(lambda: counted(lake_settings) == wanted, within_s=30)
