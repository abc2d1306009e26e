"""Run one program and return its result: `execute(argv, files=..., limits=...) -> Execution`.

Limits protect the machine and other runs from mistakes and greedy programs. They are not a sandbox against an
attacker: the program has access to the file system and the network. Use a container or a virtual machine for that.

Linux only (pidfd, subreaper). Safe to call from many threads at once.
"""

import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGXCPU
from typing import Any, Literal

LAUNCHER = Path(__file__).with_name("launcher.py")

# Time to wait for the launcher after its deadline. Its own clean-up takes 5 s at most.
GRACE_S = 10.0
# No process of the program lives after the launcher's answer, so the pipes hold only buffered output.
DRAIN_S = 1.0


@dataclass(frozen=True)
class Limits:
    """Limits of one run. Memory, CPU, open files and file size apply to each of its processes."""

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    processes: int = 32
    open_files: int = 64
    output_bytes: int = 12 << 20
    """Standard output and standard error together."""


@dataclass(frozen=True)
class Execution:
    """The result of a run. A program that ended, with any exit code, is `completed`. `failed` means that the executor
    could not run it to its end. `failure` gives the reason: it could not start, wrote too much, or was stopped."""

    outcome: Literal["completed", "failed", "timed_out"]
    exit_code: int | None
    """128 + n if signal n ended the program, as in a shell. None if it never ran."""
    output: bytes
    error: bytes
    duration_ms: float
    memory_bytes: int
    """Peak resident memory of the largest of the program and the processes that it waited for."""
    failure: str = ""


class _Capture:
    """Read two pipes into memory, together up to `room` bytes. `overflowed` tells that more output was dropped."""

    def __init__(self, room: int) -> None:
        self.output, self.error = bytearray(), bytearray()
        self.overflowed = False
        self._room = room

    def read(self, fd: int, stream: bytearray) -> bool:
        """Read available output. Return False at the end of the pipe, or if the room is full."""
        chunk = os.read(fd, 65536)
        stream += chunk[: self._room]
        self.overflowed = self.overflowed or len(chunk) > self._room
        self._room = max(0, self._room - len(chunk))
        return bool(chunk) and not self.overflowed


def execute(
    argv: Sequence[str],
    *,
    files: Mapping[str, bytes] | None = None,
    limits: Limits | None = None,
    stop_fd: int | None = None,
) -> Execution:
    """Run `argv` (its first an absolute path) in a temporary folder that holds `files`, and wait for its end.

    Block for `limits.wall_s` and a few seconds at most. Stop the run when `stop_fd` becomes readable or its other end
    closes. No process or file of the run remains at the return. If the machine lacks processes,
    open files or disk, the result is `failed`."""
    limits = limits or Limits()
    try:
        return _execute(argv, files or {}, limits, stop_fd)
    except OSError as error:
        return Execution("failed", None, b"", b"", 0.0, 0, f"could not run the program: {error}")


def _execute(argv: Sequence[str], files: Mapping[str, bytes], limits: Limits, stop_fd: int | None) -> Execution:
    with _scratch_folder(files) as folder:
        spec = {
            "argv": list(argv),
            "cwd": str(folder),
            "env": {
                "PATH": "/usr/local/bin:/usr/bin:/bin",
                "HOME": str(folder),
                "TMPDIR": str(folder),
                "LANG": "C.UTF-8",
            },
            "wall_s": limits.wall_s,
            "limits": {
                "CPU": limits.cpu_s,
                "AS": limits.memory_bytes,
                "FSIZE": limits.file_bytes,
                "NPROC": limits.processes,
                "NOFILE": limits.open_files,
                "CORE": 0,
            },
        }
        capture = _Capture(limits.output_bytes)
        answer, stopped = _launch(spec, capture, stop_fd)
    return _judge(answer, capture, limits, stopped=stopped)


def _launch(spec: dict[str, Any], capture: _Capture, stop_fd: int | None) -> tuple[dict[str, Any] | None, bool]:
    """Return the launcher's answer or None, and whether `stop_fd` requested the end."""
    control, theirs = socket.socketpair()
    with control:
        with theirs:
            launcher = subprocess.Popen(
                [sys.executable, "-I", "-S", str(LAUNCHER), json.dumps(spec)],
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                cwd="/",
                env={"LANG": "C.UTF-8"},
                start_new_session=True,
            )
        with launcher:
            try:
                return _follow(launcher, control, spec["wall_s"], capture, stop_fd)
            finally:
                launcher.kill()  # has no effect if the launcher has ended, as it does after its answer


def _follow(
    launcher: subprocess.Popen[bytes], control: socket.socket, wall_s: float, capture: _Capture, stop_fd: int | None
) -> tuple[dict[str, Any] | None, bool]:
    assert launcher.stdout is not None  # noqa: S101 - for the type checker: they are PIPE
    assert launcher.stderr is not None  # noqa: S101
    pipes = {launcher.stdout.fileno(): capture.output, launcher.stderr.fileno(): capture.error}
    answer, answered, stopped = b"", False, False
    deadline = time.monotonic() + wall_s + GRACE_S
    with selectors.DefaultSelector() as selector:
        for fd in (*pipes, control.fileno(), *([] if stop_fd is None else [stop_fd])):
            selector.register(fd, selectors.EVENT_READ)
        while (pipes or not answered) and (left_s := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                if key.fd in pipes:
                    if capture.read(key.fd, pipes[key.fd]):
                        continue
                    del pipes[key.fd]
                    if capture.overflowed:  # the program blocks in a write until the launcher kills it
                        control.shutdown(socket.SHUT_WR)
                elif key.fd == stop_fd:
                    stopped = True
                    control.shutdown(socket.SHUT_WR)
                elif chunk := control.recv(65536):
                    answer += chunk
                    continue
                else:
                    answered = True
                    deadline = min(deadline, time.monotonic() + DRAIN_S)
                selector.unregister(key.fd)
    return (json.loads(answer) if answer else None), stopped


def _judge(answer: dict[str, Any] | None, capture: _Capture, limits: Limits, *, stopped: bool) -> Execution:
    outcome: Literal["completed", "failed", "timed_out"] = "completed"
    failure = "the launcher was killed" if answer is None else str(answer["failure"])
    started = answer is not None and "exit_code" in answer and not failure.startswith("could not run")
    facts = answer if answer is not None and started else {}
    exit_code = int(facts["exit_code"]) if started else None
    if capture.overflowed:
        failure = f"output limit of {limits.output_bytes} bytes exceeded"
    elif stopped and facts.get("stopped_by") == "executor":
        failure = "stopped before its end"
    if failure:
        outcome = "failed"
    elif facts["stopped_by"] == "deadline" or _is_out_of_cpu(exit_code, facts["cpu_s"], limits):
        outcome = "timed_out"
    return Execution(
        outcome=outcome,
        exit_code=128 - exit_code if exit_code is not None and exit_code < 0 else exit_code,
        output=bytes(capture.output),
        error=bytes(capture.error),
        duration_ms=float(facts.get("duration_ms", 0.0)),
        memory_bytes=int(facts.get("memory_bytes", 0)),
        failure=failure,
    )


def _is_out_of_cpu(exit_code: int | None, cpu_s: float, limits: Limits) -> bool:
    """Tell whether the CPU limit ended the program: SIGXCPU at the limit, SIGKILL a second later. The kernel compares clock
    ticks with the limit but reports exact times, which can be much lower on a busy machine."""
    return exit_code == -SIGXCPU or (exit_code == -SIGKILL and cpu_s >= 0.8 * limits.cpu_s)


@contextmanager
def _scratch_folder(files: Mapping[str, bytes]) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="run-"))
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        yield folder
    finally:
        # shutil.rmtree recurses, and a program can nest folders deeper than Python's recursion limit.
        if subprocess.run(["rm", "-rf", "--", folder], stderr=subprocess.DEVNULL, check=False).returncode != 0:
            subprocess.run(["chmod", "-R", "u+rwX", "--", folder], stderr=subprocess.DEVNULL, check=False)
            subprocess.run(["rm", "-rf", "--", folder], stderr=subprocess.DEVNULL, check=False)
