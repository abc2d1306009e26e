"""A recording sends one started event and exactly one ending, however its block ends."""

import asyncio
import base64
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from evalstore.local.servers import Valkey
from models.errors import InvalidEvent, RedisOutage
from models.settings import settings
from tasks import recording
from tasks.broker import broker
from tasks.recording import Recording, current_recording
from tests.integration import recorded
from tests.integration.recorded import sent, types

Eventually = Callable[..., None]
SURROGATE = "\ud800"
SLEEPS = """
import os, signal, subprocess, sys, threading, time
from tasks import recording
from tasks.recording import current_recording
def ready(): print("ready", flush=True)
"""


ASYNC = """
import asyncio
async def main():
    async with recording('e'):
        ready(); await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.fixture
def url(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """This process sends to a Redis of the test's own."""
    monkeypatch.setenv("EVALSTORE_REDIS_URL", redis_url)
    settings.cache_clear()
    broker.cache_clear()
    yield redis_url
    broker().client.close()
    settings.cache_clear()
    broker.cache_clear()


def test_a_block_sends_queued_started_and_completed_with_the_result(url: str) -> None:
    given: dict[str, Any] = {"executor_id": "x", "container_id": "c", "timeout_s": 9, "metadata": {"a": 1}}
    with recording("e", attempt=2, code="print(1)", language="py", submitter="me", run_id="r", **given) as run:
        run.output, run.error, run.exit_code, run.score = "1\n", b"\xff", 3, 0.5
        run.metadata["b"] = 2
    queued, started, ending = sent(url)
    assert types([queued, started, ending]) == ["queued 2", "started 2", "completed 2"]
    wanted = {"code": "print(1)", "language": "py", "submitter": "me", "run_id": "r", "metadata": {"a": 1}}
    assert {name: queued[name] for name in wanted} == wanted
    assert (started["executor_id"], started["container_id"], started["timeout_s"]) == ("x", "c", 9)
    assert (ending["output"], ending["exit_code"], ending["score"], ending["metadata"]) == ("1\n", 3, 0.5, {"b": 2})
    assert (ending["executor_id"], ending["container_id"]) == ("x", "c")
    assert base64.b64decode(ending["error_b64"]) == b"\xff"
    assert 0 < ending["duration_ms"] < 10_000
    assert "memory_bytes" not in ending


def test_a_block_that_sets_nothing_completes_with_exit_code_0_and_no_queued_event(url: str) -> None:
    with recording("e", metadata={"a": 1}):
        pass
    started, ending = sent(url)
    assert types([started, ending]) == ["started", "completed"]
    assert (started["metadata"], ending["exit_code"]) == ({"a": 1}, 0)


def test_a_field_of_the_queued_event_needs_code(url: str) -> None:
    with pytest.raises(TypeError, match="run_id: a queued event"):
        recording("e", run_id="r")


@pytest.mark.parametrize("status", ["failed", "timed_out", "cancelled"])
def test_the_block_chooses_another_ending(url: str, status: Any) -> None:
    with recording("e") as run:
        run.status, run.reason = status, "no\0longer"
    ending = sent(url)[-1]
    assert ending["type"] == f"evaluation:{status}"
    assert ending.get("reason") == ("no\\0longer" if status == "cancelled" else None)
    assert ending.get("error") == ("" if status == "failed" else None)


def test_an_unknown_status_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a status of completed, failed"):
        recording("e").status = "lost"  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (ValueError("bad"), "failed"),
        (TimeoutError(), "timed_out"),
        (subprocess.TimeoutExpired("x", 1, output=b"partial"), "timed_out"),
        (KeyboardInterrupt(), "cancelled"),
        (SystemExit(3), "cancelled"),
        (asyncio.CancelledError(), "cancelled"),
        (GeneratorExit(), "cancelled"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_ends_the_evaluation_and_is_raised_again(url: str, error: BaseException, ending: str) -> None:
    with pytest.raises(type(error)) as raised, recording("e"):
        raise error
    assert raised.value is error
    started, last = sent(url)
    assert types([started, last]) == ["started", ending]
    if ending == "failed":
        assert last["error"].startswith("Traceback (most recent call last):")
        assert last["error"].endswith("ValueError: bad\n")
    if ending == "cancelled":
        assert last["reason"].startswith(type(error).__name__)
    if isinstance(error, subprocess.TimeoutExpired):
        assert last["output"] == "partial"


def test_a_failed_program_gives_its_output_and_exit_code(url: str) -> None:
    with pytest.raises(subprocess.CalledProcessError), recording("e") as run:
        subprocess.run([sys.executable, "-c", "print('out'); exit(7)"], check=True, capture_output=True)
    ending = sent(url)[-1]
    assert (ending["type"], ending["exit_code"], ending["output"]) == ("evaluation:failed", 7, "out\n")
    assert isinstance(run.error, bytes)


def test_own_error_text_comes_before_the_traceback(url: str) -> None:
    def fail() -> None:
        with recording("e") as run:
            run.error = b"stderr"
            raise ValueError("bad" + SURROGATE)

    with pytest.raises(ValueError, match="bad"):
        fail()
    assert sent(url)[-1]["error"].startswith("stderr\nTraceback")


def test_the_memory_of_the_program_is_measured_and_not_that_of_the_parent(url: str) -> None:
    ballast = b"x" * (64 << 20)
    program = "import time\nx = b'x' * (30 << 20)\ntime.sleep(0.3)"
    with recording("e"):
        subprocess.run([sys.executable, "-c", program], check=True)
    with recording("small"):
        subprocess.run(["sleep", "0.3"], check=True)
    assert 30 << 20 < sent(url, "e")[-1]["memory_bytes"] < 60 << 20
    assert 0 < sent(url, "small")[-1]["memory_bytes"] < 10 << 20
    del ballast


def test_recordings_of_threads_measure_their_own_programs(url: str) -> None:
    def run(name: str, size_mb: int) -> None:
        with recording(name):
            program = f"import time\nx = b'x' * ({size_mb} << 20)\ntime.sleep(0.5)"
            subprocess.run([sys.executable, "-c", program], check=True)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(run, ["big", "small"], [80, 1]))
    assert sent(url, "big")[-1]["memory_bytes"] > 80 << 20
    assert sent(url, "small")[-1]["memory_bytes"] < 40 << 20


def test_an_invalid_argument_is_refused_and_the_block_does_not_run(url: str) -> None:
    with pytest.raises(InvalidEvent, match="eval_id"), recording("not an id"):
        pytest.fail("the block ran")
    assert sent(url) == []


def test_an_invalid_result_is_sent_as_failed_and_raised(url: str) -> None:
    with pytest.raises(InvalidEvent, match="score"), recording("e", executor_id="x") as run:
        run.score = float("nan")
    started, ending = sent(url)
    assert types([started, ending]) == ["started", "failed"]
    assert "cannot store this result" in ending["error"]
    assert "score" in ending["error"]
    assert ending["executor_id"] == "x"


def test_the_error_of_the_block_comes_before_an_invalid_result(url: str) -> None:
    def fail() -> None:
        with recording("e") as run:
            run.memory_bytes = 1.5  # type: ignore[assignment]
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad") as raised:
        fail()
    assert "did not store the result" in raised.value.__notes__[0]
    assert types(sent(url)) == ["started", "failed"]


def test_nested_recordings_each_send_their_own(url: str) -> None:
    assert current_recording() is None
    with recording("outer") as outer:
        assert current_recording() is outer
        with recording("inner") as inner:
            assert current_recording() is inner
        assert current_recording() is outer
    assert current_recording() is None
    assert [event["eval_id"] for event in sent(url)] == ["outer", "inner", "inner", "outer"]


def test_the_async_form_records_many_tasks_each_with_its_run(url: str) -> None:
    async def work(number: int) -> None:
        async with recording(f"e-{number}") as run:
            await asyncio.sleep(0.01)
            assert current_recording() is run
            run.output = str(number)

    async def main() -> None:
        await asyncio.gather(*map(work, range(50)))

    asyncio.run(main())
    for number in range(50):
        events = sent(url, f"e-{number}")
        assert types(events) == ["started", "completed"]
        assert events[-1]["output"] == str(number)


def test_a_task_cancelled_again_and_again_sends_one_ending(url: str) -> None:
    async def work(inside: asyncio.Event) -> None:
        async with recording("e"):
            inside.set()
            await asyncio.sleep(60)

    async def main() -> None:
        inside = asyncio.Event()
        task = asyncio.create_task(work(inside))
        await inside.wait()
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        assert task.cancelled()

    asyncio.run(main())
    assert types(sent(url)) == ["started", "cancelled"]


def test_a_task_cancelled_while_it_starts_sends_an_ending(url: str) -> None:
    async def work() -> None:
        async with recording("e"):
            await asyncio.sleep(60)

    async def main() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert types(sent(url)) in ([], ["started", "cancelled"])


def test_asyncio_time_limit_is_timed_out(url: str) -> None:
    async def main() -> None:
        async with recording("e"), asyncio.timeout(0.01):
            await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        asyncio.run(main())
    assert types(sent(url)) == ["started", "timed_out"]


def test_an_invalid_argument_of_the_async_form_is_refused(url: str) -> None:
    async def main() -> None:
        async with recording("not an id"):
            pytest.fail("the block ran")

    with pytest.raises(InvalidEvent, match="eval_id"):
        asyncio.run(main())
    assert sent(url) == []


@pytest.mark.parametrize(
    "body",
    [
        "with recording('e'):\n    ready(); time.sleep(60)",
        "with recording('e'):\n    ready(); subprocess.run(['sleep', '60'])",
        ASYNC,
    ],
    ids=["sleep", "program", "async"],
)
def test_sigterm_ends_the_block_as_cancelled_and_the_process_with_143(redis_url: str, body: str) -> None:
    with recorded.start(SLEEPS + body, redis_url) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(20) == 143
    assert types(sent(redis_url)) == ["started", "cancelled"]


def test_a_second_sigterm_ends_the_process_at_once(redis_url: str) -> None:
    body = """
with recording('e'):
    try:
        ready(); time.sleep(60)
    except SystemExit:
        ready(); time.sleep(60)
"""
    with recorded.start(SLEEPS + body, redis_url) as process:
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
            process.terminate()
        assert process.wait(20) == -15


def test_the_handler_of_the_application_stays_and_the_default_comes_back(redis_url: str) -> None:
    body = """
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
with recording('a'), recording('b'):
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
own = lambda *_: None
signal.signal(signal.SIGTERM, own)
with recording('c'):
    assert signal.getsignal(signal.SIGTERM) is own
assert signal.getsignal(signal.SIGTERM) is own
"""
    assert recorded.run(SLEEPS + body, redis_url) == (0, "", "")


def test_a_forked_child_sends_no_ending_and_dies_of_sigterm(redis_url: str) -> None:
    body = """
with recording('e') as run:
    readable, writable = os.pipe()
    if (child := os.fork()) == 0:
        with recording('of-child'):
            pass
        os.write(writable, b'.')
        time.sleep(60)
    os.read(readable, 1)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -15
if (child := os.fork()) == 0:
    sys.exit(0)
with recording('f'):
    if (child := os.fork()) == 0:
        raise ValueError('in the child')
    os.waitpid(child, 0)
"""
    status, _, error = recorded.run(SLEEPS + body, redis_url)
    assert status == 0, error
    assert types(sent(redis_url, "e")) == ["started", "completed"]
    assert types(sent(redis_url, "of-child")) == ["started", "completed"]
    assert types(sent(redis_url, "f")) == ["started", "completed"]


def test_what_a_daemon_thread_records_ends_with_the_process(redis_url: str) -> None:
    body = """
def work():
    with recording('e'):
        ready(); time.sleep(60)
threading.Thread(target=work, daemon=True).start()
while not recording.__globals__['_active']: time.sleep(0.01)
"""
    status, _, error = recorded.run(SLEEPS + body, redis_url)
    assert status == 0, error
    assert types(sent(redis_url)) == ["started", "cancelled"]
    assert sent(redis_url)[-1]["reason"] == "the process ended"


def test_without_redis_the_block_runs_and_the_exit_raises_with_the_events(
    valkey_server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = valkey_server.url()
    script = """
from models.errors import Outage
from tasks import recording, store_evaluations
try:
    with recording('e', code='c') as run:
        print('ran')
except Outage as error:
    print(*error.__notes__)
print(len(run.unsent), run.duration_ms < 100)
try:
    with recording('f'):
        raise ValueError('bad')
except ValueError as error:
    print(*error.__notes__)
input()
store_evaluations(run.unsent)
"""
    valkey_server.stop()
    with recorded.start(script, url, EVALSTORE_SEND_TIMEOUT_S="0.2", PYTHONUNBUFFERED="1") as process:
        assert process.stdout is not None
        assert process.stdin is not None
        lines = [process.stdout.readline().strip() for _ in range(4)]
        assert lines[:3] == ["ran", "of the recording of evaluation e, attempt 1", "3 True"]
        assert lines[3].startswith("evalstore did not store the result of evaluation f")
        valkey_server.start()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(20) == 0
    assert types(sent(url)) == ["queued", "started", "completed"]


def test_with_a_spool_the_events_wait_on_disk_until_redis_is_back(valkey_server: Valkey, tmp_path: Path) -> None:
    url = valkey_server.url()
    spool = {"EVALSTORE_SPOOL_DIR": str(tmp_path / "spool"), "EVALSTORE_SEND_TIMEOUT_S": "0.2"}
    valkey_server.stop()
    status, _, error = recorded.run("from tasks import recording\nwith recording('e'): pass", url, **spool)
    assert status == 0, error
    valkey_server.start()
    forward = "from tasks.broker import broker\nb = broker(); b.spool.forward(b.send_spooled)"
    assert recorded.run(forward, url, **spool)[0] == 0
    assert types(sent(url)) == ["started", "completed"]


def test_redis_away_at_the_start_alone_delays_the_start(valkey_server: Valkey) -> None:
    url = valkey_server.url()
    body = """
with recording('e', executor_id='x'):
    ready(); sys.stdin.readline()
"""
    valkey_server.stop()
    with recorded.start(SLEEPS + body, url, EVALSTORE_SEND_TIMEOUT_S="0.2") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        valkey_server.start()
        process.communicate("\n", timeout=20)
        assert process.returncode == 0
    assert types(sent(url)) == ["started", "completed"]


def test_an_interrupt_while_the_ending_is_sent_does_not_lose_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(frame: Any, event: str, _argument: Any) -> None:
        if event == "call" and frame.f_code.co_name == "enqueue_many":
            sys.setprofile(None)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), recording("e"):
        sys.setprofile(interrupt)
    assert types(sent(url)) == ["started", "completed"]


def test_two_threads_that_finish_one_run_send_one_ending(url: str) -> None:
    run = recording("e")
    run.start()
    threads = [threading.Thread(target=Recording.finish, args=(run,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert types(sent(url)) == ["started", "completed"]


def test_the_outage_of_a_recording_is_the_one_of_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVALSTORE_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("EVALSTORE_SEND_TIMEOUT_S", "0.1")
    settings.cache_clear()
    broker.cache_clear()
    with pytest.raises(RedisOutage), recording("e"):
        pass
    settings.cache_clear()
    broker.cache_clear()
