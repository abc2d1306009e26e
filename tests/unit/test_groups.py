"""What processes count and whether they live is read from outside, whatever became of them."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP

import pytest

from evalstore.telemetry import process_registry
from evalstore.telemetry.counters import Counters, Schema, counted_by
from worker.metrics import Outages

LAYOUT = Schema(counted_by("worker"), {"job_name": ["a"]})
APPLIED = "evalstore_events_total", ("applied", "evaluation:queued")

# A process that counts, and beats until it is killed; `after` says what it does when it has begun.
_PROCESS = """
import sys, threading, time
from pathlib import Path
from evalstore.telemetry import process_registry as groups
from evalstore.telemetry.counters import Counters, Schema, counted_by
ledger = Counters(Schema(counted_by("worker"), {"job_name": ["a"]}))
ledger.add("evalstore_events_total", "applied", "evaluation:queued", by=int(sys.argv[1]))
groups.join("worker", ledger, Path(sys.argv[2]))
ledger.add("evalstore_outage_seconds_total", "redis", by=int(sys.argv[1]))
ledger.set("evalstore_breaker_open", to=1)
ledger.watch_thread("main")
ledger.set_deadline(0.5)
print("ready", flush=True)
while True:
    time.sleep(0.05)
    ledger.set_deadline(0.5)
"""


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def start(runtime: Path) -> Iterator[Callable[[int], subprocess.Popen[bytes]]]:
    begun: list[subprocess.Popen[bytes]] = []

    def start_one(number: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", _PROCESS, str(number), str(runtime)], stdout=subprocess.PIPE)
        begun.append(process)
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start_one
    for process in begun:
        process.kill()
        process.communicate()


def counted(group: process_registry.Group, *key: str) -> float:
    return group.totals(LAYOUT)[LAYOUT.offsets[key[0], key[1:]]]


def test_counts_outlive_a_kill_and_go_to_one_of_those_that_start_next(
    start: Callable[[int], subprocess.Popen[bytes]], runtime: Path
) -> None:
    for number in (3, 4):
        started = start(number)
        assert len(process_registry.groups(runtime)) == 1
        started.send_signal(SIGKILL)
        started.wait()
        assert process_registry.groups(runtime) == []
    start(5)
    start(6)

    assert sorted(counted(group, APPLIED[0], *APPLIED[1]) for group in process_registry.groups(runtime)) == [6, 3 + 4 + 5]
    assert sorted(counted(group, "evalstore_outage_seconds_total", "redis") for group in process_registry.groups(runtime)) == [
        6,
        3 + 4 + 5,
    ]
    assert [counted(group, "evalstore_breaker_open") for group in process_registry.groups(runtime)] == [
        1,
        1,
    ]  # gauges of the dead are over
    assert len(list(runtime.glob("worker;*"))) == 2


@pytest.mark.parametrize("done", ["new", "total", "files", "moved"])
def test_a_takeover_that_was_broken_off_counts_nothing_twice_and_loses_nothing(
    start: Callable[[int], subprocess.Popen[bytes]], runtime: Path, monkeypatch: pytest.MonkeyPatch, done: str
) -> None:
    started = start(7)
    (ended,) = process_registry.groups(runtime)
    started.kill()
    started.wait()
    start(1)
    heir = next(group for group in process_registry.groups(runtime) if group.folder != ended.folder)
    assert counted(heir, APPLIED[0], *APPLIED[1]) == 8

    # What a crash leaves behind after each step: a total that has not its name yet, or that has it, beside the files; the total
    # alone; an empty folder.
    taken = next(heir.folder.glob("past;*"))
    ended.folder.mkdir()
    if done != "moved":
        taken.rename(ended.folder / ("total.new" if done == "new" else "total"))
    if done == "new":
        (ended.folder / process_registry.name_of(2**22 - 1)).write_bytes((ended.folder / "total.new").read_bytes())
    if done == "total":
        (ended.folder / process_registry.name_of(2**22 - 1)).write_bytes(LAYOUT.data([9.0] * LAYOUT.size))
    start(2)

    assert sum(counted(group, APPLIED[0], *APPLIED[1]) for group in process_registry.groups(runtime)) == 7 + 1 + 2


def test_a_frozen_process_is_stuck_until_it_goes_on(
    start: Callable[[int], subprocess.Popen[bytes]], runtime: Path, eventually: Callable[..., None]
) -> None:
    started = start(1)
    (group,) = process_registry.groups(runtime)
    assert [process.stuck for process in group.processes()] == [[]]

    started.send_signal(SIGSTOP)
    eventually(lambda: [process.stuck for process in group.processes()] == [["main"]], what="the verdict")
    started.send_signal(SIGCONT)
    eventually(lambda: [process.stuck for process in group.processes()] == [[]], what="the recovery")


def test_a_thread_that_is_stuck_shows_and_one_that_waits_does_not(runtime: Path, eventually: Callable[..., None]) -> None:
    ledger = Counters(LAYOUT)
    group = process_registry.join("worker", ledger, runtime)
    ledger.watch_thread("batches")

    ledger.set_deadline(None)
    assert [process.stuck for process in group.processes()] == [[]]
    ledger.set_deadline(0.01)
    eventually(lambda: [process.stuck for process in group.processes()] == [["batches"]], what="the verdict")
    ledger.leave_thread()
    assert [process.stuck for process in group.processes()] == [[]]


def test_counts_of_another_release_are_dropped(runtime: Path, start: Callable[[int], subprocess.Popen[bytes]]) -> None:
    other = Schema(counted_by("api"), {"method": [], "route": [], "status": []})
    ended = runtime / f"worker;{process_registry.name_of(2**22 - 1)}"
    ended.mkdir(parents=True)
    (ended / process_registry.name_of(2**22 - 1)).write_bytes(other.data([9.0] * other.size))

    start(2)

    (group,) = process_registry.groups(runtime)
    assert counted(group, APPLIED[0], *APPLIED[1]) == 2
    assert not ended.exists()


def test_a_full_disk_hides_who_begins_then_and_nobody_else(
    start: Callable[[int], subprocess.Popen[bytes]], runtime: Path
) -> None:
    start(3)
    (group,) = process_registry.groups(runtime)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    on_signal = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(process_registry.RegistryUnavailable):
            process_registry.join("worker", Counters(LAYOUT), runtime)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, on_signal)
    assert len(process_registry.groups(runtime)) == 1

    (group.folder / process_registry.name_of(os.getpid())).write_bytes(b"")  # of one that makes its file just now
    assert [process.stuck for process in group.processes()] == [[], []]
    assert counted(group, APPLIED[0], *APPLIED[1]) == 3


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(process_registry.RegistryUnavailable, match="another user"):
        process_registry.runtime(tmp_path)


def test_an_outage_of_the_object_store_is_over_for_who_hears_no_more_of_it(eventually: Callable[..., None]) -> None:
    ledger = Counters(LAYOUT)
    outages = Outages(ledger, heard_for_s=0.2)
    for server in ("objects", "redis"):
        outages.away(server, "somebody")
    assert outages.update() == ["redis", "objects"]
    eventually(lambda: outages.update() == ["redis"], what="the end of what nobody hears of")  # who waits for Redis asks it
    assert [ledger.get("evalstore_outage", server) for server in ("objects", "redis")] == [0, 1]
    assert 0.2 <= ledger.get("evalstore_outage_seconds_total", "objects") < 5


def test_histograms_count_each_value_in_its_bucket() -> None:
    ledger = Counters(LAYOUT)
    for value in (1, 2, 3, 20_000):
        ledger.observe("evalstore_batch_events", value=value)
    place = LAYOUT.offsets["evalstore_batch_events", ()]
    numbers = LAYOUT.numbers(ledger.data())[place : place + 15]
    assert numbers == [1, 1, 1, *[0] * 10, 1, 20_006]
