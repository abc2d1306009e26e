"""The command `evalstore`."""

import errno
import io
import os
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Final

import typer

from evalstore.cli.output import notice
from models.errors import DatabaseMisconfigured, DatabaseOutage, EvalstoreError, InvalidSettings, Outage, RedisOutage
from models.settings import warn_unknown_env
from tasks.tracing import release

_OF_WRITING = {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}
_COMMANDS: Final = {
    "up": "up",
    "demo": "demo",
    "send": "send_get",
    "get": "send_get",
    "audit": "audit",
    "status": "status",
    "health": "health",
    "migrate": "migrate",
}
_GROUPS: Final = ("archive", "cron", "dlq", "spool", "keys")


def application(words: Sequence[str] = ()) -> typer.Typer:
    """The command, with no more than `words` ask for: to load all of it takes most of a second of a processor, and a container
    asks for its health every half a minute. With all of it where they ask for nothing that it knows.
    """
    asked = next((word for word in words if not word.startswith("-")), "")
    made = typer.Typer(
        help="Keeps what code evaluations produce. Settings are environment variables, EVALSTORE_…; in a folder where "
        "`evalstore up` runs, its servers are found by themselves.\n\n"
        "Exit status: 0 fine, 1 failed, 2 wrong usage, 3 nothing matched, 4 partly failed, 5 not confirmed, "
        "7 a server cannot be reached.",
        no_args_is_help=True,
        add_completion=True,
        context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    made.callback()(_find_local_servers)
    is_known = asked in _COMMANDS or asked in _GROUPS
    for name, module in _COMMANDS.items():
        if asked == name or not is_known:
            made.command()(getattr(import_module(f"evalstore.cli.{module}"), name))
    for name in _GROUPS:
        if asked == name or not is_known:
            made.add_typer(import_module(f"evalstore.cli.{name}").app, name=name)
    return made


def _print_release(is_asked: bool) -> None:
    if is_asked:
        sys.stdout.write(f"evalstore {release()}\n")
        raise typer.Exit


def _find_local_servers(
    version: Annotated[  # noqa: ARG001 - Typer asks `_tell_release`
        bool, typer.Option("--version", callback=_print_release, is_eager=True, help="Print the release.")
    ] = False,
) -> None:
    """Where nothing says which servers to use and `evalstore up` left its addresses in this folder, use those."""
    warn_unknown_env()
    if "EVALSTORE_DATABASE_URL" in os.environ or "EVALSTORE_REDIS_URL" in os.environ:
        return
    environment = Path(".evalstore/environment")
    if environment.is_file():
        for line in environment.read_text().splitlines():
            name, separator, value = line.partition("=")
            if separator and name.startswith("EVALSTORE_"):
                os.environ.setdefault(name, shlex.split(value)[0])


def _in_a_sentence(error: Outage) -> str:
    """What is away, what it says, and where to look."""
    known = {DatabaseOutage: ("PostgreSQL", "EVALSTORE_DATABASE_URL"), RedisOutage: ("Redis", "EVALSTORE_REDIS_URL")}
    store = ("the object store", "EVALSTORE_OBJECT_STORE_URL or EVALSTORE_ARCHIVE_URL")
    name, variable = next((told for kind, told in known.items() if isinstance(error, kind)), store)
    where = f"the address is that of {variable}"
    if name != store[0] and variable not in os.environ:
        where = f"{variable} is not set, and `evalstore up` does not run in this folder"
    return f"{name} cannot be used: {' '.join(str(error).split()).rstrip('.')}; {where}"


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for terminals that are not UTF-8
    is_completion = any(name.endswith("_COMPLETE") for name in os.environ)  # a shell asks what there is
    try:
        try:
            application(() if is_completion else sys.argv[1:])()
        finally:
            sys.stdout.flush()
    except InvalidSettings as error:
        notice(str(error), "red")
        sys.exit(2)
    except DatabaseMisconfigured as error:
        notice(_in_a_sentence(error), "red")
        sys.exit(2)
    except Outage as error:
        notice(_in_a_sentence(error), "red")
        sys.exit(7)
    except EvalstoreError as error:
        notice(f"{type(error).__name__}: {error}", "red")
        sys.exit(1)
    except OSError as error:
        _report_unwritten(error)
        sys.exit(1)


def _report_unwritten(error: OSError) -> None:
    """Of a file or of standard output, which is then given up: what is left in it would fail once more at the end."""
    if error.filename is None and error.errno not in _OF_WRITING:
        raise error
    if error.errno != errno.EPIPE:
        notice(f"{error.filename or 'standard output'}: {error.strerror}", "red")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main()
