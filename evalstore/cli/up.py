"""`evalstore up`: run everything on this machine, in the foreground, until Ctrl-C."""

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
from models.addresses import url_of
from models.errors import EvalstoreError
from models.settings import Settings

COLOURS = (36, 33, 32, 35, 34)


def up(
    folder: Annotated[Path, typer.Option("--dir", metavar="PATH", help="Folder for all data; created if missing.")] = Path(
        ".evalstore"
    ),
    processes: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each worker process.")] = 8,
) -> None:
    """Run everything on this machine: PostgreSQL, a Redis-compatible server, worker, scheduler and
    HTTP service, until Ctrl-C.

    With EVALSTORE_SINKS_FILE the process that passes events on runs, too.

    The servers come with the package and listen on 127.0.0.1 only. The HTTP service and metrics do too, unless
    EVALSTORE_API_HOST or EVALSTORE_METRICS_HOST is set. Data, ports and passwords stay in the folder.
    PATH/environment holds the addresses for other shells.
    """
    raise typer.Exit(serve(folder, commands(processes, threads), workers=processes))


def serve(folder: Path, to_run: Mapping[str, Sequence[str]], *, workers: int = 0) -> int:
    """Run until SIGINT, SIGTERM or SIGHUP, and return the exit status. A second signal kills the part that still stops."""
    show = prefixed(["up", *to_run])
    local = LocalStack(folder, to_run, workers=workers, show=show)
    stopping = False

    def interrupt(_signum: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            local.kill_now()
        else:
            stopping = True
            raise KeyboardInterrupt

    stop_signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores SIGHUP
        stop_signals.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in stop_signals}
    try:
        local.start()
        for line in _summary(local):
            show("up", line)
        while True:
            signal.pause()
    except KeyboardInterrupt:
        show("up", "stopping; press Ctrl-C again to kill")
        return 0
    except (EvalstoreError, OSError) as error:
        text = isinstance(error, OSError) and error.filename is not None and f"{error.filename}: {error.strerror}"
        print(f"evalstore up: {text or error}", file=sys.stderr)
        return 1
    finally:
        stopping = True
        local.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def prefixed(names: Sequence[str]) -> Callable[[str, str], None]:
    """Return a function that writes a line to stderr, prefixed with the name of its process.

    Control characters are escaped, because a log line may contain output of an evaluated program.
    """
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    width = max(map(len, names))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    lock = threading.Lock()

    def show(name: str, line: str) -> None:
        prefix = f"{name:{width}} | "
        if coloured:
            prefix = f"\x1b[{colours[name]}m{prefix}\x1b[0m"
        with lock:
            try:
                print(prefix + escaped(line), file=sys.stderr, flush=True)
            except OSError:  # the terminal is closed; the processes must continue
                return

    return show


def _console(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the console's address with a link that signs in once as an admin; nothing if the console is off."""
    from evalstore.storage import api_keys, console_sessions, database  # noqa: PLC0415 - slow to import

    loaded = Settings.from_environment({**os.environ, **environment})
    if loaded.console == "off":
        return []
    engine = database.connect(loaded, pool_size=1)
    try:
        with database.errors(), engine.connect() as conn:
            key_id = api_keys.settings_key_id(api_keys.digest(environment["EVALSTORE_ADMIN_API_KEYS"]))
            token = console_sessions.create_link(conn, key_id)
    finally:
        engine.dispose()
    return [("console", f"{environment['EVALSTORE_API_URL']}{loaded.api_root_path or ''}/console/login?link={token}")]


def _summary(local: LocalStack) -> list[str]:
    rows = [
        ("PostgreSQL", f"127.0.0.1:{local.postgres.port}, log {local.postgres.log}"),
        ("Valkey", f"127.0.0.1:{local.valkey.port}, log {local.valkey.log}"),
        (
            "metrics",
            f"{url_of(local.environment['EVALSTORE_METRICS_HOST'], local.environment['EVALSTORE_METRICS_PORT'])}/metrics",
        ),
        ("objects", str(local.objects)),
        ("archive", str(local.archive)),
        ("processes", ", ".join(process.name for process in local.processes)),
        *(
            [
                ("HTTP", local.environment["EVALSTORE_API_URL"]),
                ("read key", local.environment["EVALSTORE_READ_API_KEYS"]),
                ("write key", local.environment["EVALSTORE_WRITE_API_KEYS"]),
                ("admin key", local.environment["EVALSTORE_ADMIN_API_KEYS"]),
                *_console(local.environment),
            ]
            if "EVALSTORE_API_URL" in local.environment
            else []
        ),
        ("for shells", f"set -a; . {local.folder}/environment; set +a"),
    ]
    return [
        f"evalstore runs in {local.folder}, process {os.getpid()}",
        *(f"  {name:<11} {value}" for name, value in rows),
        "Ctrl-C stops everything; the data stay",
    ]
