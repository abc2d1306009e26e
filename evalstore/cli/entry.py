"""The entry point of the command `evalstore`. Ctrl-C ends it without a traceback, also during imports."""

import os
import sys


def main() -> None:
    """Run the console script. The exit status after Ctrl-C is 130, as in a shell."""
    _open_streams()
    try:
        # These imports are slow, and Ctrl-C may interrupt them.
        from evalstore.cli.commands import COMMANDS, command_name  # noqa: PLC0415
        from models.extras import require  # noqa: PLC0415

        command = command_name(sys.argv[1:])
        require(COMMANDS[command].extra if command else "worker")
        from evalstore.cli.app import main as run  # noqa: PLC0415

        run()
    except KeyboardInterrupt:
        sys.exit(130)


def _open_streams() -> None:
    """Open streams that a shell closed (`>&-`): the next opened file would take their descriptor."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))
