"""Python that has our libraries already: `[*python(), "-m", "evalstore.cli.app", …]` saves a second or two of importing.

That starts a small process which has the program, given by `-m` or `-c`, forked off one that has imported the libraries, with
its own arguments, environment, folder and streams; it passes signals on, and ends as the program does. When it is killed, so
is that. What an interpreter reads when it starts (PYTHONPATH, PYTHONIOENCODING, LC_ALL) has no effect.
"""

import gc
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

TOLD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@cache
def python() -> tuple[str, ...]:
    """How a command begins. What it is forked off ends with this process."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name, "socket")
    pipe = subprocess.PIPE
    server = subprocess.Popen([sys.executable, __file__, "serve", str(path)], stdin=pipe, env=_outside())
    _kept.append((folder, server))
    give_up = time.monotonic() + 60
    while not path.exists():
        assert server.poll() is None, "it did not start"
        assert time.monotonic() < give_up, "it does not start"
        time.sleep(0.01)
    return sys.executable, "-I", "-S", __file__, str(path)


_kept: list[tuple[tempfile.TemporaryDirectory[str], "subprocess.Popen[bytes]"]] = []


def _outside() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("EVALSTORE_")}


def ask(path: str, words: list[str]) -> int:
    """In the small process: have it run, and return its exit status (negative: the signal that ended it)."""
    with socket.socket(socket.AF_UNIX) as conn:
        conn.connect(path)
        asked = json.dumps([words, dict(os.environ), str(Path.cwd())]).encode()
        socket.send_fds(conn, [len(asked).to_bytes(4, "big")], [0, 1, 2])
        conn.sendall(asked)
        pid = int.from_bytes(_read(conn, 4), "big")
        for number in TOLD:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        return int.from_bytes(_read(conn, 4), "big", signed=True)


def _read(conn: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = conn.recv(size - len(found))
        if not more:
            raise EOFError
        found += more
    return found


def serve(path: str) -> None:
    """Fork for whoever asks, until standard input ends: whoever started this is gone then."""
    sys.path.pop(0)
    _import_libraries()
    gc.freeze()  # So forks do not copy these pages.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.new")
        listener.listen(64)
        Path(f"{path}.new").rename(path)
        while select.select([listener.fileno(), 0], [], [])[0] == [listener.fileno()]:
            conn, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _run_watched(conn)
            conn.close()


def _import_libraries() -> None:
    """Nothing of `ops`: its console looks at the terminal when it is imported. The other rooms look at nothing."""
    import alembic.command  # noqa: F401, PLC0415
    import rich.live  # noqa: PLC0415
    import rich.progress  # noqa: F401, PLC0415
    import typer.main  # noqa: F401, PLC0415

    import evalstore.storage.archive  # noqa: PLC0415
    import evalstore.storage.redrives  # noqa: PLC0415
    import evalstore.telemetry.backend_stats  # noqa: F401, PLC0415


def _run_watched(conn: socket.socket) -> None:
    """Fork the command, tell how it ends, and end it when nobody is there to be told."""
    size, fds, _, _ = socket.recv_fds(conn, 4, 3)
    words, environment, folder = json.loads(_read(conn, int.from_bytes(size, "big")))
    pid = os.fork()
    if pid == 0:
        conn.close()
        _become(words, environment, folder, fds)
    for fd in fds:
        os.close(fd)
    conn.sendall(pid.to_bytes(4, "big"))
    ended = os.pidfd_open(pid)
    if ended not in select.select([ended, conn.fileno()], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    conn.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
    os._exit(0)


def _become(words: list[str], environment: dict[str, str], folder: str, fds: list[int]) -> None:
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.BufferedWriter(io.FileIO(fd, "w", closefd=False)), line_buffering=fd == 2 or os.isatty(fd))
        for fd in (1, 2)
    )
    kind, program, *arguments = words
    sys.argv = [program if kind == "-m" else kind, *arguments]
    sys.path.insert(0, "")
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
    sys.exit()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        status = ask(sys.argv[1], sys.argv[2:])
        if status < 0:
            if -status in TOLD:
                signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
        os._exit(status)
