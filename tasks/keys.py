"""The names of everything in Redis: keys, the stream and the channels.

A sender touches `<namespace>:<queue>` and `<namespace>:<queue>.msgs`, the layout of Dramatiq's own Redis broker, so that any
Dramatiq client can send to our workers. All other keys lie outside `<namespace>:<queue>`, where stock clients never clean up.
They hold the namespace, so that one like `{dramatiq}` keeps them in one slot of a cluster. Only with the default namespace some
names are without one, as they were before there was a setting.
"""

from functools import cache
from typing import NamedTuple

from models.settings import DEFAULT_REDIS_NAMESPACE


class Keys(NamedTuple):
    """Where the messages of a queue are."""

    queue: str
    woken: str
    bodies: str
    resent: str
    stock_delayed: str
    stock_delayed_bodies: str
    delayed: str
    suspects: str
    deaths: str
    processes: str
    workers: str
    dead: str
    dead_bodies: str
    causes: str
    unacked_prefix: str

    @classmethod
    @cache
    def of(cls, namespace: str, queue: str) -> "Keys":
        stock, ours = f"{namespace}:{queue}", f"evalstore:{namespace}:{queue}"
        return cls(
            queue=stock,
            woken=f"{ours}:woken",
            bodies=f"{stock}.msgs",
            resent=f"{ours}:resent",
            stock_delayed=f"{stock}.DQ",
            stock_delayed_bodies=f"{stock}.DQ.msgs",
            delayed=f"{ours}:delayed",
            suspects=f"{ours}:suspects",
            deaths=f"{ours}:deaths",
            processes=f"{ours}:processes",
            workers=f"{ours}:workers",
            dead=f"{ours}:dead",
            dead_bodies=f"{ours}:dead:msgs",
            causes=f"{ours}:dead:causes",
            unacked_prefix=f"{ours}:unacked:",
        )


class Names(NamedTuple):
    """Every other name of a namespace."""

    namespace: str

    @property
    def prefix(self) -> str:
        """The beginning of the names that do not hold the namespace themselves, and of the channels of confirmations."""
        return "" if self.namespace == DEFAULT_REDIS_NAMESPACE else f"{self.namespace}:"

    @property
    def stream(self) -> str:
        """The stream of confirmations."""
        return f"{self.prefix}evalstore:confirmations"

    def seen_version(self, group: str, eval_id: str) -> str:
        """The string that holds the last version that a consumer group handled."""
        return f"{self.stream}:{group}:{eval_id}"

    def cached_record(self, eval_id: str) -> str:
        """The string that holds a record of the HTTP service's cache."""
        return f"{self.prefix}evalstore:record:{eval_id}"

    def given_time(self, eval_id: str, event_id: str) -> str:
        """The string that holds the time at which the HTTP service first got an event."""
        return f"{self.prefix}evalstore:given:{eval_id}:{event_id}"

    @property
    def last_successes(self) -> str:
        """The hash that tells when each job last ended well, in seconds since 1970."""
        return f"evalstore:{self.namespace}:jobs:last_successes"

    @property
    def last_runs(self) -> str:
        """The hash that tells of each job's last run, as JSON."""
        return f"evalstore:{self.namespace}:jobs:last_runs"

    def tick(self, job: str, minute: str) -> str:
        """The string that is set once for each job and minute."""
        return f"evalstore:{self.namespace}:tick:{job}:{minute}"


def fence(key: str) -> str:
    """Return the key of the write that a durable send waits for, in the slot of a key that it wrote."""
    return f"evalstore:{key}:fence"
