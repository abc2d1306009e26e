"""What a worker does with the events it is sent."""

import logging
import random
from functools import cache
from typing import Any

from dramatiq import Message
from sqlalchemy import Engine

from models.errors import BadMessage, EventIdReused, Fault, InvalidEvent, Outage, SchemaMismatch
from models.events import Event, identified, parse
from models.settings import settings
from storage import database, evaluations, migrations
from worker.batches import Batch, Delivery
from worker.hold import Hold

log = logging.getLogger("evalstore.worker")
_LONGEST_WAIT_S = 5.0


@cache
def engine() -> Engine:
    """This process's connections, once the database is known to have the right schema. Raises SchemaMismatch, Outage."""
    connections = database.engine(settings().database_url.get_secret_value())
    with database.errors(), connections.connect() as conn:
        migrations.check(conn)
    return connections


class Store:
    """The function of the actor `store_evaluation` in a worker that holds `hold`."""

    def __init__(self, hold: Hold) -> None:
        self._hold = hold

    def __call__(self, batch: Batch) -> None:
        """Store a batch of events in one transaction, committed when this returns; bury those that can never be stored.

        Waits for PostgreSQL as long as it is away. Raises Outage when told to stop meanwhile: nothing of it was stored, or
        all that was will be recognised when it comes again.
        """
        events: list[tuple[Delivery, Event]] = []
        for delivery in batch:
            try:
                events.append((delivery, event_of(delivery.message)))
            except BadMessage as error:
                batch.bury(delivery, error)
        if events:
            self._store(batch, events)

    def _store(self, batch: Batch, events: list[tuple[Delivery, Event]]) -> None:
        """Store `events`; where one of them sinks the transaction, halve them until it is alone."""
        try:
            stored = self._stored([event for _, event in events])
        except Outage:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, only the event that causes it may die of it
            if len(events) == 1:
                batch.bury(events[0][0], error)
                return
            middle = len(events) // 2
            self._store(batch, events[:middle])
            self._store(batch, events[middle:])
            return
        for (delivery, event), outcome in zip(events, stored.outcomes, strict=True):
            if outcome == "reused":
                batch.bury(delivery, EventIdReused(event.eval_id, event.event_id))

    def _stored(self, events: list[Event]) -> evaluations.Stored:
        """`evaluations.store`, tried again while the database is away or its schema is not ours."""
        failures = 0
        try:
            while True:
                try:
                    with database.errors(), engine().connect() as conn:
                        return evaluations.store(conn, events)
                except (Outage, SchemaMismatch) as error:
                    failures += 1
                    if failures == 1:
                        self._hold.outages += 1
                        log.warning("%s, holding %d events until it is over: %s", type(error).__name__, len(events), error)
                    longest_s = min(_LONGEST_WAIT_S, 0.1 * 2**failures)
                    if not self._hold.wait_out(longest_s * random.uniform(0.5, 1)):  # noqa: S311
                        raise Outage(f"told to stop while waiting: {error}") from error
        finally:
            if failures:
                self._hold.outages -= 1


def event_of(message: Message[Any]) -> Event:
    """The event a message carries. Raises InvalidEvent."""
    if len(message.args) != 1 or message.kwargs or not isinstance(message.args[0], dict):
        raise InvalidEvent([Fault("message.args", "expected one event, a JSON object, as the one positional argument")])
    given = identified(message.args[0], message.message_id, message.message_timestamp)
    event = parse(given, max_content_bytes=settings().max_content_bytes)
    if event.type == "evaluation:lost":
        raise InvalidEvent([Fault("type", "evaluation:lost is written by the system alone")])
    return event
