"""What the service works with while it runs: connections, threads, keys, caches. Made at start, closed at the end."""

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
from uuid import UUID

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import Connection
from starlette.requests import Request

from evalstore.api.access import Access
from evalstore.api.cache import RecordCache, Rendered, SharedCache
from evalstore.api.metrics import ApiMetrics
from evalstore.api.problems import Problem, refuse_packed, unavailable
from evalstore.api.rendering import rendered
from evalstore.objects import object_store
from evalstore.objects.object_store import Store, Stores
from evalstore.storage import api_keys, conditional, database, records
from evalstore.storage.records import RecordView
from models.errors import DatabaseOutage, ObjectDamaged, ObjectMissing, ObjectStoreOutage, RedisOutage
from models.events import Event
from models.logs import EventLogger
from models.record import EventRow
from models.settings import Settings
from tasks import tracing
from tasks.keys import Names

# Each thread holds at most one connection. Few are enough: what they wait for is PostgreSQL, and that has no more cores.
THREADS: Final = 12
EXPORTS: Final = 3
# A request waits so long for its turn, and a statement may take so long.
TURN_S: Final = 10.0
WORK_S: Final = 60.0
# Bodies above the first size are held in memory only a few at a time, above the second one at a time: until it is stored, the
# content in it is there several times. The others wait with what they have.
LARGE_BODY_BYTES: Final = 1024 * 1024
HUGE_BODY_BYTES: Final = 16 * 1024 * 1024
LARGE_BODIES: Final = 2
# Uploads on their way to the object store at the same time: each holds some frames of 4 MiB. The others are not read meanwhile.
UPLOADS: Final = 8
_LARGE_TURN_S: Final = 25.0  # less than clients usually wait for a server that takes nothing

# For so long after a server was away, what can do without it does: records the object store, `respond-async` the event log.
_REST_S: Final = 5.0
_LOOK_S: Final = 1.0

T = TypeVar("T")
log = EventLogger("evalstore.api")


class Service:
    """One for each process; everything in it belongs to its event loop."""

    def __init__(self, settings: Settings, metrics: ApiMetrics) -> None:
        self.settings, self.metrics = settings, metrics
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
        self._stamp_thread = ThreadPoolExecutor(1, thread_name_prefix="evalstore-stamps")
        self._stamp_conn: Connection | None = None
        self.stores = Stores(settings, threads=THREADS, in_a_hurry=True)
        self._objects_rest_until = self._log_rests_until = self._redis_rests_until = 0.0
        self._names = Names(settings.redis_namespace)
        self.redis = redis.Redis.from_url(
            settings.redis_url.get_secret_value(),
            socket_timeout=0.25,
            socket_connect_timeout=0.25,
            retry=Retry(NoBackoff(), 0),
        )
        shared = SharedCache(self.redis, self._names, settings.cache_ttl_s)
        self.access = Access(settings, lambda: self.run(api_keys.usable))

        async def stamps(eval_ids: Sequence[str]) -> dict[str, str]:
            return await asyncio.get_running_loop().run_in_executor(self._stamp_thread, self._row_versions, eval_ids)

        async def load(eval_id: str, stamp: str) -> Rendered | None:
            return await self.thread(lambda: self._load(shared, eval_id, stamp))

        self.records = RecordCache(stamps=stamps, load=load, count=metrics.read, ttl_s=settings.cache_ttl_s)

    def _row_versions(self, eval_ids: Sequence[str]) -> dict[str, str]:
        """On a connection kept for this alone: one query at a time, for all reads there are. It may have broken unseen."""
        kept = self._stamp_conn is not None
        try:
            if self._stamp_conn is None:
                self._stamp_conn = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            with self._watch.bounded(self._stamp_conn, TURN_S):
                return records.row_versions(self._stamp_conn, eval_ids)
        except DatabaseOutage:
            if self._stamp_conn is not None:
                self._stamp_conn.invalidate()
                self._stamp_conn.close()
                self._stamp_conn = None
            if not kept:
                raise
        return self._row_versions(eval_ids)

    def _load(self, shared: SharedCache, eval_id: str, stamp: str) -> Rendered | None:
        if (cached := shared.get(eval_id, stamp)) is not None:
            self.metrics.read("redis")
            return cached
        record = self.load(eval_id)
        self.metrics.read("database")
        if record is None:
            return None
        made = rendered(record)
        if any(part.where is not None for part in record.contents.values()):
            return made._replace(lacks=True)
        shared.put(eval_id, made)
        return made

    def load(self, eval_id: str) -> RecordView | None:
        """The record, or None. While the object store is away it lacks what is there, and says where to read it."""
        record = self.with_connection(lambda conn: records.load(conn, eval_id))
        if record is None or all(part.where is None for part in record.contents.values()):
            return record
        if time.monotonic() < self._objects_rest_until:
            return record
        try:
            return records.complete(self.connection, self.stores, record)
        except ObjectStoreOutage as error:
            self._objects_rest_until = time.monotonic() + _REST_S
            log.warning("records_without_objects", error=error)
        except (ObjectMissing, ObjectDamaged, LookupError) as error:
            log.warning("record_without_content", eval_id=eval_id, error=error)
        return record

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection, for what runs in a thread already."""
        with database.errors(), self._engine.connect() as conn, self._watch.bounded(conn, WORK_S):
            yield conn

    def with_connection(self, work: Callable[[Connection], T]) -> T:
        """What `work` gives, called here and now with a connection. For what runs in a thread already."""
        with self.connection() as conn:
            return work(conn)

    def write(self, events: int, work: Callable[[Connection, str | None], T]) -> T:
        """The same for what stores so many events; `work` is also given the trace that their confirmations go on in."""
        with tracing.transaction(events) as traceparent:
            return self.with_connection(lambda conn: work(conn, traceparent))

    def remembered_time(self, eval_id: str, event_id: str, now: datetime) -> datetime:
        """The time this event was first given with, or else `now`, remembered for a day. Raises RedisOutage."""
        key = self._names.given_time(eval_id, event_id)
        try:
            pipeline: Any = self.redis.pipeline(transaction=True)
            pipeline.set(key, now.isoformat(), nx=True, ex=86_400)
            pipeline.get(key)
            _, first = pipeline.execute()
        except redis.RedisError as error:
            raise RedisOutage(str(error)) from error
        return datetime.fromisoformat(first.decode())

    def queued_times(self, events: Sequence[Event | EventRow]) -> dict[tuple[str, UUID | None], datetime]:
        """Those that `remembered_time` knows. While Redis is away it gives none, and soon."""
        if not events or time.monotonic() < self._redis_rests_until:
            return {}
        try:
            found: Any = self.redis.mget([self._names.given_time(event.eval_id, str(event.event_id)) for event in events])
        except redis.RedisError as error:
            self._redis_rests_until = time.monotonic() + _REST_S
            log.warning("queue_skipped", error=error)
            return {}
        times = zip(events, found, strict=True)
        return {(one.eval_id, one.event_id): datetime.fromisoformat(at.decode()) for one, at in times if at is not None}

    def stored_times(self, events: Sequence[Event | EventRow]) -> dict[tuple[str, UUID | None], datetime]:
        """When those of `events` occurred that are stored. While PostgreSQL is away it gives none, and soon."""
        if not events or time.monotonic() < self._log_rests_until:
            return {}
        try:
            with database.errors(), self._engine.connect() as conn, self._watch.bounded(conn, _LOOK_S):
                return conditional.times(conn, events)
        except DatabaseOutage as error:
            self._log_rests_until = time.monotonic() + _REST_S
            log.warning("event_log_skipped", error=error)
            return {}

    async def run(self, work: Callable[[Connection], T]) -> T:
        """What `work` gives, called in a thread with a connection. Raises Outage, Problem (503), and what `work` raises."""
        return await self.thread(lambda: self.with_connection(work))

    async def thread(self, work: Callable[[], T]) -> T:
        """What `work` gives, called in a thread. Raises Problem (503) when none comes free, and what `work` raises."""
        async with _turn(self._turns, TURN_S, "the service is busy"):
            here = contextvars.copy_context()  # the span of the request is in it
            self.busy += 1
            try:
                return await asyncio.get_running_loop().run_in_executor(self._threads, here.run, self._watched, work)
            finally:
                self.busy -= 1

    def _watched(self, work: Callable[[], T]) -> T:
        """Called in a thread: what `work` gives. What takes longer than any statement may take is stuck."""
        ledger = self.metrics.counters
        ledger.watch_thread(threading.current_thread().name)
        ledger.set_deadline(WORK_S + TURN_S)
        try:
            return work()
        finally:
            ledger.set_deadline(None)

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytearray]:
        """The request's body, in memory; who has read it clears it. Of large ones only so many are, until this is left.

        Raises Problem (415, 503).
        """
        refuse_packed(request.headers)
        async with contextlib.AsyncExitStack() as stack:
            body, ahead = bytearray(), [(LARGE_BODY_BYTES, self._large_bodies), (HUGE_BODY_BYTES, self._huge_bodies)]
            async for piece in request.stream():
                body += piece
                while ahead and len(body) > ahead[0][0]:
                    _, turns = ahead.pop(0)
                    busy = "the service is busy with other large requests"
                    await stack.enter_async_context(_turn(turns, _LARGE_TURN_S, busy))
            yield body

    @asynccontextmanager
    async def upload(self) -> AsyncIterator[Callable[[Callable[[], T]], asyncio.Future[T]]]:
        """What starts work in a thread that is this upload's own until this is left. Raises Problem (503)."""
        async with _turn(self._upload_turns, _LARGE_TURN_S, "the service is busy with other uploads"):
            yield lambda work: asyncio.get_running_loop().run_in_executor(self._upload_threads, work)

    @cached_property
    def objects(self) -> Store:
        """The object store. Opened in a thread, at its first use. Raises ObjectStoreOutage, ValueError."""
        return object_store.open_store(self.settings.object_store_url or "", self.settings, threads=THREADS + UPLOADS)

    @property
    def connections(self) -> dict[str, int]:
        """To PostgreSQL, by whether they are used now."""
        pools: list[Any] = [self._engine.pool, self.export_engine.pool]
        return {"used": sum(pool.checkedout() for pool in pools), "idle": sum(pool.checkedin() for pool in pools)}

    def close(self) -> None:
        """After the last answer."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._upload_threads.shutdown(wait=True, cancel_futures=True)
        self._stamp_thread.shutdown(wait=True, cancel_futures=True)
        if self._stamp_conn is not None:
            self._stamp_conn.close()
        self._engine.dispose()
        self.stores.close()
        if "objects" in self.__dict__:  # was opened
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
    """The service that answers `request`."""
    found = getattr(request.app.state, "service", None)
    if not isinstance(found, Service):
        raise Problem(503, "starting", "the service is starting")
    return found
