"""Publish confirmations of commits: to the Redis stream, and to a pub/sub channel for each type."""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import redis
from sqlalchemy import Connection

from evalstore.storage import outbox
from evalstore.storage.outbox import Commit, Relayed, StreamId
from evalstore.telemetry.counters import Counters
from models.errors import RedisOutage
from tasks.keys import Names
from worker.scripts import Scripts

KEEP_S: Final = 24 * 3600
_TRACEPARENT_LENGTH: Final = 55
# The limit of one script call, which blocks Redis for about 5 ms.
_BYTES: Final = 256 * 1024


def relay(
    conn: Connection, names: Names, scripts: Scripts, counters: Counters, *, go_on: Callable[[], bool] = lambda: True
) -> int:
    """Publish pending confirmations, until `go_on` returns False. Return their number.

    Raises DatabaseOutage, RedisOutage (retry: some may be published again).
    """

    def publish(known: StreamId, commits: Sequence[Commit]) -> Relayed:
        try:
            for lines, traces in _parts(commits):
                ms, seq, done = scripts.run("confirm", [names.stream], *known, KEEP_S * 1000, lines, traces, names.prefix)
                known = StreamId(ms, seq)
                if not done:
                    return Relayed(known, done=False)
        except redis.RedisError as error:
            raise RedisOutage(str(error)) from error
        counters.add("evalstore_confirmations_relayed_total", by=sum(commit.number for commit in commits))
        return Relayed(known, done=True)

    return outbox.relay(conn, publish, go_on=go_on)


def _parts(commits: Sequence[Commit]) -> Iterator[tuple[str, str]]:
    """Yield the arguments of script calls: lines of confirmations, and their `traceparent`s in one text.

    Each `traceparent` takes 55 characters, or 55 spaces for none. The text is empty if no line has a trace. There is at least
    one part, which may be empty.
    """
    lines, traces = "\n".join(commit.body for commit in commits), list[str]()
    if any(commit.traceparents for commit in commits):
        for commit in commits:
            traces += commit.traceparents.split("\n") if commit.traceparents else [""] * commit.number
    start = 0
    while len(lines) - start > _BYTES:
        end = lines.rfind("\n", start, start + _BYTES)
        end = lines.find("\n", start + _BYTES) if end < 0 else end
        if end < 0:
            break
        here = lines.count("\n", start, end) + 1
        yield lines[start:end], _joined(traces[:here])
        start, traces = end + 1, traces[here:]
    yield lines[start:], _joined(traces)


def _joined(traceparents: Sequence[str]) -> str:
    return "".join([one or " " * _TRACEPARENT_LENGTH for one in traceparents]) if any(traceparents) else ""
