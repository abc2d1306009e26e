"""Giving steps to a sink: in order, and without those that it refuses for themselves."""

import socket
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, Final, NamedTuple
from uuid import NAMESPACE_URL, UUID, uuid5

from evalstore.sinks.protocol import Batch, Sink
from evalstore.sinks.source import Step, to_json
from evalstore.storage import dead_letters
from evalstore.storage.dead_letters import DeadLetterInsert
from evalstore.storage.redrives import SINK_QUEUES
from models.errors import Outage
from tasks.tracing import release

# The breaker opens when so many of the last events were refused, and so large a share of them.
_BREAKER_WINDOW: Final = 1000
_BREAKER_EVENTS: Final = 100
_BREAKER_SHARE: Final = 0.5


class SinkUnavailable(Outage):
    """The sink is away or takes nothing now. The same steps are given again."""


class Refused(NamedTuple):
    """A step that the sink refuses for itself, and why."""

    step: Step
    error: Exception


class Delivery:
    """For one sink and one thread.

    `done`: how many steps of the last call are confirmed or refused. `refused`: those that were refused.
    """

    def __init__(self, name: str, sink: Sink) -> None:
        self._name, self._sink = name, sink
        self._recent = deque[bool](maxlen=_BREAKER_WINDOW)
        self.done = 0
        self.refused: list[Refused] = []

    def run(self, steps: Sequence[Step]) -> None:
        """Give these to the sink. Raises SinkUnavailable: the steps after `done` are to be given again."""
        self.done, self.refused = 0, []
        for is_event, group in groupby(steps, lambda step: step.event is not None):
            run = list(group)
            for part in [run] if is_event or hasattr(self._sink, "erase_many") else [[step] for step in run]:
                self._write(part)

    def _write(self, steps: Sequence[Step]) -> None:
        try:
            self.call(steps)
        except SinkUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - other people's code; the breaker bounds what a defect there can do
            if len(steps) > 1:
                self._write(steps[: len(steps) // 2])
                self._write(steps[len(steps) // 2 :])
                return
            self.refused.append(Refused(steps[0], error))
        self.done += len(steps)
        self._recent.extend([bool(self.refused) and self.refused[-1].step is steps[0]] * len(steps))
        self._break_if_most_are_refused()

    def call(self, steps: Sequence[Step]) -> None:
        """Give these to the sink at once. Raises SinkUnavailable, and what the sink raises."""
        events = [step.event for step in steps if step.event is not None]
        try:
            if events:
                self._sink.write(Batch(events, to_json(steps[-1].cursor)))
            elif erased := [step.eval_id for step in steps if step.is_erased]:
                erase_many = getattr(self._sink, "erase_many", None)
                erase_many(erased) if erase_many else self._sink.erase(erased[0])
        except Outage as error:
            raise SinkUnavailable(str(error) or type(error).__name__) from error

    def _break_if_most_are_refused(self) -> None:
        refused = sum(self._recent)
        if refused < _BREAKER_EVENTS or refused < len(self._recent) * _BREAKER_SHARE:
            return
        error = self.refused[-1].error
        self.done, self.refused = 0, []
        seen = len(self._recent)
        self._recent.clear()
        raise SinkUnavailable(
            f"the breaker is open: {refused} of {seen} events were refused, so the sink is at fault. Correct it; "
            f"the last error: {type(error).__name__}: {error}"
        )

    def letters(self) -> list[DeadLetterInsert]:
        """The refused steps as dead letters."""
        return list(_letters(self._name, self.refused))


def queue_of(name: str) -> str:
    """The queue of a sink's dead letters."""
    return f"{SINK_QUEUES}{name}"


def _letters(name: str, refused: Sequence[Refused]) -> Iterator[DeadLetterInsert]:
    for (eval_id, event, *_), error in refused:
        key = event.event_id if event else "erased"
        yield letter(
            uuid5(NAMESPACE_URL, f"evalstore:sink:{name}:{eval_id}:{key}"),
            name,
            error,
            eval_id=eval_id,
            event_id=UUID(event.event_id) if event else None,
            message=event.json if event else b'{"type":"storage:evaluation:erased","eval_id":"' + eval_id.encode() + b'"}',
        )


def letter(letter_id: UUID, name: str, error: Exception, **of: Any) -> DeadLetterInsert:
    """A dead letter of a sink; `of`: its `eval_id`, `event_id` and `message`."""
    return DeadLetterInsert(
        id=letter_id,
        queue=queue_of(name),
        actor=None,
        error_class=type(error).__name__,
        error_message=str(error)[:10_000],
        traceback="".join(traceback.format_exception(error))[-20_000:],
        signature=dead_letters.signature(type(error).__name__, str(error)),
        attempts=1,
        died_at=datetime.now(UTC),
        host=socket.gethostname(),
        release=release(),
        **of,
    )
