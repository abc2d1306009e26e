"""Where the command `evalstore` begins: Ctrl-C ends it quietly from its first moment, also while it loads what it needs."""

import os
import sys


def main() -> None:
    """The console script. Exit status 130 after Ctrl-C, as a shell has it."""
    _open_streams()
    try:
        from evalstore.cli.app import main as run  # noqa: PLC0415  what takes long, so that Ctrl-C may come meanwhile

        run()
    except KeyboardInterrupt:
        sys.exit(130)


def _open_streams() -> None:
    """Python has none where a shell closed it (`>&-`), and the next file that is opened would take its place."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))
