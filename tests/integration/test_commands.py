"""A program that is forked off one with its libraries behaves as one that was started."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.integration.commands import python

SHOWS = """
import json, os, sys
told = [sys.argv, dict(os.environ), os.getcwd(), sys.stdin.read(), "evalstore.storage.archive" in sys.modules]
print(json.dumps(told), flush=True)
print("a notice", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
WAITS = """
import os, pathlib, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
while True:
    signal.pause()
"""


def shown(begin: Sequence[str], folder: Path) -> tuple[int, str, list[object]]:
    environment = {"A": "b", "PATH": os.environ["PATH"], "LC_CTYPE": "C.UTF-8"}
    command = [*begin, "-c", SHOWS, "7", "é \udcff"]
    done = subprocess.run(command, env=environment, cwd=folder, input="given", capture_output=True, text=True, check=False)
    return done.returncode, done.stderr, json.loads(done.stdout)


def test_a_command_has_its_own_arguments_environment_folder_and_streams(tmp_path: Path) -> None:
    status, notice, told = shown(python(), tmp_path)
    assert told.pop() is True
    plain_status, plain_notice, plain_told = shown([sys.executable], tmp_path)
    assert plain_told.pop() is False
    assert (status, notice, told) == (plain_status, plain_notice, plain_told)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 5), (signal.SIGKILL, -9)])
def test_a_signal_reaches_the_command_which_never_outlives_its_caller(
    tmp_path: Path, number: signal.Signals, status: int, eventually: Callable[..., None]
) -> None:
    at = tmp_path / "pid"
    with subprocess.Popen([*python(), "-c", WAITS, str(at)]) as asking:
        eventually(lambda: at.exists() and at.read_text(), what="its start")
        asking.send_signal(number)
        assert asking.wait(timeout=20) == status
    eventually(lambda: not Path("/proc", at.read_text()).exists(), what="its end")


def test_the_exit_status_shows_the_killing_signal() -> None:
    done = subprocess.run([*python(), "-c", "import os; os.kill(os.getpid(), 9)"], check=False)
    assert done.returncode == -signal.SIGKILL
