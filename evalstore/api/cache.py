"""Records read through a cache that is never stale: every read is checked against PostgreSQL, many reads by one query.

A cached record carries the stamp of the row it was read from. A read is answered from the cache only if a query that began
after the read arrived gives that very stamp, so nothing has to be invalidated, by no writer, and nothing that is late, lost or
written in the wrong order can make an answer old. The query is cheap, as it is shared by all reads that arrived while the one
before it was on its way; what the cache saves is reading the record and writing it as JSON.

Two caches: this process's memory, and Redis for all. An outage of Redis makes reads slower.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, NamedTuple

import redis

from models.logs import EventLogger
from tasks.keys import Names

log = EventLogger("evalstore.api")

MEMORY_BYTES: Final = 64 * 1024 * 1024
_LARGEST: Final = 256 * 1024
_TOGETHER: Final = 500
_MANY: Final = 4
_GATHER_S: Final = 0.001
_PAUSE_S: Final = 5.0  # how long Redis is left alone after it failed


class Rendered(NamedTuple):
    """A record as it is answered."""

    stamp: str
    body: bytes
    lacks: bool = False  # some content that cannot be read for now: not to be kept

    @property
    def version(self) -> int:
        return int(self.stamp.partition(".")[0])


class SharedCache:
    """The cache in Redis. One entry for each evaluation: its stamp, a line break, its JSON."""

    def __init__(self, client: redis.Redis, names: Names, ttl_s: int) -> None:
        self._client, self._names, self._ttl_s = client, names, ttl_s
        self._closed_until = 0.0

    def get(self, eval_id: str, stamp: str) -> Rendered | None:
        """What is cached under exactly this stamp."""
        entry = self._try(lambda: self._client.get(self._names.cached_record(eval_id)))
        found, _, body = entry.partition(b"\n") if isinstance(entry, bytes) else (b"", b"", b"")
        return Rendered(stamp, body) if found == stamp.encode() else None

    def put(self, eval_id: str, record: Rendered) -> None:
        if len(record.body) <= _LARGEST:
            value = record.stamp.encode() + b"\n" + record.body
            self._try(lambda: self._client.set(self._names.cached_record(eval_id), value, ex=self._ttl_s))

    def _try(self, work: Callable[[], Any]) -> Any:
        if not self._ttl_s or time.monotonic() < self._closed_until:
            return None
        try:
            return work()
        except redis.RedisError as error:
            self._closed_until = time.monotonic() + _PAUSE_S
            log.warning("cache_paused", seconds=_PAUSE_S, error=error)
            return None


class _Memory:
    """The records read last, up to so many bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._entries: OrderedDict[str, Rendered] = OrderedDict()
        self._max_bytes, self._bytes = max_bytes, 0

    def get(self, eval_id: str, stamp: str) -> Rendered | None:
        entry = self._entries.get(eval_id)
        if entry is None or entry.stamp != stamp:
            return None
        self._entries.move_to_end(eval_id)
        return entry

    def put(self, eval_id: str, record: Rendered) -> None:
        if (before := self._entries.pop(eval_id, None)) is not None:
            self._bytes -= len(before.body)
        if len(record.body) > _LARGEST:
            return
        self._entries[eval_id] = record
        self._bytes += len(record.body)
        while self._bytes > self._max_bytes:
            _, dropped = self._entries.popitem(last=False)
            self._bytes -= len(dropped.body)


class RecordCache:
    """Records by id.

    `stamps` asks PostgreSQL for the stamps of many; `load` reads one record there. Both are called by the event loop and raise
    Outage. `count` is told where each read was answered from.
    """

    def __init__(
        self,
        *,
        stamps: Callable[[Sequence[str]], Awaitable[dict[str, str]]],
        load: Callable[[str, str], Coroutine[Any, Any, Rendered | None]],
        count: Callable[[str], None],
        ttl_s: int,
    ) -> None:
        self._stamps, self._load, self._count = stamps, load, count
        self._memory = _Memory(MEMORY_BYTES if ttl_s else 0)
        self._waiting: dict[str, list[asyncio.Future[str | None]]] = {}
        self._checking: asyncio.Task[None] | None = None
        self._loads: dict[tuple[str, str], asyncio.Task[Rendered | None]] = {}

    async def get(self, eval_id: str) -> Rendered | None:
        """The record as of now, or later; None where there is none. Raises Outage (retry)."""
        stamp = await self._row_version(eval_id)
        if stamp is None:
            return None
        if (found := self._memory.get(eval_id, stamp)) is not None:
            self._count("memory")
            return found
        # One load for all who wait for the same. Whoever goes away meanwhile does not take it along.
        task = self._loads.get((eval_id, stamp))
        if task is None:
            task = self._loads[eval_id, stamp] = asyncio.create_task(self._load(eval_id, stamp))
            task.add_done_callback(lambda done: self._loaded(eval_id, stamp, done))
        return await asyncio.shield(task)

    def _loaded(self, eval_id: str, stamp: str, task: asyncio.Task[Rendered | None]) -> None:
        del self._loads[eval_id, stamp]
        if not task.cancelled() and task.exception() is None and (record := task.result()) is not None and not record.lacks:
            self._memory.put(eval_id, record)

    def _row_version(self, eval_id: str) -> asyncio.Future[str | None]:
        """Its stamp, by a query that begins after this."""
        future: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(eval_id, []).append(future)
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check())
        return future

    async def _check(self) -> None:
        many = False
        while self._waiting:
            if many:  # more come soon: a query for all of them costs no more than one for some
                await asyncio.sleep(_GATHER_S)
            batch = dict(list(self._waiting.items())[:_TOGETHER])
            for eval_id in batch:
                del self._waiting[eval_id]
            many = sum(map(len, batch.values())) >= _MANY
            try:
                found = await self._stamps(list(batch))
            except Exception as error:  # noqa: BLE001 - it is theirs who wait
                for future in (future for futures in batch.values() for future in futures if not future.done()):
                    future.set_exception(error)
                continue
            for eval_id, futures in batch.items():
                for future in futures:
                    if not future.done():
                        future.set_result(found.get(eval_id))
