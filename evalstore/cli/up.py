"""`evalstore up`: everything on this machine, in the foreground, until Ctrl-C."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from evalstore.cli.output import escaped
from evalstore.local.stack import LocalStack, commands
from models.errors import EvalstoreError

COLOURS = (36, 33, 32, 35, 34)


def up(
    folder: Annotated[Path, typer.Option("--dir", metavar="PATH", help="Where all data live; created if missing.")] = Path(
        ".evalstore"
    ),
    processes: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each worker process.")] = 8,
) -> None:
    """Run everything on this machine: PostgreSQL, a Redis-compatible server, worker, scheduler and
    HTTP service, until Ctrl-C.

    The servers come with the package and listen on 127.0.0.1 only. Data stay in the folder, and so do ports and
    passwords: PATH/environment holds them for other shells.
    """
    raise typer.Exit(serve(folder, commands(processes, threads), workers=processes))


def serve(folder: Path, to_run: Mapping[str, Sequence[str]], *, workers: int = 0) -> int:
    """Run until SIGINT, SIGTERM or SIGHUP, and return the exit status. A further signal kills what is waited for."""
    show = prefixed(["up", *to_run])
    local = LocalStack(folder, to_run, workers=workers, show=show)
    stopping = False

    def interrupted(_signum: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            local.kill_now()
        else:
            stopping = True
            raise KeyboardInterrupt

    ends = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        ends.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupted) for number in ends}
    try:
        local.start()
        for line in _summary(local):
            show("up", line)
        while True:
            signal.pause()
    except KeyboardInterrupt:
        show("up", "stopping; once more to kill what is waited for")
        return 0
    except (EvalstoreError, OSError) as error:
        named = isinstance(error, OSError) and error.filename is not None and f"{error.filename}: {error.strerror}"
        print(f"evalstore up: {named or error}", file=sys.stderr)
        return 1
    finally:
        stopping = True
        local.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def prefixed(names: Sequence[str]) -> Callable[[str, str], None]:
    """A function that writes a line to stderr behind the name of who said it, the way Procfile runners do. Control
    characters show as escapes: a log line may hold what some evaluated program printed."""
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    width = max(map(len, names))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    one_at_a_time = threading.Lock()

    def show(name: str, line: str) -> None:
        prefix = f"{name:{width}} | "
        if coloured:
            prefix = f"\x1b[{colours[name]}m{prefix}\x1b[0m"
        with one_at_a_time:
            try:
                print(prefix + escaped(line), file=sys.stderr, flush=True)
            except OSError:  # nobody reads any more (a closed terminal): what runs must not block on its output
                return

    return show


def _summary(local: LocalStack) -> list[str]:
    rows = [
        ("PostgreSQL", f"127.0.0.1:{local.postgres.port}, log {local.postgres.log}"),
        ("Valkey", f"127.0.0.1:{local.valkey.port}, log {local.valkey.log}"),
        ("metrics", f"http://127.0.0.1:{local.environment['EVALSTORE_METRICS_PORT']}/metrics"),
        ("objects", str(local.objects)),
        ("archive", str(local.archive)),
        ("processes", ", ".join(process.name for process in local.processes)),
        *(
            [
                ("HTTP", local.environment["EVALSTORE_API_URL"]),
                ("read key", local.environment["EVALSTORE_READ_API_KEYS"]),
                ("write key", local.environment["EVALSTORE_WRITE_API_KEYS"]),
            ]
            if "EVALSTORE_API_URL" in local.environment
            else []
        ),
        ("for shells", f"set -a; . {local.folder}/environment; set +a"),
    ]
    return [
        f"evalstore runs in {local.folder}, process {os.getpid()}",
        *(f"  {name:<11} {what}" for name, what in rows),
        "Ctrl-C stops all of it; the data stay",
    ]
