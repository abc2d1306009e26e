"""The metrics of `models.metrics` with the source `servers`, read from Redis and PostgreSQL.

A thread for each probe asks its server, so a scrape waits for a short time only. Results are cached, those of slow probes
longer. A server that does not answer in time counts as unavailable until it does.
"""

import threading
import time
from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import product
from typing import Any, Final, Generic, NamedTuple, TypeVar

import pendulum
from periodiq import cron
from sqlalchemy import Connection, Engine

from evalstore.storage import database, durability, migrations
from evalstore.storage import table_stats as stored
from evalstore.storage.archive import Archive
from evalstore.telemetry import queues
from evalstore.telemetry.counters import Series
from models.errors import (
    DatabaseMisconfigured,
    DatabaseOutage,
    EvalstoreError,
    InvalidSettings,
    Outage,
    RedisOutage,
    SchemaMismatch,
)
from models.jobs import JOBS
from models.metrics import BY_NAME, REASONS
from models.settings import Settings
from tasks.broker import SendingBroker

T = TypeVar("T")
Numbers = dict[Series, float]

_KEEP_S: Final = 2.0
# The largest share of time in which a slow probe runs.
_SHARE: Final = 1 / 200
_LONGEST_S: Final = 60.0
_MOST_REASONS: Final = 30
_CONTENTS: Final = ("evalstore_evaluations_open", "evalstore_contents", "evalstore_content_bytes")


class CachedProbe(Generic[T]):
    """Caches the result of `read`. One thread calls `read` for all callers. `stale` returns the last result during a call."""

    def __init__(self, read: Callable[[], T], patience_s: float, *, stale: bool = False) -> None:
        self._read, self._patience_s, self._stale = read, patience_s, stale
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._value: T | None = None
        self.error: EvalstoreError | None = None
        self._fresh_until = 0.0
        self._took_s = 0.0
        self._give_up = 0.0

    def get(self) -> T | None:
        """Return the result, or None if it does not come in time."""
        with self._lock:
            now = time.monotonic()
            if self._thread is None and now < self._fresh_until:
                return self._value
            if self._thread is None:
                self._give_up = now + self._patience_s
                self._thread = threading.Thread(target=self._run, name="evalstore-reading", daemon=True)
                self._thread.start()
            thread = self._thread
        thread.join(timeout=max(0.0, self._give_up - time.monotonic()))
        return self._value if self._stale or not thread.is_alive() else None

    def _run(self) -> None:
        started, value, failed = time.monotonic(), None, None
        try:
            value = self._read()
        except EvalstoreError as error:
            failed = error
        finally:
            with self._lock:
                now = time.monotonic()
                self._value, self._thread, self.error = value, None, failed
                # A single slow run on a frozen or locked server does not extend the life of the result.
                usual_s, self._took_s = min(self._took_s, now - started), now - started
                self._fresh_until = now + (max(_KEEP_S, usual_s / _SHARE) if self._stale and value else _KEEP_S)


class BackendStatus(NamedTuple):
    """The state of both servers. `errors` has the keys `redis`, `postgresql` and `schema`.

    Their texts come from the servers, and name hosts and users: do not show them to unauthenticated clients.
    """

    redis: queues.QueueStats | None
    database: tuple[SchemaMismatch | None, stored.Numbers] | None
    errors: dict[str, EvalstoreError]


class BackendStats:
    """The probes of one process that serves metrics and health."""

    def __init__(self, settings: Settings, patience_s: float = 2.0) -> None:
        self._settings = settings
        self._watch = database.Watch()
        self._broker = SendingBroker(url=settings.redis_url.get_secret_value(), namespace=settings.redis_namespace, timeout_s=3)
        self._patience_s = patience_s
        self._had_schema = False
        self.redis = CachedProbe(lambda: queues.snapshot(self._broker), patience_s)
        self.database = CachedProbe(lambda: self._bounded(self._server), patience_s)
        self.letters = self.probe(stored.letters)
        self.contents = self.probe(self._all_contents)
        self.doubts = self.probe(durability.doubts)

    @cached_property
    def _engine(self) -> Engine:
        return database.connect(self._settings, pool_size=3, pre_ping=False, statement_timeout_s=_LONGEST_S)

    @cached_property
    def _archive(self) -> Archive | None:
        try:
            return Archive.of(self._settings)
        except InvalidSettings:
            return None

    def probe(self, read: Callable[[Connection], T]) -> CachedProbe[T]:
        """Return a probe of the database that may be slow."""
        return CachedProbe(lambda: self._bounded(read), self._patience_s, stale=True)

    def _bounded(self, read: Callable[[Connection], T]) -> T:
        try:
            with database.errors(), self._engine.connect() as conn, self._watch.bounded(conn, _LONGEST_S):
                return read(conn)
        except Outage:
            self._engine.dispose()  # the pool's other connections broke with it
            raise

    def _server(self, conn: Connection) -> tuple[SchemaMismatch | None, stored.Numbers]:
        """Return the mismatch of the schema, if any, and the numbers of the tables."""
        try:
            migrations.check(conn, or_newer=self._had_schema)
        except SchemaMismatch as error:
            return error, {}
        self._had_schema = True
        found = stored.server(conn) | stored.sinks(conn, self._settings.outbox_max_age_s) | stored.webhook_numbers(conn)
        found |= stored.anomaly_numbers(conn)
        return None, found

    def _all_contents(self, conn: Connection) -> stored.Numbers:
        return stored.contents(conn, self._archive)

    def close(self) -> None:
        """Close the connections."""
        self._broker.client.close()
        if "_engine" in self.__dict__:
            self._engine.dispose()
        if "_archive" in self.__dict__ and self._archive:
            self._archive.close()

    def status(self) -> BackendStatus:
        """Return the state of both servers. Raises InvalidSettings for an address that libpq refuses."""
        seen, answer = self.redis.get(), self.database.get()
        found: dict[str, EvalstoreError] = {}
        if seen is None:
            found["redis"] = self.redis.error or RedisOutage("no answer in time")
        if answer is None:
            found["postgresql"] = self.database.error or DatabaseOutage("no answer in time")
            if isinstance(found["postgresql"], InvalidSettings):
                raise found["postgresql"]
        elif answer[0] is not None:
            found["schema"] = answer[0]
        return BackendStatus(seen, answer, found)

    def ready(self) -> dict[str, str]:
        """Return the problems by server, without hosts or users; empty if there are none."""
        found = self.status().errors
        return {name: str(error) if name == "schema" else _for_anyone(error) for name, error in found.items()}

    def numbers(self) -> Numbers:
        """Return the numbers of all probes that answer."""
        seen, answer = self.redis.get(), self.database.get()
        found: Numbers = {
            ("evalstore_server_up", ("redis",)): seen is not None,
            ("evalstore_server_up", ("postgresql",)): answer is not None,
        }
        letters = None
        if answer is not None:
            found["evalstore_schema_ready", ()] = is_ready = answer[0] is None
            found |= _keyed(answer[1])
            if is_ready:
                letters = self.letters.get()
                contents = self.contents.get()
                found |= {**_zeros(*_CONTENTS), **_keyed(contents)} if contents is not None else {}
        if letters is not None:
            found |= _letter_numbers(letters)
        if seen is not None:
            found |= _queue_numbers(seen, letters) | _job_numbers(seen)
            found["evalstore_redis_memory_bytes", ()] = seen.memory_bytes
            found["evalstore_redis_memory_limit_bytes", ()] = seen.memory_limit_bytes
        return found


def _for_anyone(error: EvalstoreError) -> str:
    return "cannot be used: mistake in settings" if isinstance(error, DatabaseMisconfigured) else "cannot be used"


def _zeros(*names: str) -> Numbers:
    return {(name, labels): 0.0 for name in names for labels in product(*BY_NAME[name].labels.values())}


def _keyed(numbers: stored.Numbers) -> Numbers:
    return {(name, labels): value for (name, *rest), value in numbers.items() for labels in [tuple(rest)]}


def _letter_numbers(letters: Iterable[tuple[str, str, str, int, float]]) -> Numbers:
    """Return the numbers by error class. Above 30 classes, the rarest are merged into `other`."""
    counts: dict[str, int] = {}
    for _, error_class, _, count, _ in letters:
        counts[error_class] = counts.get(error_class, 0) + count
    shown = {*REASONS, *sorted(counts, key=lambda name: -counts[name])[:_MOST_REASONS]}
    found = _zeros("evalstore_dead_letters", "evalstore_dead_letters_oldest_age_seconds")
    for _, error_class, state, count, age_s in letters:
        reason = error_class if error_class in shown else "other"
        key = "evalstore_dead_letters", (reason, state)
        found[key] = found.get(key, 0) + count
        if state == "dead":
            oldest = "evalstore_dead_letters_oldest_age_seconds", (reason,)
            found[oldest] = max(found.get(oldest, 0.0), age_s)
    return found


def _queue_numbers(seen: queues.QueueStats, letters: Iterable[tuple[str, str, str, int, float]] | None) -> Numbers:
    found: Numbers = {}
    for queue in seen.queues:
        for state, count in queue.messages.items():
            found["evalstore_queue_messages", (queue.name, state)] = count
        if letters is None:
            del found["evalstore_queue_messages", (queue.name, "dead")]
        else:
            kept = sum(count for name, _, state, count, _ in letters if name == queue.name and state == "dead")
            found["evalstore_queue_messages", (queue.name, "dead")] += kept
        found["evalstore_queue_oldest_age_seconds", (queue.name,)] = queue.oldest_age_s
        found["evalstore_consumers", (queue.name,)] = queue.consumers
    return found


def _job_numbers(seen: queues.QueueStats) -> Numbers:
    found: Numbers = {}
    for job in JOBS:
        last: dict[str, Any] = seen.jobs.get(job.name, {})
        next_run = cron(job.schedule).next_valid_date(pendulum.now("UTC"))
        found["evalstore_job_last_success_timestamp_seconds", (job.name,)] = seen.successes.get(job.name, 0.0)
        found["evalstore_job_next_run_timestamp_seconds", (job.name,)] = next_run.timestamp()
        found["evalstore_job_last_duration_seconds", (job.name,)] = last.get("seconds") or 0.0
        found["evalstore_job_failing", (job.name,)] = last.get("outcome") == "failed"
    return found
