"""Start one program under limits, wait for it, and kill all its processes. executor.py runs this file as
`python -I -S launcher.py SPEC`, one process for each run; no module imports it.

A separate process is safer than `preexec_fn`, which runs Python code between fork and exec in a copy of a process whose
other threads may hold locks, so a pool of threads sooner or later hangs. This process has one thread, so
its fork is safe. It is small, so the peak memory of a program does not start from that of a whole gateway (Linux
keeps the high-water mark over exec). It is a subreaper: a daemon that forks twice and calls setsid becomes
a child of this process, not of init, and is found and killed.

Standard input is a socket to the executor. End of file on it means to stop at once, so nothing continues after SIGKILL of
the executor. The answer, one JSON object, goes the other way. The program inherits standard output and error.
"""

import ctypes
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 8, 36, 38, 47
PR_CAP_AMBIENT_RAISE = 2
CAP_DAC_READ_SEARCH = 2
CAPABILITY_VERSION_3 = 0x20080522

# systemd's range for dynamic users. No other user's files or processes have these ids.
FIRST_UID, LAST_UID = 61184, 65519

SWEEP_DEADLINE_S = 5.0

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    control = socket.socket(fileno=os.dup(0))
    try:
        answer = run(json.loads(sys.argv[1]), control)
    except (OSError, ValueError) as error:
        answer = {"failure": f"could not run the program: {error}"}
    with suppress(BrokenPipeError):  # the executor has ended, and no other process needs the answer
        control.sendall(json.dumps(answer).encode())


def run(spec: dict[str, Any], control: socket.socket) -> dict[str, Any]:
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    failed_read, failed_write = os.pipe()
    launcher = os.getpid()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        become_program(spec, launcher, failed_write)
    os.close(failed_write)
    # Close these ends. Otherwise the pipes stay open after the program has closed its ends.
    devnull = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(devnull, fd)
    pidfd = os.pidfd_open(pid)
    stopped_by = wait(pidfd, control.fileno(), started + spec["wall_s"])
    # Until the program is reaped, no other process group can have its number.
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    with suppress(ProcessLookupError):  # it had not reached setsid
        os.killpg(pid, signal.SIGKILL)
    # No other child is reaped yet, so processes that a fork bomb leaves behind count against its limit.
    _, status, usage = os.wait4(pid, 0)
    duration_ms = (time.monotonic() - started) * 1000
    swept = sweep()
    with os.fdopen(failed_read, "rb") as pipe:
        failure = pipe.read().decode(errors="replace")
    if not failure and not swept:
        failure = "some of the program's processes could not be stopped"
    return {
        "failure": failure,
        "stopped_by": stopped_by,
        "exit_code": os.waitstatus_to_exitcode(status),
        "duration_ms": duration_ms,
        "memory_bytes": usage.ru_maxrss * 1024,
        "cpu_s": usage.ru_utime + usage.ru_stime,
    }


def wait(pidfd: int, control_fd: int, deadline: float) -> str:
    """Block until the program ends (""), its time is up ("deadline") or the executor requests the end ("executor")."""
    left_ms = max(0.0, deadline - time.monotonic()) * 1000
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(control_fd, select.POLLIN)
    ready = {fd for fd, _ in poll.poll(left_ms)}
    if pidfd in ready:
        return ""
    return "executor" if control_fd in ready else "deadline"


def become_program(spec: dict[str, Any], launcher: int, failed_write: int) -> NoReturn:
    """In the child: set the limits, drop privileges, and exec. Write an error to `failed_write`."""
    try:
        os.setsid()
        devnull = os.open(os.devnull, os.O_RDONLY)
        os.dup2(devnull, 0)
        os.chdir(spec["cwd"])
        os.umask(0o077)
        # Python ignores these two signals; a program expects the defaults.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        processes = spec["limits"].pop("NPROC")
        for name, value in spec["limits"].items():
            soft, hard = (value, value + 1) if name == "CPU" else (value, value)  # SIGXCPU first, SIGKILL a second later
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (soft, hard))
        if os.geteuid() == 0 and has_other_users():
            drop_root(spec["cwd"], spec["argv"][0], processes)
        else:
            # The kernel counts all processes and threads of the user, so add those that exist.
            limit_processes(processes + count_tasks(os.getuid()))
        prctl(PR_SET_NO_NEW_PRIVS, 1)  # no setuid program changes its user
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after setresuid, which clears it
        if os.getppid() != launcher:
            os._exit(127)  # the launcher died before that call
        os.execve(spec["argv"][0], spec["argv"], spec["env"])  # noqa: S606 - no shell is intended
    except Exception as error:  # noqa: BLE001 - report every error, and do not continue as a second launcher
        os.write(failed_write, f"could not run the program: {error}".encode())
    finally:
        os._exit(127)


def drop_root(cwd: str, program: str, processes: int) -> None:
    """Become a user that no other process has.

    The kernel applies no RLIMIT_NPROC to root, and counts processes per user: two runs with one user could
    starve each other. Raise PermissionError without CAP_SETUID, because a run needs this limit."""
    uid = FIRST_UID + os.getpid() % (LAST_UID - FIRST_UID + 1)
    for path in (Path(cwd), *Path(cwd).iterdir()):
        os.chown(path, uid, uid)
    limit_processes(processes)
    reachable = all(is_open_to_others(place) for place in (program, sys.prefix, sys.base_prefix))
    if not reachable:
        prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if not reachable:
        # The interpreter may be in a home of mode 0700, such as root's: keep the right to read, and no other right of root.
        bit = 1 << CAP_DAC_READ_SEARCH
        header, data = struct.pack("Ii", CAPABILITY_VERSION_3, 0), struct.pack("6I", bit, bit, bit, 0, 0, 0)
        check(libc.capset(header, data))
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_READ_SEARCH)


def has_other_users() -> bool:
    """Return False if root is the only mapped user of a user namespace: the limit applies to that user anyway."""
    for name in ("uid_map", "gid_map"):
        ranges = [map(int, line.split()) for line in Path("/proc/self", name).read_text().splitlines()]
        if not any(first <= FIRST_UID and first + count > LAST_UID for first, _, count in ranges):
            return False
    return True


def is_open_to_others(place: str) -> bool:
    path = Path(place)
    links = {path, path.resolve()}
    return all(folder.stat().st_mode & 0o001 for link in links for folder in (link, *link.parents))


def limit_processes(count: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if hard != resource.RLIM_INFINITY:
        count = min(count, hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (count, count))


def count_tasks(uid: int) -> int:
    total = 0
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and process.stat().st_uid == uid:
                total += sum(1 for _ in (process / "task").iterdir())
        except OSError:
            continue  # it has ended
    return total


def sweep() -> bool:
    """Kill and reap all remaining processes of the program. Return False if some outlive the deadline.

    A process becomes a child of this process when its parent ends. So killing children until there
    are none kills all of them, even if a process keeps forking and exiting."""
    deadline = time.monotonic() + SWEEP_DEADLINE_S
    while time.monotonic() < deadline:
        for child in children():
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
    return False


def children() -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except FileNotFoundError:  # a kernel built without CONFIG_PROC_CHILDREN
        me, found = os.getpid(), []
        for process in Path("/proc").iterdir():
            try:
                if process.name.isdigit() and int((process / "stat").read_text().rpartition(")")[2].split()[1]) == me:
                    found.append(int(process.name))
            except OSError:
                continue
        return found


def prctl(option: int, *arguments: int) -> None:
    check(libc.prctl(option, *(ctypes.c_ulong(a) for a in (*arguments, *[0] * (4 - len(arguments))))))


def check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    main()
