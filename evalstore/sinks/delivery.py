"""Giving steps to a sink: in order, and without those that it refuses for themselves."""

import socket
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from itertools import groupby
from typing import Any, Final, NamedTuple
from uuid import NAMESPACE_URL, UUID, uuid5

import msgspec

from evalstore.sinks.protocol import Batch, ErasesMany, Sink, TakesConfirmations
from evalstore.sinks.source import Step, to_json
from evalstore.storage import dead_letters
from evalstore.storage.dead_letters import DeadLetterInsert
from evalstore.storage.redrives import SINK_QUEUES
from models.confirmations import ERASED
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

    def __init__(self, name: str, sink: Sink, range_name: str | None = None) -> None:
        self._name, self._sink, self._range_name = name, sink, range_name or name
        self._recent = deque[bool](maxlen=_BREAKER_WINDOW)
        self._may_repeat = False
        self.done = 0
        self.refused: list[Refused] = []

    def run(self, steps: Sequence[Step], *, may_repeat: bool = False) -> None:
        """Give these to the sink. Raises SinkUnavailable: the steps after `done` are to be given again."""
        self.done, self.refused, self._may_repeat = 0, [], may_repeat
        # An event that is gone splits no batch: the sink would not recognise the parts.
        for (is_erased, is_single), group in groupby(steps, _kind):
            run = list(group)
            at_once = isinstance(self._sink, ErasesMany) if is_erased else not is_single
            for part in [run] if at_once else [[step] for step in run]:
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

    def call(self, steps: Sequence[Step], letter_id: UUID | None = None) -> None:
        """Give these to the sink at once. `letter_id`: of the dead letter that is redriven, which is in no batch.

        Raises SinkUnavailable, and what the sink raises.
        """
        events = [step.event for step in steps if step.event is not None]
        try:
            if events:
                key, may_repeat = _key(self._range_name, steps, letter_id), self._may_repeat or letter_id is not None
                self._sink.write(Batch(events, to_json(steps[-1].cursor), key, may_repeat))
            elif steps[0].is_erased and isinstance(self._sink, ErasesMany):
                self._sink.erase_many([step.eval_id for step in steps])
            elif steps[0].is_erased:
                self._sink.erase(steps[0].eval_id)
            elif steps[0].confirmation and isinstance(self._sink, TakesConfirmations):
                self._sink.confirm(steps[0].confirmation)
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


def _key(range_name: str, steps: Sequence[Step], letter_id: UUID | None) -> str:
    """The steps of a range between two cursors are always the same ones, except for those that were erased."""
    named = [range_name, letter_id] if letter_id else [range_name, steps[0].cursor, steps[-1].cursor]
    return sha256(msgspec.json.encode(named)).hexdigest()


def _kind(step: Step) -> tuple[bool, bool]:
    """Whether the step is an erasure, and whether it is a confirmation, which goes alone."""
    return step.is_erased, step.confirmation is not None


def queue_of(name: str) -> str:
    """The queue of a sink's dead letters."""
    return f"{SINK_QUEUES}{name}"


def _letters(name: str, refused: Sequence[Refused]) -> Iterator[DeadLetterInsert]:
    for step, error in refused:
        eval_id, event = step.eval_id, step.event
        told = step.confirmation or {"type": ERASED, "eval_id": eval_id}
        message = event.json if event else msgspec.json.encode(told)
        key = event.event_id if event else message.decode() if step.confirmation else "erased"
        yield letter(
            uuid5(NAMESPACE_URL, f"evalstore:sink:{name}:{eval_id}:{key}"),
            name,
            error,
            eval_id=eval_id,
            event_id=UUID(event.event_id) if event else None,
            message=message,
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
