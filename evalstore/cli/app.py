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

from evalstore.cli.commands import COMMANDS, command_name
from models.errors import (
    DatabaseMisconfigured,
    DatabaseOutage,
    DatabaseTimeout,
    EvalstoreError,
    InvalidSettings,
    Outage,
    RedisOutage,
)

_WRITE_ERRORS = {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}


def application(words: list[str] | None = None) -> typer.Typer:
    """Build the command. With `words`, load only the subcommand that they name. Other subcommands have only a name and help.

    Loading all subcommands takes most of a second of CPU, and containers run `evalstore health` every half minute.
    """
    wanted = command_name(words) if words is not None else None
    app = typer.Typer(
        help="Store the results of code evaluations. Settings are environment variables EVALSTORE_…. In a folder where "
        "`evalstore up` runs, commands use its servers.\n\n"
        "Exit status: 0 fine, 1 failed, 2 wrong usage, 3 nothing matched, 4 partly failed, 5 not confirmed, "
        "7 a server cannot be reached.",
        no_args_is_help=True,
        add_completion=True,
        context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_find_local_servers)
    for name, command in COMMANDS.items():
        if words is not None and name != wanted:
            app.command(name, help=command.help)(_is_not_loaded)
            continue
        module, _, attribute = command.target.partition(":")
        target = getattr(import_module(module), attribute)
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=name)
        else:
            app.command(name)(target)
    return app


def _is_not_loaded() -> None:
    raise AssertionError("the command was not loaded")


def _words() -> list[str]:
    """Return the words of the command line. During shell completion, return the words typed so far."""
    if any(name.endswith("_COMPLETE") for name in os.environ):
        typed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
        return typed.split()[1:]
    return sys.argv[1:]


def _print_release(is_requested: bool) -> None:
    if is_requested:
        sys.stdout.write(f"evalstore {metadata.version('evalstore')}\n")
        raise typer.Exit


def _find_local_servers(
    version: Annotated[  # noqa: ARG001 - `_print_release` handles it
        bool, typer.Option("--version", callback=_print_release, is_eager=True, help="Print the release.")
    ] = False,
) -> None:
    """Use the servers of `evalstore up` in this folder, unless an address is set."""
    from models.unknown_settings import warn_unknown_env  # noqa: PLC0415 - slow to import

    warn_unknown_env()
    if "EVALSTORE_DATABASE_URL" in os.environ or "EVALSTORE_REDIS_URL" in os.environ:
        return
    environment = Path(".evalstore/environment")
    if environment.is_file():
        for line in environment.read_text().splitlines():
            name, separator, value = line.partition("=")
            if separator and name.startswith("EVALSTORE_"):
                os.environ.setdefault(name, shlex.split(value)[0])


def _describe(error: Outage) -> str:
    """Name the server, its error, and the setting with its address."""
    if isinstance(error, DatabaseTimeout):
        return f"a time limit ended the work in PostgreSQL, try again: {' '.join(str(error).split())}"
    known = {DatabaseOutage: ("PostgreSQL", "EVALSTORE_DATABASE_URL"), RedisOutage: ("Redis", "EVALSTORE_REDIS_URL")}
    store = ("the object store", "EVALSTORE_OBJECT_STORE_URL or EVALSTORE_ARCHIVE_URL")
    name, variable = next((names for kind, names in known.items() if isinstance(error, kind)), store)
    hint = f"its address is in {variable}"
    if name != store[0] and variable not in os.environ:
        hint = f"{variable} is not set, and `evalstore up` does not run in this folder"
    return f"{name} cannot be used: {' '.join(str(error).split()).rstrip('.')}; {hint}"


def main() -> None:
    """Run the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for terminals without UTF-8
    try:
        try:
            application(_words())()
        finally:
            sys.stdout.flush()
    except InvalidSettings as error:
        _notice(str(error))
        sys.exit(2)
    except DatabaseMisconfigured as error:
        _notice(_describe(error))
        sys.exit(2)
    except Outage as error:
        _notice(_describe(error))
        sys.exit(7)
    except EvalstoreError as error:
        _notice(f"{type(error).__name__}: {error}")
        sys.exit(1)
    except OSError as error:
        _report_unwritten(error)
        sys.exit(1)


def _notice(message: str) -> None:
    from evalstore.cli.output import notice  # noqa: PLC0415 - slow to import

    notice(message, "red")


def _report_unwritten(error: OSError) -> None:
    """Report a failed write, and redirect stdout to /dev/null: its buffer would fail again at exit."""
    if error.filename is None and error.errno not in _WRITE_ERRORS:
        raise error
    if error.errno != errno.EPIPE:
        _notice(f"{error.filename or 'standard output'}: {error.strerror}")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main()
