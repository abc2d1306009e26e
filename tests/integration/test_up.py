"""`evalstore up`: starts, keeps, restarts and stops everything in one folder, and leaves nothing behind."""

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import httpx
import psycopg
import pytest
import redis

from evalstore.local.stack import running

Eventually = Callable[..., None]
LivingIn = Callable[[Path], list[str]]

# Stands in for the worker: a master with a child in a session of its own, both deaf to SIGTERM where told to be.
WORKER = """
import os, signal, sys, time
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
who = "master"
if os.fork() == 0:
    os.setsid()
    who = "child"
os.write(1, f"{who} {os.getpid()} \\x1b]0;title\\x07\\n".encode())
time.sleep(600)
"""
SERVE = """
import sys
from pathlib import Path
from uuid import uuid4
from evalstore.cli.up import serve
worker = [sys.executable, "-c", sys.argv[2], *sys.argv[3:]]
sys.exit(serve(Path(sys.argv[1]), {"worker": worker}))
"""
# Says that it works, as worker/heartbeat.py does, once it is let.
LATE = """
import json, os, pathlib, redis, time
print("imports", flush=True)
while not pathlib.Path("../may-work").exists():
    time.sleep(0.01)
client = redis.Redis.from_url(os.environ["EVALSTORE_REDIS_URL"])
client.hset("evalstore:dramatiq:evaluations:workers", "late", f"0 {json.dumps({'since': time.time()})}")
time.sleep(600)
"""
SERVE_LATE = """
import sys
from pathlib import Path
from evalstore.cli.up import serve
sys.exit(serve(Path(sys.argv[1]), {"worker": [sys.executable, "-c", sys.argv[2]]}, workers=1))
"""

SERVE_API = """
import sys
from pathlib import Path
from evalstore.cli.up import serve
sys.exit(serve(Path(sys.argv[1]), {"api": [sys.executable, "-m", "evalstore.api"]}))
"""


class Up:
    """One running `up`, with what it says in a file, so that nothing waits for a reader."""

    def __init__(self, folder: Path, *words: str, cwd: Path, python: str = sys.executable, **how: object) -> None:
        self.said = cwd / f"said-{len(list(cwd.glob('said-*')))}"
        self.folder = folder
        with self.said.open("wb") as out:
            self.process = subprocess.Popen(
                [python, "-c", SERVE, str(folder), WORKER, *words],
                cwd=cwd,
                stdout=out,
                stderr=out,
                start_new_session=True,
                **how,  # type: ignore[call-overload]
            )

    @property
    def text(self) -> str:
        return self.said.read_text()

    def pids(self, who: str) -> list[int]:
        return [int(pid) for pid in re.findall(rf"^worker \| {who} (\d+)", self.text, re.MULTILINE)]

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


Start = Callable[..., Up]


@pytest.fixture
def start(tmp_path: Path, eventually: Eventually, living_in: LivingIn) -> Iterator[Start]:
    """`start()`: an `up` in the folder `data` that is ready; afterwards nothing of the folder may be left."""
    started: list[Up] = []

    def start(*words: str) -> Up:
        up = Up(tmp_path / "data", *words, cwd=tmp_path)
        started.append(up)
        eventually(lambda: "Ctrl-C stops" in up.text and up.pids("child"), within_s=30, what=f"the start of {up.said}")
        return up

    yield start
    for up in started:
        up.kill()
    try:
        eventually(lambda: not living_in(tmp_path / "data"), what="the end of every process")
    finally:
        for line in living_in(tmp_path / "data"):
            os.kill(int(line.split(":")[0]), signal.SIGKILL)


def environment(folder: Path) -> dict[str, str]:
    found = running(folder)
    assert found is not None
    return found


def write(folder: Path, value: str) -> None:
    servers = environment(folder)
    with psycopg.connect(servers["EVALSTORE_DATABASE_URL"], autocommit=True) as conn:
        conn.execute("CREATE TABLE IF NOT EXISTS kept (value text)")
        conn.execute("INSERT INTO kept VALUES (%s)", [value])
    with redis.Redis.from_url(servers["EVALSTORE_REDIS_URL"]) as client:
        client.rpush("kept", value)


def read(folder: Path) -> list[str]:
    servers = environment(folder)
    with psycopg.connect(servers["EVALSTORE_DATABASE_URL"]) as conn:
        rows = [value for (value,) in conn.execute("SELECT value FROM kept ORDER BY ctid")]
    with redis.Redis.from_url(servers["EVALSTORE_REDIS_URL"], decode_responses=True) as client:
        assert client.lrange("kept", 0, -1) == rows
    return rows


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_everything_in_order_with_exit_status_0(
    start: Start, living_in: LivingIn, number: signal.Signals
) -> None:
    up = start()
    up.signal(number)
    assert up.process.wait(timeout=20) == 0
    assert re.findall(r"(\w+) stopped", up.text) == ["worker", "Valkey", "PostgreSQL"]
    assert living_in(up.folder) == []
    assert "database system is shut down" in (up.folder / "postgres/log").read_text()
    assert running(up.folder) is None


def test_data_and_addresses_outlive_a_restart_and_a_kill(start: Start) -> None:
    up = start()
    before = environment(up.folder)
    write(up.folder, "before the stop")
    up.signal(signal.SIGINT)
    up.process.wait(timeout=20)
    up = start()
    write(up.folder, "before the kill")
    up.kill()
    start()

    assert read(up.folder) == ["before the stop", "before the kill"]
    assert environment(up.folder) == before


def test_a_second_stack_names_the_folder_of_the_first_and_exits(start: Start, tmp_path: Path, living_in: LivingIn) -> None:
    first = start()
    write(first.folder, "kept")
    alive = living_in(first.folder)
    second = Up(first.folder, cwd=tmp_path)
    assert second.process.wait(timeout=20) == 1
    assert second.text == (f"evalstore up: evalstore already runs in {first.folder}, as process {first.process.pid}\n")
    assert living_in(first.folder) == alive
    assert read(first.folder) == ["kept"]


@pytest.mark.parametrize("words", [(), ("deaf",)], ids=["", "of a worker that ignores SIGTERM"])
def test_a_killed_stack_leaves_no_process_behind(
    start: Start, living_in: LivingIn, eventually: Eventually, words: tuple[str, ...]
) -> None:
    up = start(*words)
    assert len(living_in(up.folder)) > 7
    up.kill()
    eventually(lambda: not living_in(up.folder), within_s=6, what="the end of every process of the folder")


def test_the_next_one_takes_over_when_only_a_grandchild_survived(
    start: Start, living_in: LivingIn, eventually: Eventually
) -> None:
    up = start("deaf")
    write(up.folder, "kept")
    [child] = up.pids("child")
    up.process.kill()
    for line in living_in(up.folder):
        if int(line.split(":")[0]) != child:
            with suppress(ProcessLookupError):  # some end by themselves
                os.kill(int(line.split(":")[0]), signal.SIGKILL)
    eventually(lambda: [line.split(":")[0] for line in living_in(up.folder)] == [str(child)], what="only the child alive")

    up = start()
    assert "the last run was killed" in up.text
    assert read(up.folder) == ["kept"]
    assert not [line for line in living_in(up.folder) if line.startswith(f"{child}:")]


def test_a_worker_that_dies_is_started_again_after_all_of_it_is_gone(start: Start, eventually: Eventually) -> None:
    up = start()
    [master], [child] = up.pids("master"), up.pids("child")
    os.kill(master, signal.SIGKILL)
    eventually(lambda: len(up.pids("child")) == 2, what="the second worker")
    assert not Path(f"/proc/{child}").exists()
    assert "worker has ended; starting it again in 0.5 s" in up.text

    os.kill(up.pids("master")[1], signal.SIGKILL)
    eventually(lambda: len(up.pids("child")) == 3, what="the third worker")
    assert "worker has ended; starting it again in 1 s" in up.text


@pytest.mark.parametrize("name", ["postgres", "valkey"])
def test_a_server_that_dies_is_started_again_at_its_address(
    start: Start, living_in: LivingIn, eventually: Eventually, name: str
) -> None:
    up = start()
    write(up.folder, "kept")
    program = {"postgres": r"\d+: \S*/postgres -D", "valkey": r"\d+: \S*/valkey-server "}[name]
    [server] = [line for line in living_in(up.folder) if re.match(program, line)]
    os.kill(int(server.split(":")[0]), signal.SIGKILL)
    eventually(lambda: "has ended; starting" in up.text, what="the notice")

    def is_back() -> bool:
        try:
            return read(up.folder) == ["kept"]
        except (psycopg.OperationalError, redis.ConnectionError):
            return False

    eventually(is_back, what="the same data at the same address")


def test_what_cannot_be_started_again_is_tried_until_it_can(start: Start, living_in: LivingIn, eventually: Eventually) -> None:
    """On a full disk, say, where its files cannot be written."""
    up = start()
    in_the_way = up.folder / "valkey/port.new"
    in_the_way.mkdir()
    [server] = [line for line in living_in(up.folder) if re.match(r"\d+: \S*/valkey-server ", line)]
    os.kill(int(server.split(":")[0]), signal.SIGKILL)
    eventually(lambda: "Valkey cannot be started" in up.text, what="the notice")

    in_the_way.rmdir()

    eventually(lambda: any("/valkey-server " in line for line in living_in(up.folder)), within_s=30, what="its return")


def test_a_second_ctrl_c_does_not_wait_for_a_deaf_worker(start: Start, eventually: Eventually) -> None:
    up = start("deaf")
    up.signal(signal.SIGINT)
    eventually(lambda: "stopping" in up.text, what="the first notice")
    with pytest.raises(subprocess.TimeoutExpired):
        up.process.wait(timeout=1)
    up.signal(signal.SIGINT)
    assert up.process.wait(timeout=5) == 0
    assert "database system is shut down" in (up.folder / "postgres/log").read_text()


def test_the_environment_is_for_shells_and_for_its_owner_alone(start: Start) -> None:
    up = start()
    path = up.folder / "environment"
    assert path.stat().st_mode & 0o777 == 0o600
    expected = environment(up.folder)
    script = f". {shlex.quote(str(path))}; printf '%s\\n' " + " ".join(f'"${name}"' for name in expected)
    sourced = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert sourced.splitlines() == list(expected.values())
    assert expected["EVALSTORE_OBJECT_STORE_URL"] == f"file://{up.folder}/objects"
    assert expected["EVALSTORE_ARCHIVE_URL"] == f"file://{up.folder}/archive"
    assert not re.search(r":[0-9a-f]{48}@", up.text)  # no password is shown


def test_the_schema_exists_when_the_stack_is_ready(start: Start) -> None:
    up = start()
    with psycopg.connect(environment(up.folder)["EVALSTORE_DATABASE_URL"]) as conn:
        assert conn.execute("SELECT count(*) FROM evaluations").fetchone() == (0,)


def test_it_is_ready_when_its_workers_are(tmp_path: Path, eventually: Eventually) -> None:
    said, folder = tmp_path / "said", tmp_path / "data"
    with said.open("wb") as out:
        up = subprocess.Popen([sys.executable, "-c", SERVE_LATE, str(folder), LATE], cwd=tmp_path, stdout=out, stderr=out)
    try:
        eventually(lambda: "worker | imports" in said.read_text(), within_s=30, what="the start of the worker")
        assert "Ctrl-C stops" not in said.read_text()
        assert not (folder / "environment").exists()
        (tmp_path / "may-work").touch()
        eventually(lambda: "Ctrl-C stops" in said.read_text(), what="that it says so")
        assert (folder / "environment").exists()
    finally:
        up.terminate()
        assert up.wait(timeout=20) == 0


def test_it_prints_a_link_that_signs_in_to_the_console_once(tmp_path: Path, eventually: Eventually) -> None:
    said = tmp_path / "said"
    with said.open("wb") as out:
        up = subprocess.Popen([sys.executable, "-c", SERVE_API, str(tmp_path / "data")], cwd=tmp_path, stdout=out, stderr=out)
    try:
        eventually(lambda: "Ctrl-C stops" in said.read_text(), within_s=30, what="the start")
        [link] = re.findall(r"console +(http://\S+)", said.read_text())
        with httpx.Client() as first, httpx.Client() as second:
            assert first.get(link).headers["location"] == "/console"
            assert "scope admin" not in first.get(f"{link.partition('/console')[0]}/console/evaluations").text
            assert second.get(link).status_code == 403
    finally:
        up.send_signal(signal.SIGINT)
        assert up.wait(timeout=30) == 0


def test_log_lines_show_whose_they_are_and_hold_no_terminal_codes(start: Start) -> None:
    up = start()
    [pid] = up.pids("master")
    assert f"worker | master {pid} \\x1b]0;title\\x07\n" in up.text
    assert "\x1b" not in up.text


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_names_are_coloured_on_a_terminal_only(variables: Mapping[str, str], coloured: bool) -> None:
    code = "from evalstore.cli.up import prefixed; prefixed(['up', 'worker'])('worker', 'hello')"
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", **variables}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=env, check=True)
    os.close(theirs)
    shown = os.read(ours, 1000).decode()
    os.close(ours)
    assert shown == ("\x1b[33mworker | \x1b[0mhello\r\n" if coloured else "worker | hello\r\n")


def test_a_relative_folder_with_a_space_in_its_name_will_do(tmp_path: Path, eventually: Eventually) -> None:
    up = Up(Path("my data"), cwd=tmp_path)
    try:
        eventually(lambda: "Ctrl-C stops" in up.text, within_s=30, what="the start")
        write(tmp_path / "my data", "kept")
        assert read(tmp_path / "my data") == ["kept"]
    finally:
        up.signal(signal.SIGTERM)
        assert up.process.wait(timeout=20) == 0


def test_nothing_that_was_sent_is_missing_after_a_kill(tmp_path: Path, living_in: LivingIn, eventually: Eventually) -> None:
    """The real command with the real worker, killed while events are on their way."""
    evalstore, folder, said = [sys.executable, "-m", "evalstore.cli.app"], tmp_path / ".evalstore", tmp_path / "said"
    sent = tmp_path / "sent.jsonl"
    events = [{"type": "evaluation:queued", "eval_id": f"e{n}", "event_id": str(uuid4()), "code": "1"} for n in range(3000)]
    sent.write_text("".join(json.dumps(event) + "\n" for event in events))

    def audit() -> int:
        return subprocess.run([*evalstore, "audit", str(sent)], cwd=tmp_path, check=False).returncode

    def applied() -> int:
        with psycopg.connect(environment(folder)["EVALSTORE_DATABASE_URL"]) as conn:
            [count] = conn.execute("SELECT count(*) FROM evaluation_events").fetchone() or [0]
        return int(count)

    for is_last in (False, True):
        with said.open("wb") as out, subprocess.Popen([*evalstore, "up"], cwd=tmp_path, stdout=out, stderr=out) as up:
            eventually(lambda: "Ctrl-C stops" in said.read_text(), within_s=30, what="the start")
            if is_last:
                eventually(lambda: applied() == len(events), within_s=60, what="the last event")
                assert audit() == 0
                up.send_signal(signal.SIGINT)
                assert up.wait(timeout=20) == 0
            else:
                subprocess.run([*evalstore, "send", str(sent)], cwd=tmp_path, check=True)
                up.kill()
    assert living_in(folder) == []


def test_a_server_that_cannot_start_stops_the_rest_with_exit_status_1(tmp_path: Path, living_in: LivingIn) -> None:
    folder = tmp_path / "data"
    (folder / "valkey/data").mkdir(parents=True)
    (folder / "valkey/data/appendonlydir").write_text("a file in the way")
    up = Up(folder, cwd=tmp_path)
    assert up.process.wait(timeout=30) == 1
    assert "evalstore up: Valkey ended with status 1; the end of" in up.text
    assert living_in(folder) == []


def test_it_runs_as_an_unprivileged_user_without_a_home(
    open_folder: Path, for_anyone: dict[str, str], eventually: Eventually
) -> None:
    os.chown(open_folder, 65534, 65534)
    how = {"user": 65534, "group": 65534, "extra_groups": [], "env": for_anyone}
    up = Up(open_folder / "data", cwd=open_folder, python=for_anyone["PYTHON"], **how)
    try:
        eventually(lambda: "Ctrl-C stops" in up.text, within_s=30, what=f"the start of {up.text}")
        write(up.folder, "kept")
        assert read(up.folder) == ["kept"]
    finally:
        up.signal(signal.SIGINT)
        assert up.process.wait(timeout=20) == 0
