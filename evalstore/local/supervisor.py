"""Supervise one local process: end it and all its descendants when the owner ends.

This is a program of its own, started by path with `python -I -S` (see processes.py), so it imports only fast modules.

`PR_SET_PDEATHSIG` alone is not enough. It follows the thread that started the process, does not reach grandchildren (Dramatiq
forks its workers), and has no effect after a process in between died. So the supervisor is a child subreaper (prctl(2)):
orphaned descendants become its children. It exits when no descendant is left.

SIGTERM sends the process its own stop signal, and SIGKILL to all descendants after the grace. SIGQUIT kills at once.
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
    """Return the parent and state of each process (proc_pid_stat(5))."""
    table = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            except OSError:  # The process has ended.
                continue
            state, parent, *_ = stat.rpartition(")")[2].split()
            table[int(folder.name)] = (int(parent), state)
    return table


def descendants(root: int) -> list[int]:
    """List the processes below `root` without zombies, parents before their children."""
    children: dict[int, list[int]] = {}
    table = processes()
    for pid, (parent, _) in table.items():
        children.setdefault(parent, []).append(pid)
    tree = [root]
    for pid in tree:
        tree.extend(children.get(pid, []))
    return [pid for pid in tree[1:] if table[pid][1] not in "ZX"]


def send(pids: list[int], signum: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue


def enter_user_namespace() -> None:
    """Become `nobody` in a new user namespace (user_namespaces(7)). Files outside keep their owners."""
    outside = {"uid": os.geteuid(), "gid": os.getegid()}
    if libc.unshare(NEW_USER_NAMESPACE) != 0:
        raise OSError(ctypes.get_errno(), "unshare: " + os.strerror(ctypes.get_errno()))
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {outside['uid']} 1"),
        ("gid_map", f"{NOBODY} {outside['gid']} 1"),
    ):
        Path("/proc/self", file).write_text(text, encoding="ascii")


def become(identity: str, stop_signal: int, supervisor: int, command: list[str]) -> None:
    """Change the identity of the forked child and run the command. Never returns. The child ends with the supervisor."""
    try:
        if identity == "namespace":
            enter_user_namespace()
        elif identity == "nobody":
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        libc.prctl(SET_PDEATHSIG, stop_signal)  # after the change of identity, which would clear it
        for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored_by_python, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if os.getppid() == supervisor:
            os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        print(f"{command[0]}: {error}", file=sys.stderr, flush=True)
    os._exit(127)


def watch(child: int, owner: int, stop_signal: int, grace_s: float) -> int:
    """Wait until no descendant is left, and return the child's exit status (128 + signal, as in a shell).

    `child` becomes 0 once the child has ended. `signalled` is the value of `child` at the last stop signal.
    """
    supervisor, status, is_asked, signalled, kill_at = os.getpid(), 0, False, -1, float("inf")
    while True:
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == child:
                    code = os.waitstatus_to_exitcode(ended[1])
                    status, child = code if code >= 0 else 128 - code, 0
        except ChildProcessError:
            return status
        is_orphaned = os.getppid() != owner
        if (is_asked or is_orphaned or not child) and signalled != child:
            signalled = child  # one stop signal to the child; after its end, one SIGTERM to its descendants
            kill_at = min(kill_at, time.monotonic() + (ORPHAN_GRACE_S if is_orphaned else grace_s))
            remaining = descendants(supervisor)
            send([child] if child else remaining, stop_signal if child else signal.SIGTERM)
            send(remaining, signal.SIGCONT)
        if is_orphaned:
            kill_at = min(kill_at, time.monotonic() + ORPHAN_GRACE_S)
        if time.monotonic() >= kill_at:
            send(descendants(supervisor), signal.SIGKILL)
        received = signal.sigtimedwait(WATCHED, min(max(kill_at - time.monotonic(), 0.05), 3600))
        if received and received.si_signo == signal.SIGQUIT:
            kill_at = 0
        elif received and received.si_signo in STOP:
            is_asked = True


def main(owner: str, stop_signal: str, grace_s: str, identity: str, *command: str) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    libc.prctl(SET_CHILD_SUBREAPER, 1)
    # Wakes `watch`, because the thread that started this process may end before its process
    libc.prctl(SET_PDEATHSIG, signal.SIGUSR1)
    supervisor = os.getpid()
    child = os.fork()
    if child == 0:
        become(identity, int(stop_signal), supervisor, list(command))
    return watch(child, int(owner), int(stop_signal), float(grace_s))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
