"""The periodic jobs: what they are called, when they run, and how their last run is told. Each does everything that is due."""

from typing import Final, NamedTuple

QUEUE: Final = "jobs"


class Job(NamedTuple):
    """A periodic job. `schedule` is a cron line of which only the minutes are restricted, so that no time zone matters."""

    name: str
    schedule: str
    does: str


JOBS: Final = (
    Job("relay_confirmations", "* * * * *", "publishes confirmations that were left behind, forgets old ones"),
    Job("mark_lost_evaluations", "* * * * *", "gives up evaluations whose result is overdue"),
    Job("archive_large_outputs", "* * * * *", "moves large content, and content that is old, to the archive"),
    Job("sweep_objects", "*/30 * * * *", "removes objects that nothing refers to: each is looked at once a day"),
    Job("move_dead_letters", "* * * * *", "moves dead letters that were left in Redis to the database"),
)


def last_successes_key(namespace: str) -> str:
    """The hash in Redis that tells when each job last ended well, in seconds since 1970."""
    return f"evalstore:{namespace}:jobs:last_successes"


def last_runs_key(namespace: str) -> str:
    """The hash in Redis that tells of each job's last run, as JSON."""
    return f"evalstore:{namespace}:jobs:last_runs"
