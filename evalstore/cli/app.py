"""The command `evalstore`."""

import errno
import io
import os
import shlex
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Annotated

import typer

from evalstore.cli.commands import COMMANDS, asked_for
from models.errors import (
    DatabaseMisconfigured,
    DatabaseOutage,
    DatabaseTimeout,
    EvalstoreError,
    InvalidSettings,
    Outage,
    RedisOutage,
)

_OF_WRITING = {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}


def application(words: list[str] | None = None) -> typer.Typer:
    """The command, with the one that `words` ask for; the others are there by name and help alone. Without `words`, with all.

    To load all of it takes most of a second of a processor, and a container asks for its health every half a minute.
    """
    asked = asked_for(words) if words is not None else None
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
    for name, command in COMMANDS.items():
        if words is not None and name != asked:
            made.command(name, help=command.help)(_is_not_loaded)
            continue
        module, _, attribute = command.target.partition(":")
        found = getattr(import_module(module), attribute)
        if isinstance(found, typer.Typer):
            made.add_typer(found, name=name)
        else:
            made.command(name)(found)
    return made


def _is_not_loaded() -> None:
    raise AssertionError("the words name a command that is not loaded")


def _words() -> list[str]:
    """Of the command line; where a shell asks what may follow, those typed so far."""
    if any(name.endswith("_COMPLETE") for name in os.environ):
        typed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
        return typed.split()[1:]
    return sys.argv[1:]


def _print_release(is_asked: bool) -> None:
    if is_asked:
        sys.stdout.write(f"evalstore {metadata.version('evalstore')}\n")
        raise typer.Exit


def _find_local_servers(
    version: Annotated[  # noqa: ARG001 - Typer asks `_tell_release`
        bool, typer.Option("--version", callback=_print_release, is_eager=True, help="Print the release.")
    ] = False,
) -> None:
    """Where nothing says which servers to use and `evalstore up` left its addresses in this folder, use those."""
    from models.settings import warn_unknown_env  # noqa: PLC0415 - `--help` and `--version` do without

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
    if isinstance(error, DatabaseTimeout):
        return f"a time limit ended the work in PostgreSQL, try again: {' '.join(str(error).split())}"
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
    try:
        try:
            application(_words())()
        finally:
            sys.stdout.flush()
    except InvalidSettings as error:
        _notice(str(error))
        sys.exit(2)
    except DatabaseMisconfigured as error:
        _notice(_in_a_sentence(error))
        sys.exit(2)
    except Outage as error:
        _notice(_in_a_sentence(error))
        sys.exit(7)
    except EvalstoreError as error:
        _notice(f"{type(error).__name__}: {error}")
        sys.exit(1)
    except OSError as error:
        _report_unwritten(error)
        sys.exit(1)


def _notice(message: str) -> None:
    from evalstore.cli.output import notice  # noqa: PLC0415 - `--help` and `--version` do without

    notice(message, "red")


def _report_unwritten(error: OSError) -> None:
    """Of a file or of standard output, which is then given up: what is left in it would fail once more at the end."""
    if error.filename is None and error.errno not in _OF_WRITING:
        raise error
    if error.errno != errno.EPIPE:
        _notice(f"{error.filename or 'standard output'}: {error.strerror}")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main()
