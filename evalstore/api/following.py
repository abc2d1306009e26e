"""`?wait=` and the streams of changes: what their clients get, for as long as they may see it."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import msgspec
from fastapi.sse import format_sse_event
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from evalstore.api.access import Caller
from evalstore.api.change_feed import Change, ChangeFilter, Subscription, encode, read_missed
from evalstore.api.problems import Problem, invalid, unavailable
from evalstore.api.record_cache import Rendered
from evalstore.api.service import Service
from evalstore.storage import outbox_tail
from evalstore.storage.outbox_tail import Position
from evalstore.storage.visibility import visible
from models.errors import Fault, Outage

HEARTBEAT_S: Final = 15.0
_BATCH: Final = 500
_ID: Final = re.compile(r"(\d{1,18})-(\d{1,9})-(\d{1,12})", re.ASCII)
_UNFINISHED: Final = frozenset({"queued", "running"})


def is_visible(caller: Caller, record: Rendered) -> bool:
    """Tell whether the caller may see a record."""
    if not caller.visibility.is_restricted:
        return True
    head = record.head
    return caller.visibility.allows(head.submitter, head.run_id)


async def can_see(service: Service, caller: Caller, eval_id: str) -> bool:
    """Tell whether an evaluation exists for a restricted caller. True for another caller. Raises Outage, Problem (503)."""
    if not caller.visibility.is_restricted:
        return True
    return bool(await service.run(lambda conn: visible(conn, [eval_id], caller.visibility)))


def is_finished(record: Rendered) -> bool:
    """Tell whether a record has a result, or was given up."""
    return record.head.status not in _UNFINISHED


async def until(
    request: Request, service: Service, eval_id: str, is_done: Callable[[Rendered | None], bool], wait_s: float
) -> Rendered | None:
    """Return the record as soon as `is_done`, or as it is after `wait_s`. An evaluation may be created meanwhile.

    Ends early if the process stops. Raises Outage, Problem (503).
    """
    loop = asyncio.get_running_loop()
    began, feed = loop.time(), service.feed
    await feed.ready()
    with feed.wait(eval_id) as changed, _disconnect_sets(request, changed) as gone:
        try:
            while True:
                changed.clear()
                record = await service.records.get(eval_id)
                if is_done(record) or loop.time() >= began + wait_s or gone():
                    return record
                if feed.is_stopping:
                    if record is None:
                        raise unavailable("the service stops")
                    return record
                try:
                    async with asyncio.timeout_at(began + wait_s):
                        await changed.wait()
                except TimeoutError:
                    continue  # Read once more: the reader of changes may be late.
                await feed.ready()
        finally:
            request.state.waited_s = loop.time() - began


@contextmanager
def _disconnect_sets(request: Request, event: asyncio.Event) -> Iterator[Callable[[], bool]]:
    """Set an event when the client disconnects. Gives a function that tells whether it has."""

    async def listen() -> None:
        with contextlib.suppress(Problem):  # a body that arrives too slowly
            while (await request.receive())["type"] != "http.disconnect":
                pass
        event.set()

    task = asyncio.create_task(listen())
    try:
        yield task.done
    finally:
        task.cancel()


def parse_id(last_event_id: str | None) -> Position | None:
    """Return the place that a Last-Event-ID names, or None without one. Raises Problem (422)."""
    if not last_event_id:
        return None
    match = _ID.fullmatch(last_event_id)
    if match is None:
        raise invalid([Fault("Last-Event-ID", "expected the id of an event of this stream")])
    return Position(int(match[1]), int(match[2]), float(match[3]))


class EventStream(Response):
    """The answer of a stream: server-sent events until the client goes, the key is revoked or the process stops.

    https://html.spec.whatwg.org/multipage/server-sent-events.html
    """

    def __init__(
        self, service: Service, request: Request, caller: Caller, chosen: ChangeFilter, after: Position | None
    ) -> None:
        super().__init__(media_type="text/event-stream")
        self._service, self._request, self._caller = service, request, caller
        self._filter, self._after = chosen, after
        self._was_visible = False
        # Without a length the answer is sent in chunks. nginx would otherwise collect them.
        self.raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - Starlette's signature
        loop, feed = asyncio.get_running_loop(), self._service.feed
        with self._service.streams.opened(self._caller.key_id):
            await feed.ready()
            began = loop.time()
            with (
                feed.subscribe(self._filter, self._after) as subscription,
                _disconnect_sets(self._request, subscription.changed) as gone,
            ):
                first = await self._first(subscription)
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    await _send(send, first)
                    with contextlib.suppress(Outage, Problem):  # The client resumes.
                        async for pieces in self._pieces(subscription, gone):
                            await _send(send, pieces)
                    await send({"type": "http.response.body", "body": b""})
                finally:
                    self._request.state.waited_s = loop.time() - began

    async def _first(self, subscription: Subscription) -> bytes:
        """Return what the client gets at once: a place to resume at, or a snapshot if its place is gone."""
        service, after = self._service, self._after
        if self._filter.eval_id is not None and self._caller.visibility.is_restricted:
            record = await service.records.get(self._filter.eval_id)
            self._was_visible = record is not None and is_visible(self._caller, record)
        if after is None:
            return format_sse_event(comment="connected", id=encode(subscription.start))
        if await service.run(lambda conn: outbox_tail.can_resume(conn, after)):
            return b": connected\n\n"
        self._after, subscription.after = None, (0, 0)
        found = None if self._filter.eval_id is None else await self._snapshot(self._filter.eval_id)
        data = msgspec.json.encode({"type": "snapshot", "evaluations": found}).decode()
        return format_sse_event(data_str=data, event="snapshot", id=encode(subscription.start))

    async def _snapshot(self, eval_id: str) -> list[dict[str, Any]]:
        record = await self._service.records.get(eval_id)
        if record is None or not is_visible(self._caller, record):
            return []
        head = record.head
        return [{"eval_id": head.eval_id, "version": head.version, "status": head.status, "run_id": head.run_id}]

    async def _pieces(self, subscription: Subscription, gone: Callable[[], bool]) -> AsyncIterator[bytes]:
        """Yield what the client missed, then changes as they come, and heartbeats.

        Raises Outage, and Problem if the key is not valid any more.
        """
        service, feed, position = self._service, self._service.feed, self._after
        while position is not None and position.row_id <= subscription.high:
            found, position = await service.run(partial(read_missed, missing=subscription, after=position))
            yield await self._visible(found)
        while not gone() and not feed.is_stopping:
            subscription.changed.clear()
            if not subscription.unsent and not subscription.is_cut:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(HEARTBEAT_S):
                        await subscription.changed.wait()
            self._caller = await service.access.authorize_again(self._request, "read")
            position = feed.position
            batch = [subscription.unsent.popleft() for _ in range(min(_BATCH, len(subscription.unsent)))]
            if batch:
                yield await self._visible(batch)
            elif subscription.is_cut:
                return
            elif not gone():
                yield format_sse_event(comment="heartbeat", id=encode(position))

    async def _visible(self, changes: Sequence[Change]) -> bytes:
        """Return the messages of those changes that the caller may see now. Raises Outage."""
        restriction = self._caller.visibility
        if not restriction.is_restricted:
            return b"".join(change.message for change in changes)
        may_see: dict[str, bool] = {}
        if restriction.submitter is not None:
            eval_ids = {change.line.eval_id for change in changes if change.line.eval_id is not None}
            records = await asyncio.gather(*map(self._service.records.get, eval_ids))
            may_see = {
                eval_id: record is not None and is_visible(self._caller, record)
                for eval_id, record in zip(eval_ids, records, strict=True)
            }
        return b"".join(change.message for change in changes if self._may_see(change, may_see))

    def _may_see(self, change: Change, may_see: dict[str, bool]) -> bool:
        line, restriction = change.line, self._caller.visibility
        if line.type == "storage:evaluation:erased" and line.eval_id == self._filter.eval_id and self._was_visible:
            return True  # Nothing is left that tells the submitter.
        if restriction.submitter is not None:
            is_seen = may_see.get(line.eval_id or "", False)
        else:
            is_seen = restriction.allows(None, line.run_id)
        self._was_visible = is_seen
        return is_seen


async def _send(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})
