"""Local processes, each under a guard of its own that leaves no orphan: start, kill, freeze, find what remains."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from evalstore.local import supervisor

MARK = "EVALSTORE_GUARDED"  # in the environment of every guarded process, and of what it starts: whose it is


def start(  # noqa: PLR0913  what a process can be given, each by name
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
    """Start a command under a guard (supervisor.py) and return the guard, which exits, with the command's status, only
    when nothing the command started is left. Any thread may call this. `mark`: the folder it belongs to, see `remains`.
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
        start_new_session=True,  # Ctrl-C in the terminal reaches the one that stops everything in order, and not this
    )


def kill_now(guarded: subprocess.Popen[bytes]) -> None:
    """SIGKILL everything the command started, as a crash would. Does not wait: safe in a signal handler."""
    guarded.send_signal(signal.SIGQUIT)


def freeze(guarded: subprocess.Popen[bytes]) -> None:
    """SIGSTOP the whole tree, but not its guard, and return once it stands still: no child can appear any more."""
    frozen: set[int] = set()
    while fresh := [pid for pid in supervisor.descendants(guarded.pid) if pid not in frozen]:
        for pid in fresh:
            supervisor.send([pid], signal.SIGSTOP)
            while supervisor.processes().get(pid, (0, "Z"))[1] not in "TtZX":
                time.sleep(0.001)
            frozen.add(pid)


def thaw(guarded: subprocess.Popen[bytes]) -> None:
    supervisor.send(supervisor.descendants(guarded.pid), signal.SIGCONT)


def remains(mark: Path) -> list[int]:
    """What still runs of an earlier life of this folder: what carries its mark, and servers at work in it (they
    overwrite their environment to show a title). A process of another user's, which nobody may look into, is none."""
    found = []
    wanted = f"{MARK}={mark}".encode()
    for pid, (_, state) in supervisor.processes().items():
        if state in "ZX" or pid == os.getpid():
            continue
        folder = Path("/proc", str(pid))
        try:
            is_server = (folder / "cwd").readlink() == mark and (folder / "comm").read_text().strip() in SERVERS
            if is_server or wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(pid)
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue
    return found


SERVERS = {"postgres", "valkey-server"}


def clear(mark: Path, *, within_s: float = supervisor.ORPHAN_GRACE_S + 1) -> None:
    """Wait for what remains of a killed run to end by itself, as its guards see to; kill what has not `within_s`."""
    kill_at = time.monotonic() + within_s
    while left := remains(mark):
        if time.monotonic() > kill_at:
            supervisor.send(left, signal.SIGKILL)
        time.sleep(0.05)
