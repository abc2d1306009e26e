"""Tell the clients that wait in this process of committed changes: one reader of the outbox for all of them.

The reader asks PostgreSQL for new rows 50 times a second while anybody waits. So it needs neither Redis nor the relay,
and misses nothing while they are away. A client costs neither a thread nor a connection. docs/decisions/0046 says why.
"""

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple

import msgspec
from fastapi.sse import format_sse_event
from sqlalchemy import Connection

from evalstore.api import problems
from evalstore.api.problems import Problem
from evalstore.storage import outbox_tail
from evalstore.storage.outbox_tail import ChangesLost, OutboxTail, Position, TailRow
from models.errors import DatabaseOutage, Outage
from models.logs import EventLogger

log = EventLogger("evalstore.api")

POLL_S: Final = 0.02
_RETRY_S: Final = 0.25
_IDLE_S: Final = 30.0  # The reader ends after this time without anybody who waits.
_QUERY_S: Final = 10.0
# A stream that has not sent this number of changes is ended. Its client resumes.
STREAMS_PER_KEY: Final = 100
MOST_UNSENT: Final = 10_000


class _Line(msgspec.Struct, gc=False):
    type: str
    eval_id: str | None = None
    run_id: str | None = None
    status: str | None = None


_LINE: Final = msgspec.json.Decoder(_Line)


@dataclass(eq=False)
class Change:
    """A confirmation, and the place at which a client resumes that has it."""

    row_id: int
    number: int
    resume: Position
    text: str

    @cached_property
    def line(self) -> _Line:
        return _LINE.decode(self.text)

    @cached_property
    def message(self) -> bytes:
        """The server-sent event, encoded once for all streams."""
        return format_sse_event(data_str=self.text, event=self.line.type, id=encode(self.resume))


def encode(position: Position) -> str:
    """Return the id of a server-sent event."""
    return f"{position.row_id}-{position.offset}-{position.at:.0f}"


def changes_of(row: TailRow, at: float) -> Iterator[Change]:
    """Yield the confirmations of a commit."""
    for number, text in enumerate(row.body.split("\n"), 1):
        resume = Position(row.row_id, number, at) if row.resume is None else Position(row.resume, 0, at)
        yield Change(row.row_id, number, resume, text)


@dataclass(frozen=True)
class ChangeFilter:
    """Conditions that combine by AND. A missing value matches none."""

    eval_id: str | None = None
    run_id: str | None = None
    statuses: frozenset[str] = frozenset()

    def matches(self, line: _Line) -> bool:
        """Tell whether a stream with this filter gets the confirmation."""
        return (
            (self.eval_id is None or line.eval_id == self.eval_id)
            and (self.run_id is None or line.run_id == self.run_id)
            and (not self.statuses or line.status in self.statuses)
        )

    @property
    def needle(self) -> str | None:
        """A text that every matching row of the outbox contains. Ids need no escapes in JSON."""
        if self.eval_id is not None:
            return f'"eval_id":"{self.eval_id}"'
        return None if self.run_id is None else f'"run_id":"{self.run_id}"'


@dataclass(eq=False)
class Subscription:
    """The changes for one stream that wait to be sent. `start` is the place before the first of them.

    `high` is the last row before them. `is_cut`: some were dropped, so the stream must end.
    """

    filter: ChangeFilter
    start: Position
    high: int
    after: tuple[int, int] = (0, 0)
    unsent: deque[Change] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    is_cut: bool = False

    def offer(self, change: Change) -> None:
        """Keep a change for the stream, unless the client has it."""
        if self.is_cut or (change.row_id, change.number) <= self.after or not self.filter.matches(change.line):
            return
        if len(self.unsent) >= MOST_UNSENT:
            self.cut()
        else:
            self.unsent.append(change)
            self.changed.set()

    def cut(self) -> None:
        """End the stream."""
        self.is_cut = True
        self.changed.set()


class StreamCounts:
    """The number of open streams of each key in this process."""

    def __init__(self) -> None:
        self._open = Counter[str]()

    @contextmanager
    def opened(self, key_id: str) -> Iterator[None]:
        """Count a stream until the block ends. Raises Problem (429)."""
        if self._open[key_id] >= STREAMS_PER_KEY:
            detail = f"the key has {STREAMS_PER_KEY} streams at this process"
            raise Problem(429, "too-many-streams", detail, headers={"Retry-After": "5"})
        self._open[key_id] += 1
        try:
            yield
        finally:
            self._open[key_id] -= 1
            if not self._open[key_id]:
                del self._open[key_id]


class _Polled(NamedTuple):
    rows: list[TailRow]
    has_more: bool
    position: Position
    high: int


class ChangeFeed:
    """For one event loop. `connect` opens a connection whose statements together may take so many seconds."""

    def __init__(
        self, open_connection: Callable[[], Connection], bounded: Callable[[Connection, float], AbstractContextManager[None]]
    ) -> None:
        self._open_connection, self._bounded = open_connection, bounded
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="evalstore-changes")
        self._conn: Connection | None = None
        self._tail: OutboxTail | None = None
        self._task: asyncio.Task[None] | None = None
        self._started: asyncio.Future[None] | None = None
        self._waiters: dict[str, set[asyncio.Event]] = {}
        self._by_eval: dict[str, set[Subscription]] = {}
        self._by_run: dict[str, set[Subscription]] = {}
        self._of_all: set[Subscription] = set()
        self._position, self._high = Position(1, 0, 0.0), 0
        self.waiting = self.streams = 0
        self.is_stopping = False

    @property
    def position(self) -> Position:
        """The position at which a client resumes if it has all changes until now."""
        return self._position

    @contextmanager
    def wait(self, eval_id: str) -> Iterator[asyncio.Event]:
        """Give an event that is set at each later change of an evaluation. Call `ready` first."""
        event = asyncio.Event()
        self.waiting += 1
        _add(self._waiters, eval_id, event)
        try:
            yield event
        finally:
            self.waiting -= 1
            _remove(self._waiters, eval_id, event)

    @contextmanager
    def subscribe(self, chosen: ChangeFilter, after: Position | None) -> Iterator[Subscription]:
        """Give the later changes that match, without those up to `after`. Call `ready` first."""
        made = Subscription(chosen, self._position, self._high, (after.row_id, after.offset) if after else (0, 0))
        self.streams += 1
        places: tuple[dict[str, set[Subscription]], str] | None = None
        if chosen.eval_id is not None:
            places = self._by_eval, chosen.eval_id
        elif chosen.run_id is not None:
            places = self._by_run, chosen.run_id
        if places:
            _add(*places, made)
        else:
            self._of_all.add(made)
        try:
            yield made
        finally:
            self.streams -= 1
            self._of_all.discard(made)
            if places:
                _remove(*places, made)

    async def ready(self) -> None:
        """Return when the reader works, so that no change after this call is missed. Raises DatabaseOutage (retry)."""
        if self._task is None or self._task.done():
            self._started = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._run(self._started))
        if self._started is not None:
            await asyncio.shield(self._started)

    async def _run(self, started: asyncio.Future[None]) -> None:
        """Read until nobody has waited for _IDLE_S. At any other end, all who wait begin again."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._start)
        except Exception as error:  # noqa: BLE001 - each client that waits for the start raises it
            started.set_exception(error)
            started.exception()  # The client may have gone.
            return
        started.set_result(None)
        try:
            await self._read()
        except ChangesLost:
            log.warning("changes_lost")
            self._restart_all()
        except Exception as error:  # noqa: BLE001 - clients must not wait for a reader that has ended
            problems.of(error)  # It logs the error. The next client starts another reader.
            self._restart_all()

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        is_failing, last_used = False, loop.time()
        while True:
            if self.waiting or self.streams:
                last_used = loop.time()
            elif loop.time() - last_used > _IDLE_S:
                return  # Nothing is awaited between this check and the end, so no client can come in between.
            try:
                polled = await loop.run_in_executor(self._thread, self._poll)
            except Outage as error:
                if not is_failing:
                    log.warning("changes_unreadable", error=error)
                is_failing = True
                await asyncio.sleep(_RETRY_S)
                continue
            is_failing = False
            self._position, self._high = polled.position, polled.high
            for row in polled.rows:
                for change in changes_of(row, polled.position.at):
                    self._dispatch(change)
            await asyncio.sleep(0 if polled.has_more else POLL_S)

    def _dispatch(self, change: Change) -> None:
        line = change.line
        if line.eval_id is not None:
            for event in self._waiters.get(line.eval_id, ()):
                event.set()
            for subscription in self._by_eval.get(line.eval_id, ()):
                subscription.offer(change)
        if line.run_id is not None:
            for subscription in self._by_run.get(line.run_id, ()):
                subscription.offer(change)
        for subscription in self._of_all:
            subscription.offer(change)

    def _restart_all(self) -> None:
        """Wake all who wait, and end all streams: the clients begin again."""
        for events in self._waiters.values():
            for event in events:
                event.set()
        for subscription in (
            *self._of_all,
            *(each for sets in (self._by_eval, self._by_run) for one in sets.values() for each in one),
        ):
            subscription.cut()

    def stop(self) -> None:
        """Answer all who wait, and end all streams, because the process ends. Clients go on at another process."""
        self.is_stopping = True
        self._restart_all()

    async def close(self) -> None:
        """End the reader."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Outage):
                await self._task
        self._thread.submit(self._disconnect)
        self._thread.shutdown(wait=True)

    def _start(self) -> None:
        """Begin at the newest row. An idle connection may have broken unnoticed: then retry once on a new one."""
        was_open = self._conn is not None
        tail = OutboxTail()
        try:
            self._with_connection(tail.start)
        except DatabaseOutage:
            if not was_open:
                raise
            self._with_connection(tail.start)
        self._tail, self._position, self._high = tail, tail.position, tail.high

    def _poll(self) -> _Polled:
        tail = self._tail or OutboxTail()
        rows, has_more = self._with_connection(tail.poll)
        return _Polled(rows, has_more, tail.position, tail.high)

    def _with_connection(self, work: Callable[[Connection], Any]) -> Any:
        try:
            if self._conn is None:
                self._conn = self._open_connection()
            with self._bounded(self._conn, _QUERY_S):
                return work(self._conn)
        except DatabaseOutage:
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        if self._conn is not None:
            self._conn.invalidate()
            self._conn.close()
            self._conn = None


def _add(places: dict[str, set[Any]], key: str, value: object) -> None:
    places.setdefault(key, set()).add(value)


def _remove(places: dict[str, set[Any]], key: str, value: object) -> None:
    places[key].discard(value)
    if not places[key]:
        del places[key]


def read_missed(conn: Connection, missing: Subscription, after: Position) -> tuple[list[Change], Position | None]:
    """Return the next changes between `after` and the start of a subscription, and where to go on; None: there are no more.

    Raises DatabaseOutage (retry).
    """
    chosen, settled = missing.filter, missing.start.row_id
    rows = outbox_tail.missed(conn, after.row_id, missing.high, chosen.needle)
    found = [
        change
        for row_id, body in rows
        for change in changes_of(TailRow(row_id, body, settled if settled < row_id else None), after.at)
        if (change.row_id, change.number) > missing.after and chosen.matches(change.line)
    ]
    return found, Position(rows[-1][0] + 1, 0, after.at) if rows else None
