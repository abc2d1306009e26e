"""Where the command `evalstore` begins: Ctrl-C ends it quietly from its first moment, also while it loads what it needs."""

import sys


def main() -> None:
    """The console script. Exit status 130 after Ctrl-C, as a shell has it."""
    try:
        from ops.cli import main as run  # noqa: PLC0415  what takes long, so that Ctrl-C may come meanwhile

        run()
    except KeyboardInterrupt:
        sys.exit(130)
