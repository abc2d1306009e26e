"""The names of all keys, streams and channels in Redis.

A sender writes to `<namespace>:<queue>` and `<namespace>:<queue>.msgs`, as Dramatiq's Redis broker does. So any Dramatiq client
can send to our workers. All other keys lie outside `<namespace>:<queue>`, where stock clients never clean up. They contain the
namespace: one like `{dramatiq}` keeps them in one slot of a cluster. With the default namespace some names lack it, because
they are older than the setting.
"""

from functools import cache
from typing import Final, NamedTuple

from models.settings import DEFAULT_REDIS_NAMESPACE

QUEUE: Final = "evaluations"


class Keys(NamedTuple):
    """The keys that hold the messages of one queue."""

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
    """The names of a namespace outside its queues."""

    namespace: str

    @property
    def prefix(self) -> str:
        """The prefix that puts other names into the namespace. It is empty for the default namespace."""
        return "" if self.namespace == DEFAULT_REDIS_NAMESPACE else f"{self.namespace}:"

    @property
    def stream(self) -> str:
        """The stream of confirmations."""
        return f"{self.prefix}evalstore:confirmations"

    def seen_version(self, group: str, eval_id: str) -> str:
        """The string with the last version of an evaluation that a consumer group handled."""
        return f"{self.stream}:{group}:{eval_id}"

    def cached_record(self, eval_id: str) -> str:
        """The string with a record in the HTTP service's cache."""
        return f"{self.prefix}evalstore:record:{eval_id}"

    def given_time(self, eval_id: str, event_id: str) -> str:
        """The string with the time at which the HTTP service first received an event."""
        return f"{self.prefix}evalstore:given:{eval_id}:{event_id}"

    @property
    def rates(self) -> str:
        """The prefix of the keys that count the requests of the HTTP service's keys."""
        return f"{self.prefix}evalstore:rates"

    @property
    def last_successes(self) -> str:
        """The hash with the time of each job's last success, in seconds since 1970."""
        return f"evalstore:{self.namespace}:jobs:last_successes"

    @property
    def last_runs(self) -> str:
        """The hash with each job's last run, as JSON."""
        return f"evalstore:{self.namespace}:jobs:last_runs"

    def tick(self, job: str, minute: str) -> str:
        """The string that the scheduler sets once for each job and minute."""
        return f"evalstore:{self.namespace}:tick:{job}:{minute}"


def fence(key: str) -> str:
    """Return the key that a durable send writes last and waits for. It is in the cluster slot of `key`."""
    return f"evalstore:{key}:fence"
