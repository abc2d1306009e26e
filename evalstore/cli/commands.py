"""The table of commands. The module of a command is loaded only when the command runs."""

from typing import Final, NamedTuple


class Command(NamedTuple):
    """`target` is a function or Typer application, as MODULE:NAME. `help` is the first paragraph of its help."""

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
        "Evaluate real programs on local servers, and check that every event is stored.",
        extra="local",
    ),
    "send": Command("evalstore.cli.send_get:send", "Send a file of events to the queue."),
    "get": Command(
        "evalstore.cli.send_get:get", "Show the record of an evaluation, or write its output, code or error to standard output."
    ),
    "ls": Command("evalstore.cli.ls:ls", "List evaluations without their content, the newest first. Exits 3 if none matches."),
    "stats": Command(
        "evalstore.cli.stats:stats",
        "Show counts, pass rates, scores, durations and memory of finished evaluations, by time.",
    ),
    "watch": Command("evalstore.cli.watch:watch", "Show each change of an evaluation until it is finished."),
    "audit": Command(
        "evalstore.cli.audit:audit", "Show for each event of a file whether it is applied, in flight, dead, erased or missing."
    ),
    "status": Command(
        "evalstore.cli.status:status",
        "Show the state of queues, workers, outages, dead letters, archive and periodic jobs.",
    ),
    "health": Command(
        "evalstore.cli.health:health",
        "Check processes and servers. --live checks only the processes on this machine or in this container.",
    ),
    "migrate": Command(
        "evalstore.cli.migrate:migrate",
        "Migrate the database to this release. Safe while workers run, and from several processes at once.",
    ),
    "replay": Command(
        "evalstore.cli.replay:replay",
        "Compute records from their events, and compare them with those that are stored. Storing goes on meanwhile.",
    ),
    "erase": Command(
        "evalstore.cli.erase:erase",
        "Erase evaluations: records, events, content, dead letters and objects. Late events of theirs are not stored again.",
    ),
    "bridge": Command(
        "evalstore.cli.bridge:bridge",
        "Listen to an old platform's pub/sub, and send what it publishes as events, until SIGTERM or Ctrl-C.",
    ),
    "runs": Command("evalstore.cli.runs:app", "Show runs: sets of evaluations that belong together."),
    "archive": Command("evalstore.cli.archive:app", "Content in the object store and the archive."),
    "cron": Command("evalstore.cli.cron:app", "The periodic jobs."),
    "dlq": Command(
        "evalstore.cli.dlq:app",
        "Dead letters: messages that need an operator before they can be stored. They stay until an operator removes them.",
    ),
    "spool": Command(
        "evalstore.cli.spool:app",
        "Events that senders on this machine keep during an outage of Redis, in the folder EVALSTORE_SPOOL_DIR.",
    ),
    "sinks": Command("evalstore.cli.sinks:app", "Run, list, pause, resume and rewind sinks: systems that get all events."),
    "lake": Command("evalstore.cli.lake:app", "The lake: what it holds, queries, and maintenance.", extra="lake"),
    "webhooks": Command("evalstore.cli.webhooks:app", "Subscribe HTTP receivers to confirmations, and see what they got."),
    "anomalies": Command("evalstore.cli.anomalies:app", "See what the anomaly detector found, and acknowledge it."),
    "keys": Command("evalstore.cli.keys:app", "Create, list and revoke keys of the HTTP service."),
}


def command_name(words: list[str]) -> str | None:
    """Return the command that a command line names. No option of `evalstore` itself takes a value."""
    name = next((word for word in words if not word.startswith("-")), None)
    return name if name in COMMANDS else None
