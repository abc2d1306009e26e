"""The metrics of a worker process: a few additions for each batch, none for each event."""

import re
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from evalstore import hooks
from evalstore.storage.event_store import Stored
from evalstore.telemetry.counters import Counters, Schema, counted_by
from models.jobs import JOBS
from models.metrics import QUEUES, TYPES
from models.record import EventRow
from worker.batches import Delivery

LAYOUT: Final = Schema(counted_by("worker"), {"job_name": [job.name for job in JOBS], "hook": hooks.names()})
# A thread without progress for this time is stuck. A longer wait for a server sets its own deadline.
LOOP_S: Final = 20.0
WORK_S: Final = 25.0
_HEARD_FOR_S: Final = 30.0
_SAMPLE: Final = 32
_LATENCY: Final = "evalstore_event_latency_seconds"
_RATE_OVER_S: Final = 10.0
_SENT: Final = re.compile(rb'"message_timestamp":\s*(\d{1,16})')


class WorkerMetrics:
    """The counters of one process. Thread-safe."""

    def __init__(self) -> None:
        self.counters = Counters(LAYOUT)
        self.outages = Outages(self.counters)
        self._events = Counter[str]()
        self._marks = deque([(time.monotonic(), 0)])

    def stored(self, events: Sequence[tuple[Delivery, EventRow]], stored: Stored) -> None:
        """Count a committed batch, right after the commit."""
        outcomes = stored.outcomes
        now, types = datetime.now(UTC), [event.type for _, event in events]
        applied: Sequence[int]
        if outcomes.count("applied") == len(outcomes):  # The usual case, and faster.
            applied = range(len(outcomes))
            self._count({("applied", type_): count for type_, count in Counter(types).items()})
        else:
            applied = [at for at, outcome in enumerate(outcomes) if outcome == "applied"]
            self._count(Counter(zip(outcomes, types, strict=True)))
        if stored.conflicting_results:
            self.counters.add("evalstore_conflicting_results_total", by=stored.conflicting_results)
        for reason, count in stored.rebuilt.items():
            self.counters.add("evalstore_merge_states_rebuilt_total", reason, by=count)
        if not applied:
            return
        size = min(len(applied), _SAMPLE)
        sample = [events[applied[number * len(applied) // size]] for number in range(size)]
        ages = [max(0.0, (now - event.occurred_at).total_seconds()) for _, event in sample]
        ends = [_SENT.search(delivery.body, max(0, len(delivery.body) - 200)) for delivery, _ in sample]
        sent = [max(0.0, now.timestamp() - int(end[1]) / 1000) for end in ends if end]
        self.counters.observe_all(_LATENCY, "occurred", values=ages, times=len(applied) / size)
        self.counters.observe_all(_LATENCY, "sent", values=sent, times=len(applied) / size)

    def retried(self, queue: str, count: int = 1) -> None:
        """Count retries of messages or of a batch."""
        self.counters.add("evalstore_retries_total", _queue(queue), by=count)

    def redelivered(self, queue: str, reason: str, count: int) -> None:
        """Count requeued messages."""
        self.counters.add("evalstore_redeliveries_total", _queue(queue), reason, by=count)

    def lost(self, count: int) -> None:
        """Count evaluations marked as lost."""
        self._count({("applied", "evaluation:lost"): count})

    def archived(self, moved: int, size: int, failed: int) -> None:
        """Count contents that moved to the archive, their bytes, and failed moves."""
        self.counters.add("evalstore_archived_contents_total", "archived", by=moved)
        self.counters.add("evalstore_archived_contents_total", "failed", by=failed)
        self.counters.add("evalstore_archived_bytes_total", by=size)

    def buried(self, bodies: Iterable[bytes | None]) -> None:
        """Count dead letters."""
        self._count(Counter(("dead", _type_of(body)) for body in bodies))

    def _count(self, events: Mapping[tuple[str, str], int]) -> None:
        for (outcome, type_), count in events.items():
            if outcome != "reused":  # counted as a dead letter
                self.counters.add("evalstore_events_total", outcome, type_, by=count)
                self._events[outcome] += count

    def status(self) -> dict[str, Any]:
        """Return the outcomes since the start, the events per second, the outages, and the breaker, for `evalstore status`."""
        now, total = time.monotonic(), self._events.total()
        while len(self._marks) > 1 and self._marks[1][0] < now - _RATE_OVER_S:
            self._marks.popleft()
        then, before = self._marks[0]
        self._marks.append((now, total))
        rate = (total - before) / max(now - then, 1.0)
        is_open = bool(self.counters.get("evalstore_breaker_open"))
        return {**self._events, "events_per_s": round(rate, 1), "away": self.outages.update(), "breaker_open": is_open}


def _queue(name: str) -> str:
    """Return the label of a queue; `other` for queues of a user's own actors."""
    return name if name in QUEUES else "other"


class Named(msgspec.Struct):
    """The identity of an event, read from a message that may be invalid otherwise."""

    type: Any = None
    eval_id: Any = None
    event_id: Any = None


class _Sent(msgspec.Struct):
    args: tuple[Named]


_DECODER: Final = msgspec.json.Decoder(_Sent)


def named(body: bytes | None) -> Named:
    """Return the identity of the event in a message, as far as it can be read."""
    try:
        return _DECODER.decode(body or b"").args[0]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Named()


def _type_of(body: bytes | None) -> str:
    found = named(body).type
    return found if isinstance(found, str) and found in TYPES else "unknown"


class Outages:
    """The outages of servers that threads of this process wait for."""

    def __init__(self, ledger: Counters, *, heard_for_s: float = _HEARD_FOR_S) -> None:
        self._ledger = ledger
        self._heard_for_s, self._heard = heard_for_s, 0.0
        self._lock = threading.Lock()
        self._away: dict[str, set[str]] = {"postgresql": set(), "redis": set(), "objects": set()}
        self._counted = dict.fromkeys(self._away, 0.0)

    def away(self, server: str, who: str) -> None:
        """Record that `who` waits for a server."""
        with self._lock:
            self._count(server)
            self._away[server].add(who)
            self._heard = time.monotonic() if server == "objects" else self._heard
            self._ledger.set("evalstore_outage", server, to=1)

    def back(self, server: str, who: str) -> None:
        """Record that `who` does not wait for a server."""
        if who in self._away[server]:
            with self._lock:
                self._count(server)
                self._away[server].discard(who)
                self._ledger.set("evalstore_outage", server, to=bool(self._away[server]))

    def update(self) -> list[str]:
        """Add the time since the last call, and return the servers with an outage."""
        with self._lock:
            for server in self._away:
                self._count(server)
            # Assume the end after a silence: waiting events are delayed in Redis, and another process may get them.
            if self._away["objects"] and time.monotonic() - self._heard > self._heard_for_s:
                self._away["objects"].clear()
                self._ledger.set("evalstore_outage", "objects", to=0)
            return [server for server, waiting in self._away.items() if waiting]

    def _count(self, server: str) -> None:
        now = time.monotonic()
        if self._away[server]:
            self._ledger.add("evalstore_outage_seconds_total", server, by=now - self._counted[server])
        self._counted[server] = now
