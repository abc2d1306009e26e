"""A sink at work in this process: a thread with a cursor, a connection and a backoff of its own."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Final, TypeVar

import msgspec
from sqlalchemy import Connection, Engine

from evalstore.sinks import source
from evalstore.sinks.batches import Batches
from evalstore.sinks.config import SinkConfig
from evalstore.sinks.delivery import Delivery, SinkUnavailable, letter, queue_of
from evalstore.sinks.leased_worker import BACKOFF_S, LeasedWorker, Turns
from evalstore.sinks.protocol import FillsFromLog, KeepsCursor, RepeatsBatches, Sink, SinkEvent
from evalstore.sinks.source import Source, Step
from evalstore.storage import dead_letters, redrives, sink_cursors, sink_ranges
from evalstore.storage.operator_actions import Intent
from evalstore.storage.redrives import SinkLetter
from evalstore.storage.sink_cursors import Cursor, Lease, LeaseLost
from evalstore.storage.sink_ranges import Range
from models.confirmations import ERASED
from models.logs import EventLogger

log = EventLogger("evalstore.sinks")

_T = TypeVar("_T")
_POLL_S: Final = (0.02, 0.2)
_LETTERS_S: Final = 1.0
_LETTERS: Final = 100
_GAP_SHOWN_S: Final = 5.0
_FIRST: Final = datetime(2000, 1, 1, tzinfo=UTC)  # before the first event of any installation


class SinkWorker(LeasedWorker):
    """Works on a range of a sink."""

    def __init__(self, config: SinkConfig, range_: Range, engine: Engine, owner: str, stopping: threading.Event) -> None:
        super().__init__(config.name, range_.name, config.options.timeout_s, engine, owner, stopping)
        self.config, self.range = config, range_

    def create(self, conn: Connection) -> bool:
        """Make sure that the range has a cursor. Return False while a process works on another number of ranges."""
        if not self.database(conn, sink_ranges.repartition, self.range.sink, self.range.total):
            return False
        self.database(conn, sink_cursors.create, self.range.name, self.config.options.type)
        return True

    def open_turns(self, conn: Connection, lease: Lease) -> Turns:
        """Return the work under a lease."""
        return _Turns(self, conn, lease)


class _Turns:
    """The work under one lease."""

    def __init__(self, worker: SinkWorker, conn: Connection, lease: Lease) -> None:
        self._worker, self._conn, self._lease = worker, conn, lease
        self._config = worker.config
        self._sink: Sink | None = None
        self._delivery: Delivery | None = None
        self._source = Source(lease)
        self._batches = Batches(self._source, self._config.options)
        self._steps: list[Step] = []
        self._may_repeat = False
        self._cursor = lease.cursor
        self._poll_s, self._backoff_s = _POLL_S[0], BACKOFF_S[0]
        self._failing = False
        self._letters_due = self._gap_due = 0.0

    def take_one(self) -> None:
        """Give the next steps to the sink, or wait for some. Raises LeaseLost, DatabaseOutage."""
        try:
            delivery = self._delivery or self._open()
            self._redrive(delivery)
            if not self._steps:
                self._take()
            if self._steps:
                self._deliver(delivery)
            else:
                self._wait()
        except SinkUnavailable as error:
            self._back_off(error)

    def _open(self) -> Delivery:
        """Make the sink, and begin where it says it is, if it keeps that itself."""
        self._sink = self._call(lambda: self._config.create(self._worker.range.name))
        if isinstance(self._sink, KeepsCursor):
            document = self._call(self._sink.cursor)
            if document is None and isinstance(self._sink, FillsFromLog):
                self._fill_from_log()
            cursor = source.from_json(document, self._lease.cursor)
            self._lease = self._lease._replace(cursor=cursor)
            self._source, self._cursor = Source(self._lease), cursor
            self._batches = Batches(self._source, self._config.options)
        if isinstance(self._sink, RepeatsBatches):
            resume, state = self._sink.resume, self._lease.state
            self._lease = self._lease._replace(state=self._call(lambda: resume(state)))
            self._worker.database(self._conn, sink_cursors.keep_state, self._lease)
        self._delivery = Delivery(self._config.name, self._sink, self._worker.range.name)
        return self._delivery

    def _fill_from_log(self) -> None:
        """Have the log replayed from its beginning, unless a replay is under way. Raises LeaseLost, DatabaseOutage."""
        if self._lease.cursor.replay_until is None:
            intent = Intent("rewind", "evalstore", "the sink is empty", {"sink": self._lease.name})
            self._worker.database(self._conn, sink_cursors.rewind, self._lease.name, _FIRST, intent)
            raise LeaseLost(f"sink {self._lease.name}: it is empty, and begins with the whole log")

    def _take(self) -> None:
        """Take the next batch, and store where it ends before a sink that needs it to be repeated gets it."""
        repeats = self._batches.repeats
        steps = self._worker.database(self._conn, self._batches.take)
        if steps and isinstance(self._sink, RepeatsBatches):
            self._may_repeat = repeats or self._is_replayed(steps)
            self._worker.database(self._conn, sink_cursors.begin_batch, self._lease, source.to_json(steps[-1].cursor))
        self._steps = steps

    def _is_replayed(self, steps: list[Step]) -> bool:
        """Whether an event was stored before the end of a replay, which passes on events again."""
        until = self._lease.replayed_until
        times = (step.event.fields["recorded_at"] for step in steps if step.event)
        return until is not None and any(datetime.fromisoformat(at) <= until for at in times)

    def _call(self, work: Callable[[], _T]) -> _T:
        """Call the sink. Whatever it raises here is no event's fault."""
        try:
            with self._timed():
                return work()
        except SinkUnavailable:
            raise
        except Exception as error:
            raise SinkUnavailable(f"{type(error).__name__}: {error}") from error

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Note since when the sink is at work."""
        self._worker.called_at = time.monotonic()
        try:
            yield
        finally:
            self._worker.called_at = None

    def _deliver(self, delivery: Delivery) -> None:
        steps = self._steps
        try:
            self._call(lambda: delivery.run(steps, may_repeat=self._may_repeat))
        finally:
            # Part of a batch is not confirmed to a sink that knows whole batches.
            if delivery.done == len(steps) or (delivery.done and not isinstance(self._sink, RepeatsBatches)):
                self._confirm(delivery, steps[: delivery.done])
        self._poll_s, self._backoff_s = _POLL_S[0], BACKOFF_S[0]
        if self._failing:
            self._failing = False
            log.info("sink_back", sink=self._config.name)
        if len(steps) < self._config.options.batch_events:
            self._worker.wait(_POLL_S[0])  # for more to come together

    def _confirm(self, delivery: Delivery, done: list[Step]) -> None:
        letters = delivery.letters()
        delivered = sum(step.event is not None for step in done) - len(letters)
        self._worker.database(self._conn, sink_cursors.advance, self._lease, done[-1].cursor, delivered, letters)
        self._steps, self._cursor = self._steps[len(done) :], done[-1].cursor
        if letters:
            error = f"{letters[-1].error_class}: {letters[-1].error_message}"
            log.warning("sink_refused", sink=self._config.name, events=len(letters), error=error)

    def _wait(self) -> None:
        if self._source.gap_age_s > _GAP_SHOWN_S and time.monotonic() > self._gap_due:
            self._worker.database(self._conn, sink_cursors.note_gap, self._lease, self._source.gap_age_s)
            self._gap_due = time.monotonic() + _GAP_SHOWN_S
        self._worker.wait(self._poll_s)
        self._poll_s = min(self._poll_s * 1.5, _POLL_S[1])

    def _back_off(self, error: SinkUnavailable) -> None:
        """Raises LeaseLost where an operator paused or moved the sink meanwhile."""
        if not self._failing:
            log.warning("sink_away", sink=self._config.name, error=error)
        self._failing = True
        if isinstance(self._sink, RepeatsBatches):
            self.close()
            self._sink = self._delivery = None
            self._may_repeat = True
        self._worker.database(self._conn, sink_cursors.note_failure, self._lease, str(error))
        self._worker.wait(self._backoff_s)
        self._backoff_s = min(2 * self._backoff_s, BACKOFF_S[1])
        self._worker.database(self._conn, sink_cursors.check, self._lease)

    def _redrive(self, delivery: Delivery) -> None:
        """Give letters again that an operator redrives, each by itself."""
        if time.monotonic() < self._letters_due or self._worker.range.number:  # one range redrives for all
            return
        found = self._worker.database(self._conn, redrives.to_sink, queue_of(self._config.name), _LETTERS)
        for one in found:
            step = _step_of(one, self._cursor)
            try:
                with self._timed():
                    delivery.call([step], one.id)
            except SinkUnavailable:
                raise
            except Exception as error:  # noqa: BLE001 - as at the first time
                again = letter(
                    one.id, self._config.name, error, eval_id=one.eval_id, event_id=one.event_id, message=one.message
                )
                self._worker.database(self._conn, dead_letters.write, [again])
            else:
                self._worker.database(self._conn, redrives.stored, [one.id])
        self._letters_due = 0.0 if len(found) == _LETTERS else time.monotonic() + _LETTERS_S

    def close(self) -> None:
        """Give up the sink."""
        if (close := getattr(self._sink, "close", None)) is not None:
            with suppress(Exception):  # it is not used again
                close()


def _step_of(one: SinkLetter, cursor: Cursor) -> Step:
    fields = msgspec.json.decode(one.message)
    event = None if one.event_id is None else SinkEvent(one.eval_id, str(one.event_id), fields["type"], fields)
    is_erased = fields["type"] == ERASED
    other = None if event or is_erased else fields
    return Step(one.eval_id, event, cursor, cursor.replay_at or cursor.place, is_erased, other)
