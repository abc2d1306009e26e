"""The parent of one local process: ends it, and all it ever started, when whoever asked for it is gone.

A program of its own, started by path with `python -I -S` (see processes.py), so it imports only what is quick
to load. `PR_SET_PDEATHSIG` on the process alone is not enough: it follows the thread that started it, says nothing to
grandchildren (Dramatiq forks its workers), and is forgotten where the one between dies first. This process is a child
subreaper (prctl(2)): what a descendant leaves behind becomes its child, and it ends only when none is left.

SIGTERM stops the process with its own stop signal, and kills what is left after the grace; SIGQUIT kills at once.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

SET_PDEATHSIG = 1
SET_CHILD_SUBREAPER = 36
NEW_USER_NAMESPACE = 0x10000000
NOBODY = 65534
ORPHAN_GRACE_S = 3.0
STOP = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
WATCHED = STOP | {signal.SIGCHLD, signal.SIGQUIT, signal.SIGUSR1}

libc = ctypes.CDLL(None, use_errno=True)


def processes() -> dict[int, tuple[int, str]]:
    """Each process's parent and state (proc_pid_stat(5)); one that ended meanwhile is left out."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            state, parent, *_ = stat.rpartition(")")[2].split()
            found[int(folder.name)] = (int(parent), state)
    return found


def descendants(root: int) -> list[int]:
    """Every living process below `root`, parents before their children; zombies count as dead."""
    below: dict[int, list[int]] = {}
    table = processes()
    for pid, (parent, _) in table.items():
        below.setdefault(parent, []).append(pid)
    tree = [root]
    for pid in tree:
        tree.extend(below.get(pid, []))
    return [pid for pid in tree[1:] if table[pid][1] not in "ZX"]


def send(pids: list[int], signum: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue


def enter_user_namespace() -> None:
    """Become `nobody` in a namespace of its own; files belong to whom they did outside (user_namespaces(7))."""
    outside = {"uid": os.geteuid(), "gid": os.getegid()}
    if libc.unshare(NEW_USER_NAMESPACE) != 0:
        raise OSError(ctypes.get_errno(), "unshare: " + os.strerror(ctypes.get_errno()))
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {outside['uid']} 1"),
        ("gid_map", f"{NOBODY} {outside['gid']} 1"),
    ):
        Path("/proc/self", file).write_text(text, encoding="ascii")


def become(identity: str, stop_signal: int, guard: int, command: list[str]) -> None:
    """In the forked child: change identity, ask for the guard's end as a signal, and run the command. Never returns."""
    try:
        if identity == "namespace":
            enter_user_namespace()
        elif identity == "nobody":
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        libc.prctl(SET_PDEATHSIG, stop_signal)  # after the change of identity, which clears it
        for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored_by_python, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if os.getppid() == guard:
            os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        print(f"{command[0]}: {error}", file=sys.stderr, flush=True)
    os._exit(127)


def watch(child: int, owner: int, stop_signal: int, grace_s: float) -> int:
    """Wait until no descendant is left, and return the child's exit status (128 + signal, as a shell says it)."""
    guard, status, asked, told, kill_at = os.getpid(), 0, False, -1, float("inf")
    while True:
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == child:
                    code = os.waitstatus_to_exitcode(ended[1])
                    status, child = code if code >= 0 else 128 - code, 0
        except ChildProcessError:
            return status
        orphaned = os.getppid() != owner
        if (asked or orphaned or not child) and told != child:
            told = child  # its stop signal once; once it has ended, SIGTERM to what it left behind
            kill_at = min(kill_at, time.monotonic() + (ORPHAN_GRACE_S if orphaned else grace_s))
            left = descendants(guard)
            send([child] if child else left, stop_signal if child else signal.SIGTERM)
            send(left, signal.SIGCONT)
        if orphaned:
            kill_at = min(kill_at, time.monotonic() + ORPHAN_GRACE_S)
        if time.monotonic() >= kill_at:
            send(descendants(guard), signal.SIGKILL)
        received = signal.sigtimedwait(WATCHED, min(max(kill_at - time.monotonic(), 0.05), 3600))
        if received and received.si_signo == signal.SIGQUIT:
            kill_at = 0
        elif received and received.si_signo in STOP:
            asked = True


def main(owner: str, stop_signal: str, grace_s: str, identity: str, *command: str) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    libc.prctl(SET_CHILD_SUBREAPER, 1)
    libc.prctl(SET_PDEATHSIG, signal.SIGUSR1)  # wakes us to look: the thread that started us may end, its process not
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        become(identity, int(stop_signal), guard, list(command))
    return watch(child, int(owner), int(stop_signal), float(grace_s))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
