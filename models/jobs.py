"""The names, schedules and help texts of the periodic jobs. Each job does all work that is due."""

from typing import Final, NamedTuple

QUEUE: Final = "jobs"


class Job(NamedTuple):
    """A periodic job. Its cron line restricts only the minutes, so it does not depend on a time zone."""

    name: str
    schedule: str
    does: str


JOBS: Final = (
    Job("relay_confirmations", "* * * * *", "publishes confirmations that a worker did not publish, and deletes old ones"),
    Job("mark_lost_evaluations", "* * * * *", "marks evaluations as lost whose result is overdue"),
    Job("archive_large_outputs", "* * * * *", "moves large and old content to the archive"),
    Job("sweep_objects", "*/30 * * * *", "removes objects without references, checking each object once a day"),
    Job("maintain_lake", "*/30 * * * *", "merges files of the lake, expires its snapshots and removes files that none names"),
    Job("move_dead_letters", "* * * * *", "moves dead letters from Redis to the database"),
    Job("continue_replays", "* * * * *", "continues replays in the background whose job was lost"),
    Job("sample_overview", "* * * * *", "keeps what the console's overview shows, for its curves of the last day"),
)
