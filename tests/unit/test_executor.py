"""The example platform's executor: what a program may do, what is told of it, and what is left of it."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
import venv
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from examples.platform.executor import Execution, Limits, execute

LIMITS = Limits(wall_s=20, processes=16, memory_bytes=512 << 20)

Run = Callable[..., Execution]


def processes_of(marker: str) -> list[int]:
    """The processes with `marker` among their arguments: children keep it, whatever session they are in."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if marker.encode() in arguments:
            found.append(int(process.name))
    return found


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.fixture
def marker() -> str:
    return f"marker-{uuid.uuid4()}"


@pytest.fixture
def run(marker: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs Python source under LIMITS; afterwards not one process of it may live, and no folder be left."""
    # Not tmp_path, which is closed to others: where root runs this, the program is another user.
    scratch = Path(tempfile.mkdtemp(prefix="test-executor-"))
    scratch.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def start(source: str, limits: Limits = LIMITS, stop_fd: int | None = None) -> Execution:
        argv = [sys.executable, "-I", "program.py", marker]
        files = {"program.py": textwrap.dedent(source).encode()}
        execution = execute(argv, files=files, limits=limits, stop_fd=stop_fd)
        assert processes_of(marker) == []
        assert list(scratch.iterdir()) == []
        return execution

    yield start
    for pid in processes_of(marker):
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(scratch)


def test_a_program_that_ends_is_told_as_it_was(run: Run) -> None:
    execution = run(
        """
        import sys
        ballast = bytearray(64 << 20)
        print("out")
        print("err", file=sys.stderr)
        sys.exit(3)
        """
    )
    assert (execution.outcome, execution.exit_code, execution.failure) == ("completed", 3, "")
    assert (execution.output, execution.error) == (b"out\n", b"err\n")
    assert 64 << 20 < execution.memory_bytes < 128 << 20
    assert 1 < execution.duration_ms < 20_000


def test_peak_memory_is_that_of_the_program_however_large_the_process_that_runs_it(run: Run) -> None:
    ballast = bytearray(os.urandom(1)) * (200 << 20)
    execution = run("pass")
    assert execution.memory_bytes < 64 << 20
    assert len(ballast) == 200 << 20


def test_a_traceback_comes_back_with_exit_code_1(run: Run) -> None:
    execution = run("raise NotImplementedError")
    assert (execution.outcome, execution.exit_code) == ("completed", 1)
    assert execution.error.startswith(b"Traceback")
    assert execution.error.endswith(b"NotImplementedError\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGPIPE])
def test_an_exit_by_a_signal_is_128_and_its_number(run: Run, number: signal.Signals) -> None:
    reset = "" if number == signal.SIGKILL else f"signal.signal({int(number)}, signal.SIG_DFL)"
    execution = run(f"import os, signal\n{reset}\nos.kill(os.getpid(), {int(number)})")
    assert (execution.outcome, execution.exit_code) == ("completed", 128 + number)


def test_a_program_does_not_inherit_the_signals_that_python_ignores() -> None:
    execution = execute(["/bin/grep", "SigIgn", "/proc/self/status"])
    ignored = int(execution.output.removeprefix(b"SigIgn:"), 16)
    # Signals 32 and 33 are glibc's own, which nobody else can set; a make that spawns leaves 32 ignored.
    assert ignored & ~(0b11 << 31) == 0


def test_all_256_byte_values_come_back(run: Run) -> None:
    execution = run(
        "import sys; sys.stdout.buffer.write(bytes(range(256))); sys.stderr.buffer.write(bytes(range(255, -1, -1)))"
    )
    assert execution.output == bytes(range(256))
    assert execution.error == bytes(range(255, -1, -1))


def test_standard_input_is_empty_and_the_environment_minimal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVALSTORE_DATABASE_URL", "postgresql://secret")
    execution = run(
        """
        import os, sys
        print(repr(sys.stdin.read()), sorted(os.environ), os.getcwd() == os.environ["HOME"])
        print(os.listdir("/proc/self/fd"))
        """
    )
    assert execution.output == b"'' ['HOME', 'LANG', 'PATH', 'TMPDIR'] True\n['0', '1', '2', '3']\n"


def test_an_endless_loop_is_stopped_at_the_wall_clock_limit(run: Run) -> None:
    execution = run("print('so far', flush=True)\nwhile True: pass", limits=Limits(wall_s=1.5))
    assert (execution.outcome, execution.exit_code, execution.output) == ("timed_out", 137, b"so far\n")
    assert 1_500 <= execution.duration_ms < 10_000


def test_an_endless_loop_is_stopped_at_the_cpu_limit(run: Run) -> None:
    execution = run("while True: pass", limits=Limits(wall_s=30, cpu_s=1))
    assert (execution.outcome, execution.exit_code) == ("timed_out", 128 + signal.SIGXCPU)


def test_a_program_that_ignores_the_cpu_limit_is_killed_a_second_later(run: Run) -> None:
    source = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    execution = run(source, limits=Limits(wall_s=30, cpu_s=1))
    assert (execution.outcome, execution.exit_code) == ("timed_out", 137)


def test_a_program_that_closes_its_output_and_sleeps_is_waited_for(run: Run) -> None:
    source = "import os, sys, time\nos.close(1); os.close(2); time.sleep({}); os._exit(5)"
    assert run(source.format(0.3)).exit_code == 5
    assert run(source.format(60), limits=Limits(wall_s=0.5)).outcome == "timed_out"


def test_a_stopped_program_times_out(run: Run) -> None:
    assert run("import os; os.kill(os.getpid(), 19)", limits=Limits(wall_s=0.5)).outcome == "timed_out"


def test_a_memory_hog_gets_no_memory(run: Run) -> None:
    execution = run("hog = bytearray(1 << 30)")
    assert (execution.outcome, execution.exit_code) == ("completed", 1)
    assert execution.error.endswith(b"MemoryError\n")
    assert execution.memory_bytes < 512 << 20


def test_a_fork_bomb_stays_within_the_limit_of_processes(run: Run) -> None:
    execution = run(
        """
        import os, time
        count = 0
        try:
            while True:
                if os.fork() == 0:
                    time.sleep(60)
                    os._exit(0)
                count += 1
        except BlockingIOError:
            print(count)
        """
    )
    assert execution.outcome == "completed"
    assert 1 <= int(execution.output) < LIMITS.processes


def test_a_fork_bomb_that_never_ends_is_gone_after_its_time(run: Run) -> None:
    execution = run(
        """
        import os, signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            try:
                os.fork()
            except OSError:
                pass
        """,
        limits=Limits(wall_s=1, processes=16),
    )
    assert execution.outcome == "timed_out"


def test_two_runs_at_once_do_not_share_the_limit_of_processes(run: Run, marker: str) -> None:
    source = "import os, time\nfor _ in range(10):\n    if os.fork() == 0: time.sleep(60)\ntime.sleep(0.5)"
    argv, files = [sys.executable, "-I", "program.py", marker], {"program.py": source.encode()}
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(execute, argv, files=files, limits=LIMITS) for _ in range(4)]
        assert [one.result().exit_code for one in runs] == [0, 0, 0, 0]
    assert processes_of(marker) == []


def test_a_flood_of_output_is_stopped_at_the_limit_with_flat_memory(run: Run) -> None:
    before = resident_bytes()
    limits = Limits(output_bytes=1_000_000)
    execution = run("while True: print('x' * 9_999)", limits=limits)
    assert (execution.outcome, execution.exit_code) == ("failed", 137)
    assert execution.failure == "output limit of 1000000 bytes exceeded"
    assert execution.output == (b"x" * 9_999 + b"\n") * 100
    assert resident_bytes() - before < 64 << 20


def test_output_and_error_share_the_limit_and_filling_both_does_not_deadlock(run: Run) -> None:
    source = "import sys\nfor _ in range({}): sys.stdout.write('o' * 1000); sys.stderr.write('e' * 1000)"
    full = run(source.format(500), limits=Limits(output_bytes=1_000_000))
    assert (full.outcome, len(full.output), len(full.error)) == ("completed", 500_000, 500_000)
    over = run(source.format(501), limits=Limits(output_bytes=1_000_000))
    assert (over.outcome, len(over.output) + len(over.error)) == ("failed", 1_000_000)


def test_a_file_does_not_grow_beyond_the_limit(run: Run) -> None:
    execution = run("open('big', 'wb').write(bytes(2 << 20))", limits=Limits(file_bytes=1 << 20))
    assert execution.exit_code == 1
    assert b"File too large" in execution.error


def test_open_files_are_limited_and_there_is_no_core(run: Run) -> None:
    execution = run(
        """
        import resource
        print(resource.getrlimit(resource.RLIMIT_CORE))
        files = [open("/dev/null") for _ in range(100)]
        """
    )
    assert execution.output == b"(0, 0)\n"
    assert b"Too many open files" in execution.error


def test_a_grandchild_in_the_background_that_holds_the_pipe_open_does_not_survive(run: Run) -> None:
    execution = run(
        """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                print("daemon", os.getpid(), flush=True)
                time.sleep(60)
            os._exit(0)
        os.wait()
        time.sleep(0.2)
        print("done")
        """
    )
    assert (execution.outcome, execution.exit_code) == ("completed", 0)
    assert execution.output.startswith(b"daemon")
    assert execution.output.endswith(b"done\n")
    assert execution.duration_ms < 10_000


def test_a_process_that_runs_from_the_sweep_by_forking_on_and_on_does_not_survive(run: Run, marker: str) -> None:
    execution = run(
        """
        import os, time
        if os.fork() == 0:
            os.setsid()
            rest_at = time.monotonic() + 0.5
            while time.monotonic() < rest_at:
                if os.fork():
                    os._exit(0)
            time.sleep(60)
        time.sleep(0.05)
        """,
        limits=Limits(wall_s=20, processes=5_000),
    )
    assert (execution.outcome, execution.exit_code) == ("completed", 0)
    # While it is a new process every moment a look may miss it, but not once it rests.
    assert not until(lambda: processes_of(marker) != [], timeout_s=1)


def test_a_program_that_cannot_start_fails_with_the_reason() -> None:
    execution = execute(["/does/not/exist"])
    assert (execution.outcome, execution.exit_code) == ("failed", None)
    assert execution.failure == "could not run the program: [Errno 2] No such file or directory: '/does/not/exist'"


def test_a_run_is_stopped_when_its_stop_fd_closes(run: Run) -> None:
    read, write = os.pipe()
    timer = threading.Timer(0.3, os.close, [write])
    timer.start()
    execution = run("import time; print('up', flush=True); time.sleep(60)", stop_fd=read)
    timer.join()
    os.close(read)
    assert (execution.outcome, execution.failure) == ("failed", "stopped before its end")
    assert execution.duration_ms < 10_000


def test_nothing_runs_on_when_the_executor_is_killed(marker: str, tmp_path: Path) -> None:
    script = f"""
        import sys
        from examples.platform.executor import execute
        execute([sys.executable, "-I", "-c", "import time; time.sleep(60)", {marker!r}])
        """
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # nobody is left to remove its folder
    command = [sys.executable, "-c", textwrap.dedent(script)]
    executor = subprocess.Popen(command, cwd=Path(__file__).parents[2], env=environment)
    try:
        assert until(lambda: processes_of(marker) != [])
    finally:
        executor.kill()
        executor.wait()
    assert until(lambda: processes_of(marker) == [])


def test_a_tree_of_folders_deeper_than_python_recurses_and_closed_to_all_is_removed(run: Run) -> None:
    execution = run(
        """
        import os
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
        open("f", "w").close()
        os.chmod("f", 0)
        os.chmod(".", 0)
        """
    )
    assert execution.exit_code == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights to give up")
def test_root_runs_programs_as_another_user_with_an_interpreter_only_root_reaches(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(0o700)
    venv.create(closed / "venv", symlinks=True)
    status = "print(*(line for line in open('/proc/self/status') if line.startswith(('Uid', 'CapEff', 'NoNewPrivs'))))"
    execution = execute([str(closed / "venv/bin/python"), "-I", "-c", status])
    assert execution.error == b""
    words = execution.output.split()
    assert len(set(words[1:5])) == 1
    assert int(words[1]) > 0
    assert int(words[words.index(b"CapEff:") + 1], 16) == 1 << 2  # CAP_DAC_READ_SEARCH and no other
    assert words[-1] == b"1"


def test_root_of_a_user_namespace_without_other_users_runs_programs_too() -> None:
    namespace = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("user namespaces are not to be had here")
    script = (
        "import sys; from examples.platform.executor import execute\n"
        "print(execute([sys.executable, '-I', '-c', 'import os; print(os.getuid())']).output)"
    )
    command = [*namespace, sys.executable, "-c", script]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("b'0\\n'\n", "")


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False
