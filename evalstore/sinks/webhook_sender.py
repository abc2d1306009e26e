"""Send persisted deliveries: a thread with an event loop, which waits for many receivers at once."""

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple, TypeVar
from uuid import UUID

from sqlalchemy import Connection, Engine

from evalstore.sinks.webhook_request import Requests, Resolve, resolver
from evalstore.storage import webhook_deliveries
from evalstore.storage.database import Watch
from evalstore.storage.webhook_deliveries import Claimed, Retries, Settled
from models import webhooks
from models.errors import Outage
from models.logs import EventLogger
from models.webhooks import signed_headers

log = EventLogger("evalstore.sinks")

_T = TypeVar("_T")
_POLL_S: Final = 0.5
_OUTAGE_S: Final = 1.0
_DATABASE_S: Final = 30.0
_PRUNE_S: Final = 60.0
# A request ends this much before another process may send its delivery again.
_LEASE_MARGIN_S: Final = 10.0
_RESOLVERS: Final = 64
_CLOSE_S: Final = 4.0
_GONE: Final = 410


class Limits(NamedTuple):
    """`concurrency`: the most requests to one subscription at once; `connections`: to all."""

    concurrency: int = 8
    connections: int = 1000
    history_s: float = 7 * 86_400


class Sender(threading.Thread):
    """Sends what is due until `close`. A subscription has one request at a time until its receiver takes some.

    `clock` tells the time of retries and signatures. `resolve` finds the addresses of a name.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        requests: Callable[[Resolve], Requests],
        retries: Retries,
        limits: Limits,
        clock: Callable[[], datetime] = webhooks.now,
        resolve: Resolve | None = None,
    ) -> None:
        super().__init__(name=f"webhooks {name}", daemon=True)
        self._sink, self._engine = name, engine
        self._retries, self._limits, self._clock = retries, limits, clock
        self._database = ThreadPoolExecutor(1, thread_name_prefix="webhooks-database")
        self._resolvers = ThreadPoolExecutor(_RESOLVERS, thread_name_prefix="webhooks-resolve")
        self._requests = requests(resolve or resolver(self._resolvers))
        self._watch = Watch()
        self._loop = asyncio.new_event_loop()
        self._wakeup, self._stopping = asyncio.Event(), False
        self._windows = dict[UUID, int]()
        self._in_flight = Counter[UUID]()
        self._tasks = dict[asyncio.Task[None], Claimed]()
        self._outcomes = list[Settled]()
        self._prune_due = 0.0

    def wake(self) -> None:
        """Look at once for what is due. Any thread may call this."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._wakeup.set)

    def close(self) -> None:
        """Break off what is being sent, and let other processes send it."""
        self._stopping = True
        self.wake()
        if self.is_alive():
            self.join(_CLOSE_S)

    def run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._run())
        self._database.shutdown(wait=False)
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        was_away = False
        while not self._stopping:
            try:
                await self._take_turn()
                was_away = False
            except Outage as error:
                if not was_away:
                    log.warning("sink_waits", sink=self._sink, error=error)
                was_away = True
                await asyncio.sleep(_OUTAGE_S)
            except Exception as error:
                # A defect must not end the thread unseen: nothing would be delivered any more.
                log.critical("sink_defect", sink=self._sink, error=error, exc_info=True)
                await asyncio.sleep(_OUTAGE_S)
        await self._give_back()

    async def _take_turn(self) -> None:
        self._wakeup.clear()
        await self._settle()
        claimed = await self._claim()
        for one in claimed:
            task = asyncio.create_task(self._send(one))
            self._tasks[task] = one
            self._in_flight[one.webhook_id] += 1
            task.add_done_callback(self._tasks.pop)
        if not claimed and not self._outcomes:
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await self._wakeup.wait()
        if time.monotonic() > self._prune_due:
            before = self._clock() - timedelta(seconds=self._limits.history_s)
            await self._call(webhook_deliveries.prune, before)
            self._prune_due = time.monotonic() + _PRUNE_S

    async def _claim(self) -> list[Claimed]:
        most = self._limits.connections - len(self._tasks)
        if most <= 0:
            return []
        known = self._windows.keys() | self._in_flight.keys()
        rooms = {one: max(0, self._windows.get(one, 1) - self._in_flight[one]) for one in known}
        lease_s = self._requests.timeout_s + _LEASE_MARGIN_S
        return await self._call(webhook_deliveries.claim, rooms, most, lease_s, self._clock())

    async def _send(self, one: Claimed) -> None:
        at = self._clock()
        secrets = [one.secret, *([one.previous_secret] if one.previous_secret else [])]
        answer = await self._requests.post(one.url, signed_headers(str(one.id), at, one.body, secrets), one.body)
        self._outcomes.append(Settled(one, answer.status_code, answer.error, is_gone=answer.status_code == _GONE))
        self._wakeup.set()

    async def _settle(self) -> None:
        outcomes = self._outcomes[:]
        if not outcomes:
            return
        jitter = random.uniform(0.8, 1.2)  # noqa: S311 - spreads retries
        disabled = await self._call(webhook_deliveries.settle, outcomes, self._retries, jitter, self._clock())
        del self._outcomes[: len(outcomes)]
        for webhook_id in disabled:
            log.error("webhook_disabled", webhook=webhook_id)
        for one in outcomes:
            self._leave(one.claimed.webhook_id, is_taken=one.error is None)

    def _leave(self, webhook_id: UUID, *, is_taken: bool) -> None:
        """Widen the window of a receiver that takes deliveries; begin anew with one that does not."""
        self._in_flight[webhook_id] -= 1
        if not self._in_flight[webhook_id]:
            del self._in_flight[webhook_id]
        window = self._windows.pop(webhook_id, 1)
        if is_taken:
            self._windows[webhook_id] = min(window + 1, self._limits.concurrency)

    async def _give_back(self) -> None:
        tasks = dict(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(Outage):
            await self._settle()
            settled = {one.claimed.id for one in self._outcomes}
            taken = [one for one in tasks.values() if one.id not in settled]
            await self._call(webhook_deliveries.unclaim, taken, self._clock())

    async def _call(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """Call `work` with a connection, in the thread for the database."""

        def call() -> _T:
            with self._engine.connect() as conn:
                return self._bounded(conn, work, *arguments)

        return await asyncio.get_running_loop().run_in_executor(self._database, call)

    def _bounded(self, conn: Connection, work: Callable[..., _T], *arguments: Any) -> _T:
        with self._watch.bounded(conn, _DATABASE_S):
            return work(conn, *arguments)
