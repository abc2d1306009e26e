"""Gather steps into batches: by number, size and age. A batch that was begun before is made again as it was."""

import time
from bisect import bisect_right
from typing import Any

from sqlalchemy import Connection

from evalstore.sinks.options import Options
from evalstore.sinks.source import Source, Step, from_json
from evalstore.storage.sink_cursors import Cursor


class Batches:
    """For one thread. `source.lease.limit` is the end of a batch that was begun, and the first batch ends there."""

    def __init__(self, source: Source, options: Options) -> None:
        self._source, self._options = source, options
        limit = from_json(source.lease.limit, source.lease.cursor)
        self._limit = limit if limit != source.lease.cursor else None
        self._ahead: list[Step] = []
        self._since = 0.0
        self._counted = self._bytes = 0  # how many of the steps ahead are counted, and their bytes

    @property
    def repeats(self) -> bool:
        """Whether the next batch was begun before, and may be in the sink already."""
        return self._limit is not None

    def take(self, conn: Connection) -> list[Step]:
        """Return the next batch, or nothing as long as it is not complete. Raises LeaseLost, DatabaseOutage (retry)."""
        wanted = self._options.batch_events - (0 if self._limit else len(self._ahead))
        found = self._source.take(conn, wanted) if wanted > 0 else []
        if found and not self._ahead:
            self._since = time.monotonic()
        self._ahead += found
        end = self._repeated_end(self._limit) if self._limit else self._end()
        batch, self._ahead = self._ahead[:end], self._ahead[end:]
        if batch:
            self._limit, self._since, self._counted, self._bytes = None, time.monotonic(), 0, 0
        return batch

    def _repeated_end(self, limit: Cursor) -> int:
        """The number of steps up to the limit, 0 where the step at the limit was not read yet."""
        last = _order(limit)
        if not self._ahead or _order(self._ahead[-1].cursor) < last:
            return 0
        return max(1, bisect_right(self._ahead, last, key=lambda step: _order(step.cursor)))

    def _end(self) -> int:
        options, steps = self._options, self._ahead
        if options.batch_bytes is not None:
            while self._counted < len(steps):
                event = steps[self._counted].event
                self._bytes += len(event.json) if event else 0
                if self._bytes > options.batch_bytes:
                    return max(1, self._counted)
                self._counted += 1
        is_due = len(steps) >= options.batch_events or time.monotonic() >= self._since + options.batch_s
        return min(len(steps), options.batch_events) if is_due else 0


def _order(cursor: Cursor) -> tuple[int, Any]:
    """The order of cursors of one generation: those of a replay come before those in the outbox."""
    return (0, cursor.replay_at) if cursor.replay_at else (1, (cursor.place.id, cursor.place.offset))
