"""`evalstore bridge`: events of a platform that publishes them on Redis pub/sub."""

import typer


def bridge() -> None:
    """Listen to an old platform's pub/sub, and send what it publishes as events, until SIGTERM or Ctrl-C.

    EVALSTORE_BRIDGE_FILE names its Redis, channels and fields. Two copies may run: each event is stored once. Pub/sub keeps
    nothing: what is published while no copy listens is lost. Exit status 4: something was heard, and could not be sent.
    """
    from evalstore.bridge import main  # noqa: PLC0415 - other commands need none of what it loads

    if status := main.main():
        raise typer.Exit(status)
