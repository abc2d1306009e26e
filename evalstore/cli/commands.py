"""The table of commands. Each names the module that holds it, which is loaded only when the command is asked for."""

from typing import Final, NamedTuple


class Command(NamedTuple):
    """`target`: a function or a Typer application, as MODULE:NAME. `help`: the first paragraph of its help."""

    target: str
    help: str
    extra: str = "worker"


COMMANDS: Final = {
    "up": Command(
        "evalstore.cli.up:up",
        "Run everything on this machine: PostgreSQL, a Redis-compatible server, worker, scheduler and "
        "HTTP service, until Ctrl-C.",
        extra="local",
    ),
    "demo": Command(
        "evalstore.cli.demo:demo",
        "Evaluate real programs and store every event of theirs, on servers of its own.",
        extra="local",
    ),
    "send": Command("evalstore.cli.send_get:send", "Send a file of events to the queue."),
    "get": Command(
        "evalstore.cli.send_get:get", "Show the record of an evaluation, or write one of its contents to standard output."
    ),
    "audit": Command(
        "evalstore.cli.audit:audit", "Tell for each event of a file whether it is applied, in flight, dead or missing."
    ),
    "status": Command(
        "evalstore.cli.status:status",
        "Show how things stand: queues, workers, outages, dead letters, the archive, the schedule.",
    ),
    "health": Command(
        "evalstore.cli.health:health",
        "Say whether things work. --live asks no server, and looks at what runs on this machine (in this container).",
    ),
    "migrate": Command(
        "evalstore.cli.migrate:migrate",
        "Bring the database's tables to this release. Safe while workers run, and from several places at once.",
    ),
    "archive": Command("evalstore.cli.archive:app", "Content in the object store and the archive."),
    "cron": Command("evalstore.cli.cron:app", "The periodic jobs."),
    "dlq": Command(
        "evalstore.cli.dlq:app",
        "Dead letters: messages that will not be stored without an operator. They stay until one removes them.",
    ),
    "spool": Command(
        "evalstore.cli.spool:app",
        "Events that senders on this machine keep while Redis is away: the folder EVALSTORE_SPOOL_DIR.",
    ),
    "keys": Command("evalstore.cli.keys:app", "Keys of the HTTP service: create, list and revoke them."),
}


def asked_for(words: list[str]) -> str | None:
    """The command that the words of a command line name; no option of `evalstore` itself takes a value."""
    asked = next((word for word in words if not word.startswith("-")), None)
    return asked if asked in COMMANDS else None
