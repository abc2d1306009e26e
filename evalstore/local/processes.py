"""Start, kill and freeze local processes. Each has a supervisor (supervisor.py), so that it leaves no orphans."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from evalstore.local import supervisor

MARK = "EVALSTORE_GUARDED"  # in the environment of supervised processes and their descendants: the folder they belong to


def start(  # noqa: PLR0913  options, each by name
    command: Sequence[str | Path],
    *,
    mark: Path,
    output: IO[bytes] | int,
    stop_signal: signal.Signals = signal.SIGTERM,
    grace_s: float = 10.0,
    identity: str = "self",
    cwd: Path = Path("/"),
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a command under a supervisor, and return the supervisor.

    The supervisor exits with the command's status, once all processes that the command started have ended. Any thread may call
    this. `mark` is the folder that the process belongs to (see `remains`).
    """
    return subprocess.Popen(
        [
            *(sys.executable, "-I", "-S", supervisor.__file__),
            *(str(os.getpid()), str(int(stop_signal)), str(grace_s), identity),
            *map(str, command),
        ],
        cwd=cwd,
        env={**(os.environ if env is None else env), MARK: str(mark)},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=pass_fds,
        start_new_session=True,  # Ctrl-C must reach only the process that stops all others in order
    )


def kill_now(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the command and its descendants. Does not wait, so a signal handler may call it."""
    process.send_signal(signal.SIGQUIT)


def freeze(process: subprocess.Popen[bytes]) -> None:
    """SIGSTOP the command and its descendants, and return once all are stopped."""
    frozen: set[int] = set()
    while fresh := [pid for pid in supervisor.descendants(process.pid) if pid not in frozen]:
        for pid in fresh:
            supervisor.send([pid], signal.SIGSTOP)
            while supervisor.processes().get(pid, (0, "Z"))[1] not in "TtZX":
                time.sleep(0.001)
            frozen.add(pid)


def thaw(process: subprocess.Popen[bytes]) -> None:
    supervisor.send(supervisor.descendants(process.pid), signal.SIGCONT)


def remains(mark: Path) -> list[int]:
    """List the processes that an earlier run in this folder left behind: marked processes, and servers that work in the folder.

    Marks may be missing: servers overwrite their environment to show a title. Processes of other users are skipped.
    """
    pids = []
    marker = f"{MARK}={mark}".encode()
    for pid, (_, state) in supervisor.processes().items():
        if state in "ZX" or pid == os.getpid():
            continue
        folder = Path("/proc", str(pid))
        try:
            is_server = (folder / "cwd").readlink() == mark and (folder / "comm").read_text().strip() in SERVERS
            if is_server or marker in (folder / "environ").read_bytes().split(b"\0"):
                pids.append(pid)
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue
    return pids


SERVERS = {"postgres", "valkey-server"}


def clear(mark: Path, *, timeout_s: float = supervisor.ORPHAN_GRACE_S + 1) -> None:
    """Wait until the processes of a killed run have ended, as their supervisors ensure. Kill them after `timeout_s`."""
    kill_at = time.monotonic() + timeout_s
    while pids := remains(mark):
        if time.monotonic() > kill_at:
            supervisor.send(pids, signal.SIGKILL)
        time.sleep(0.05)
