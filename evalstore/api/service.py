"""The connections, threads, keys and caches of one process, opened at start and closed at the end."""

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from functools import cached_property
from typing import Any, Final, TypeVar

from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import Connection
from starlette.requests import Request

from evalstore.api.access import Access
from evalstore.api.change_feed import ChangeFeed, StreamCounts
from evalstore.api.event_times import EventTimes
from evalstore.api.http_metrics import ApiMetrics
from evalstore.api.problems import Problem, refuse_compressed, unavailable
from evalstore.api.rate_limit import RateLimiter
from evalstore.api.record_cache import RecordCache, Rendered, SharedCache
from evalstore.api.rendering import render
from evalstore.hooks import Hooks
from evalstore.objects import object_store
from evalstore.objects.object_store import Store, Stores
from evalstore.storage import api_keys, as_of, database, erasure, records
from evalstore.storage.as_of import PastRecord
from evalstore.storage.erasure import Erased
from evalstore.storage.operator_actions import Intent
from evalstore.storage.records import RecordView
from evalstore.telemetry import erasing
from evalstore.telemetry.erasing import OlderProcesses
from models.errors import DatabaseOutage, ObjectDamaged, ObjectMissing, ObjectStoreOutage
from models.logs import EventLogger
from models.settings import Settings
from tasks import tracing
from tasks.broker import broker
from tasks.connections import connect
from tasks.keys import Names

# Each thread holds at most one connection. More would not help: they wait for PostgreSQL's processors.
THREADS: Final = 12
EXPORTS: Final = 3
TURN_S: Final = 10.0
WORK_S: Final = 60.0  # for a statement
# Storing a body takes several times its size in memory. So at most two bodies above the first size, and one above the second,
# are in memory at a time. Other requests wait before reading on.
LARGE_BODY_BYTES: Final = 1024 * 1024
HUGE_BODY_BYTES: Final = 16 * 1024 * 1024
LARGE_BODIES: Final = 2
# The number of concurrent uploads. Each holds some frames of 4 MiB.
UPLOADS: Final = 8
_LARGE_TURN_S: Final = 25.0  # less than the usual time-out of clients
_PAUSE_AFTER_FAILURE_S: Final = 5.0
_TIMES_S: Final = 1.0

T = TypeVar("T")
log = EventLogger("evalstore.api")


class Service:
    """One for each process. Its async methods belong to one event loop."""

    def __init__(self, settings: Settings, metrics: ApiMetrics, hooks: Hooks) -> None:
        self.settings, self.metrics, self.hooks = settings, metrics, hooks
        self.had_schema = False
        self._engine = database.connect(settings, pool_size=THREADS, statement_timeout_s=WORK_S)
        self.export_engine = database.connect(settings, pool_size=EXPORTS, statement_timeout_s=WORK_S)
        self.exports = asyncio.Semaphore(EXPORTS)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="evalstore-api")
        self._turns = asyncio.Semaphore(THREADS)
        self.busy = 0
        self._large_bodies = asyncio.Semaphore(LARGE_BODIES)
        self._huge_bodies = asyncio.Semaphore(1)
        self._upload_threads = ThreadPoolExecutor(UPLOADS, thread_name_prefix="evalstore-upload")
        self._upload_turns = asyncio.Semaphore(UPLOADS)
        self._watch = database.Watch()
        self._row_version_thread = ThreadPoolExecutor(1, thread_name_prefix="evalstore-row-versions")
        self._row_version_conn: Connection | None = None
        self.stores = Stores(settings, threads=THREADS, in_a_hurry=True)
        self._objects_paused_until = 0.0
        names = self.names = Names(settings.redis_namespace)
        self.redis = connect(
            settings.redis_url.get_secret_value(),
            settings.redis_namespace,
            socket_timeout=0.25,
            socket_connect_timeout=0.25,
            retry=Retry(NoBackoff(), 0),
        )
        self.event_times = EventTimes(self.redis, names, lambda: self._connection(_TIMES_S))
        self._shared_cache = SharedCache(self.redis, names, settings.cache_ttl_s)
        self.rates = RateLimiter(settings.redis_url.get_secret_value(), names, metrics.rate_check)
        self.access = Access(settings, lambda: self.run(api_keys.usable), self.rates)
        self.feed = ChangeFeed(self._open_connection, self._watch.bounded)
        self.streams = StreamCounts()
        self.records = RecordCache(
            row_versions=self._row_versions, load=self._load_cached, count=metrics.read, ttl_s=settings.cache_ttl_s
        )

    async def _row_versions(self, eval_ids: Sequence[str]) -> dict[str, str]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._row_version_thread, self._query_row_versions, eval_ids)

    def _query_row_versions(self, eval_ids: Sequence[str]) -> dict[str, str]:
        """Query on a separate connection. An idle connection may have broken unnoticed, so retry once on a new connection."""
        was_open = self._row_version_conn is not None
        try:
            if self._row_version_conn is None:
                self._row_version_conn = self._connect_for_row_versions()
            with self._watch.bounded(self._row_version_conn, TURN_S):
                return records.row_versions(self._row_version_conn, eval_ids)
        except DatabaseOutage:
            if self._row_version_conn is not None:
                self._row_version_conn.invalidate()
                self._row_version_conn.close()
                self._row_version_conn = None
            if not was_open:
                raise
        return self._query_row_versions(eval_ids)

    def _connect_for_row_versions(self) -> Connection:
        """Connect in autocommit if there is no pooler. Autocommit saves two round trips for each query."""
        conn = self._engine.connect()
        return conn if database.is_pooled(conn) else conn.execution_options(isolation_level="AUTOCOMMIT")

    def _open_connection(self) -> Connection:
        with database.errors():
            return self._engine.connect()

    async def _load_cached(self, eval_id: str, row_version: str) -> Rendered | None:
        return await self.thread(lambda: self._load(eval_id, row_version))

    def _load(self, eval_id: str, row_version: str) -> Rendered | None:
        if (cached := self._shared_cache.get(eval_id, row_version)) is not None:
            self.metrics.read("redis")
            return cached
        record = self.load(eval_id)
        self.metrics.read("database")
        if record is None:
            return None
        rendered = render(record)
        if any(part.where is not None for part in record.contents.values()):
            return rendered._replace(is_partial=True)
        self._shared_cache.put(eval_id, rendered)
        return rendered

    def load(self, eval_id: str) -> RecordView | None:
        """Return the record, or None if it does not exist. For threads. Raises DatabaseOutage (retry).

        During an outage of the object store the record has only references to the content there.
        """
        record = self.with_connection(lambda conn: records.load(conn, eval_id))
        return record and self.complete(record)

    def load_past(self, eval_id: str, at: datetime) -> PastRecord | None:
        """The record as it was, or None; in the same way."""
        past = self.with_connection(lambda conn: as_of.load(conn, eval_id, at))
        return past and past._replace(view=self.complete(past.view))

    def complete(self, record: RecordView) -> RecordView:
        """`record` with its content that is an object, as far as that can be read now."""
        if all(part.where is None for part in record.contents.values()) or time.monotonic() < self._objects_paused_until:
            return record
        try:
            return records.complete(self.connection, self.stores, record)
        except ObjectStoreOutage as error:
            self._objects_paused_until = time.monotonic() + _PAUSE_AFTER_FAILURE_S
            log.warning("records_without_objects", error=error)
        except (ObjectMissing, ObjectDamaged, LookupError) as error:
            log.warning("record_without_content", eval_id=record.fields["eval_id"], error=error)
        return record

    def connection(self) -> contextlib.AbstractContextManager[Connection]:
        """Open a connection. For threads. Raises DatabaseOutage."""
        return self._connection(WORK_S)

    @contextmanager
    def _connection(self, seconds: float) -> Iterator[Connection]:
        with database.errors(), self._engine.connect() as conn, self._watch.bounded(conn, seconds):
            yield conn

    def with_connection(self, work: Callable[[Connection], T]) -> T:
        """Call `work` with a connection. For threads. Raises DatabaseOutage, and the errors of `work`."""
        with self.connection() as conn:
            return work(conn)

    def write(self, events: int, work: Callable[[Connection, str | None], T]) -> T:
        """Call `work` with a connection and a traceparent for its confirmations. `work` stores this number of events."""
        with tracing.transaction(events) as traceparent:
            return self.with_connection(lambda conn: work(conn, traceparent))

    def erase(self, eval_id: str, actor: str, reason: str | None) -> Erased | None:
        """Erase an evaluation; None where there never was one. Raises Problem (409), OtherKey, Outage (retry)."""
        with self.connection() as conn:
            if not erasure.known(conn, [eval_id]):
                return None
            try:
                erasing.refuse_older_processes(conn, broker())
            except OlderProcesses as error:
                raise Problem(409, "older-workers", str(error)) from error
            around = erasing.surroundings(self.settings, broker())
            try:
                erasure.begin(conn, around.targets)
                return erasure.erase(conn, eval_id, Intent("erase", actor, reason, {"eval_ids": [eval_id]}), around)
            finally:
                for target in around.targets:
                    target.store.close()

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Call `work` in a thread with a connection. Raises Outage, Problem (503), and the errors of `work`."""
        return await self.thread(lambda: self.with_connection(work))

    async def thread(self, work: Callable[[], T]) -> T:
        """Call `work` in a thread. Raises Problem (503) if no thread is free in time, and the errors of `work`."""
        async with _turn(self._turns, TURN_S, "the service is busy"):
            context = contextvars.copy_context()
            self.busy += 1
            try:
                return await asyncio.get_running_loop().run_in_executor(self._threads, context.run, self._with_deadline, work)
            finally:
                self.busy -= 1

    def _with_deadline(self, work: Callable[[], T]) -> T:
        """Call `work`. If it exceeds the longest time of a statement, /health/live reports the thread as stuck."""
        counters = self.metrics.counters
        counters.watch_thread(threading.current_thread().name)
        counters.set_deadline(WORK_S + TURN_S)
        try:
            return work()
        finally:
            counters.set_deadline(None)

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytearray]:
        """Read the body of a request. The caller clears the body after use. A large body keeps its turn until the block ends.

        Raises Problem (408, 413, 415, 503).
        """
        refuse_compressed(request.headers)
        async with contextlib.AsyncExitStack() as stack:
            body = bytearray()
            turns_above = [(LARGE_BODY_BYTES, self._large_bodies), (HUGE_BODY_BYTES, self._huge_bodies)]
            async for piece in request.stream():
                body += piece
                while turns_above and len(body) > turns_above[0][0]:
                    _, turns = turns_above.pop(0)
                    busy = "the service is busy with other large requests"
                    await stack.enter_async_context(_turn(turns, _LARGE_TURN_S, busy))
            yield body

    @asynccontextmanager
    async def upload(self) -> AsyncIterator[Callable[[Callable[[], T]], asyncio.Future[T]]]:
        """Give a function that starts work in a thread, reserved until the block ends. Raises Problem (503)."""
        async with _turn(self._upload_turns, _LARGE_TURN_S, "the service is busy with other uploads"):
            yield lambda work: asyncio.get_running_loop().run_in_executor(self._upload_threads, work)

    @cached_property
    def objects(self) -> Store:
        """The object store of uploads, opened at first use. For threads. Raises ObjectStoreOutage, ValueError."""
        return object_store.open_store(self.settings.object_store_url or "", self.settings, threads=THREADS + UPLOADS)

    @property
    def connections(self) -> dict[str, int]:
        """Connections to PostgreSQL, used and idle."""
        pools: list[Any] = [self._engine.pool, self.export_engine.pool]
        return {"used": sum(pool.checkedout() for pool in pools), "idle": sum(pool.checkedin() for pool in pools)}

    def close(self) -> None:
        """Wait for running work, and close all connections."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._upload_threads.shutdown(wait=True, cancel_futures=True)
        self._row_version_thread.shutdown(wait=True, cancel_futures=True)
        if self._row_version_conn is not None:
            self._row_version_conn.close()
        self._engine.dispose()
        self.stores.close()
        if "objects" in self.__dict__:
            self.objects.close()
        self.export_engine.dispose()
        self.redis.close()


@asynccontextmanager
async def _turn(turns: asyncio.Semaphore, within_s: float, busy: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(within_s):
            await turns.acquire()
    except TimeoutError:
        raise unavailable(busy) from None
    try:
        yield
    finally:
        turns.release()


def service_of(request: Request) -> Service:
    """Return the service of a request's application. Raises Problem (503) before it has started."""
    service = getattr(request.app.state, "service", None)
    if not isinstance(service, Service):
        raise Problem(503, "starting", "the service is starting")
    return service
