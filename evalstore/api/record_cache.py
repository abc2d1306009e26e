"""Records read through caches that are never stale, because PostgreSQL confirms the row version of every read.

A cached record carries the version of the row it was read from. A read is answered from a cache only if a query that began
after the read arrived returns that version. So writers invalidate nothing. All reads that arrive during one query share the
next. docs/decisions/0010 says why.

Two caches: the memory of this process, and Redis for all processes. An outage of Redis makes reads slower.
"""

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import redis

from models.logs import EventLogger
from models.record import RecordRow
from tasks.keys import Names

log = EventLogger("evalstore.api")

MEMORY_BYTES: Final = 64 * 1024 * 1024
_LARGEST_BYTES: Final = 256 * 1024
_MOST_IDS: Final = 500
# After a query for this number of reads, wait briefly for more reads: a query for many costs hardly more than a query for few.
_BUSY_READS: Final = 4
_GATHER_S: Final = 0.001
_PAUSE_AFTER_FAILURE_S: Final = 5.0


class RecordHead(msgspec.Struct):
    """Some fields of a rendered record."""

    eval_id: str
    version: int
    status: str
    attempt: int
    run_id: str | None = None
    submitter: str | None = None


_HEAD: Final = msgspec.json.Decoder(RecordHead)


class Rendered(NamedTuple):
    """A record as JSON. `is_partial`: some content could not be read, so the record must not be cached."""

    row_version: str
    body: bytes
    is_partial: bool = False

    @property
    def head(self) -> RecordHead:
        """The fields that decide on an answer."""
        try:
            return _HEAD.decode(self.body)
        except msgspec.DecodeError:  # Content may hold lone surrogates, which the fast decoder refuses.
            return msgspec.convert(json.loads(self.body), RecordHead)

    @property
    def tag(self) -> str:
        """The version, and after repairs at that version their number: `3` or `3-1`."""
        return self.row_version.partition(".")[0]


class SharedCache:
    """The cache in Redis. An entry is the row version, the format, a line break and the JSON.

    The format names the fields of a record: during an upgrade a release must not answer the JSON of another.
    """

    _FORMAT: Final = hashlib.sha256(",".join(RecordRow._fields).encode()).hexdigest()[:8]

    def __init__(self, client: redis.Redis, names: Names, ttl_s: int) -> None:
        self._client, self._names, self._ttl_s = client, names, ttl_s
        self._paused_until = 0.0

    def get(self, eval_id: str, row_version: str) -> Rendered | None:
        """Return the record that is cached with this row version."""
        entry = self._attempt(lambda: self._client.get(self._names.cached_record(eval_id)))
        cached, _, body = entry.partition(b"\n") if isinstance(entry, bytes) else (b"", b"", b"")
        return Rendered(row_version, body) if cached == self._head(row_version) else None

    def put(self, eval_id: str, record: Rendered) -> None:
        if len(record.body) <= _LARGEST_BYTES:
            value = self._head(record.row_version) + b"\n" + record.body
            self._attempt(lambda: self._client.set(self._names.cached_record(eval_id), value, ex=self._ttl_s))

    def _head(self, row_version: str) -> bytes:
        return f"{row_version} {self._FORMAT}".encode()

    def _attempt(self, command: Callable[[], Any]) -> Any:
        if not self._ttl_s or time.monotonic() < self._paused_until:
            return None
        try:
            return command()
        except redis.RedisError as error:
            self._paused_until = time.monotonic() + _PAUSE_AFTER_FAILURE_S
            log.warning("cache_paused", seconds=_PAUSE_AFTER_FAILURE_S, error=error)
            return None


class _Memory:
    """The records that were read last, up to `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._entries: OrderedDict[str, Rendered] = OrderedDict()
        self._max_bytes, self._bytes = max_bytes, 0

    def get(self, eval_id: str, row_version: str) -> Rendered | None:
        entry = self._entries.get(eval_id)
        if entry is None or entry.row_version != row_version:
            return None
        self._entries.move_to_end(eval_id)
        return entry

    def drop(self, eval_id: str) -> None:
        if (before := self._entries.pop(eval_id, None)) is not None:
            self._bytes -= len(before.body)

    def put(self, eval_id: str, record: Rendered) -> None:
        self.drop(eval_id)
        if len(record.body) > _LARGEST_BYTES:
            return
        self._entries[eval_id] = record
        self._bytes += len(record.body)
        while self._bytes > self._max_bytes:
            _, dropped = self._entries.popitem(last=False)
            self._bytes -= len(dropped.body)


class RecordCache:
    """Records by id, for one event loop.

    `row_versions` asks PostgreSQL for the row versions of many ids. `load` reads one record. Both raise Outage. `count` counts
    a read from memory.
    """

    def __init__(
        self,
        *,
        row_versions: Callable[[Sequence[str]], Awaitable[dict[str, str]]],
        load: Callable[[str, str], Coroutine[Any, Any, Rendered | None]],
        count: Callable[[str], None],
        ttl_s: int,
    ) -> None:
        self._row_versions, self._load, self._count = row_versions, load, count
        self._memory = _Memory(MEMORY_BYTES if ttl_s else 0)
        self._waiting: dict[str, list[asyncio.Future[str | None]]] = {}
        self._checking: asyncio.Task[None] | None = None
        self._loads: dict[tuple[str, str], asyncio.Task[Rendered | None]] = {}

    async def get(self, eval_id: str) -> Rendered | None:
        """Return the record as of this call or later, or None if there is none. Raises Outage (retry)."""
        row_version = await self._row_version(eval_id)
        if row_version is None:
            self._memory.drop(eval_id)
            return None
        if (cached := self._memory.get(eval_id, row_version)) is not None:
            self._count("memory")
            return cached
        # All reads of the same row share one load. A client that disconnects must not cancel it.
        task = self._loads.get((eval_id, row_version))
        if task is None:
            task = self._loads[eval_id, row_version] = asyncio.create_task(self._load(eval_id, row_version))
            task.add_done_callback(lambda done: self._keep(eval_id, row_version, done))
        return await asyncio.shield(task)

    def _keep(self, eval_id: str, row_version: str, task: asyncio.Task[Rendered | None]) -> None:
        del self._loads[eval_id, row_version]
        if not task.cancelled() and task.exception() is None and (record := task.result()) and not record.is_partial:
            self._memory.put(eval_id, record)

    def _row_version(self, eval_id: str) -> asyncio.Future[str | None]:
        """Ask for the row version in a query that begins after this call."""
        future: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(eval_id, []).append(future)
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check())
        return future

    async def _check(self) -> None:
        is_busy = False
        while self._waiting:
            if is_busy:
                await asyncio.sleep(_GATHER_S)
            batch = dict(list(self._waiting.items())[:_MOST_IDS])
            for eval_id in batch:
                del self._waiting[eval_id]
            is_busy = sum(map(len, batch.values())) >= _BUSY_READS
            try:
                current = await self._row_versions(list(batch))
            except Exception as error:  # noqa: BLE001 - each waiting read raises it
                for future in (future for futures in batch.values() for future in futures if not future.done()):
                    future.set_exception(error)
                continue
            for eval_id, futures in batch.items():
                for future in futures:
                    if not future.done():
                        future.set_result(current.get(eval_id))
