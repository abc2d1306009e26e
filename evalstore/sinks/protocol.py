"""The interface between the runner and a sink."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import msgspec

_ENCODER = msgspec.json.Encoder()


class SinkEvent(msgspec.Struct, frozen=True, dict=True, eq=False):
    """A stored event. `fields` is the event as a JSON object (docs/reference/events.md) with `recorded_at` and `version`.

    Content up to 64 KiB is in it, as text or base64 (`output_b64`); larger content by reference (`output_ref`).
    `status` is the evaluation's after the commit that stored the event, None in a replay.
    """

    eval_id: str
    event_id: str
    type: str
    fields: dict[str, Any]
    status: str | None = None

    @property
    def json(self) -> bytes:
        """The event as JSON in UTF-8; lone surrogates as escapes. Computed once."""
        found: bytes | None = self.__dict__.get("json_")  # cached_property takes a lock
        if found is None:
            self.__dict__["json_"] = found = _encode(self.fields)
        return found


def _encode(fields: dict[str, Any]) -> bytes:
    try:
        return _ENCODER.encode(fields)
    except UnicodeEncodeError:
        return json.dumps(fields, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Batch(Sequence[SinkEvent]):
    """Events in the order of delivery; those of one evaluation in commit order.

    `cursor` is the JSON object to hand back from `KeepsCursor.cursor` by a sink that stores it together with the events.
    `key` and `may_repeat` are for a sink that `RepeatsBatches`. A batch that comes again has the same key, and no other batch
    has this key. `may_repeat` says that some events may be in the sink already.
    """

    events: Sequence[SinkEvent]
    cursor: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    may_repeat: bool = False

    def __len__(self) -> int:
        return len(self.events)

    def __iter__(self) -> Iterator[SinkEvent]:
        return iter(self.events)

    def __getitem__(self, at: Any) -> Any:
        return self.events[at]


class Sink(Protocol):
    """Another system. One thread calls it, and calls it again where it raised, or where the process died meanwhile.

    A sink may also have `close()`, which is called when its process gives it up.
    """

    def write(self, batch: Batch) -> None:
        """Return when the system has all events of the batch for good.

        Raises Outage (the same events come again, later) and BadMessage (they never fit: the runner finds out which by
        writing parts of the batch, and keeps these as dead letters). After an error, any part of the batch may be written.
        """

    def erase(self, eval_id: str) -> None:
        """Remove everything of an evaluation, as far as the system can. Raises as `write` does."""


@runtime_checkable
class TakesConfirmations(Protocol):
    """A sink that also gets the confirmations that hold no event, in their place: repairs, finished runs, anomalies.

    They are in the outbox alone: a replay of the log brings none.
    """

    def confirm(self, confirmation: dict[str, Any]) -> None:
        """Take a confirmation, which has a `type`. Raises as `Sink.write` does."""


@runtime_checkable
class KeepsCursor(Protocol):
    """A sink that stores the cursor in one transaction with the events, and so has each event once."""

    def cursor(self) -> dict[str, Any] | None:
        """Return the `cursor` of the last batch that was written, or None where there is none yet. Raises Outage."""


@runtime_checkable
class RepeatsBatches(Protocol):
    """A sink that has each event once if a batch comes again as it was.

    The runner stores the limit of each batch before it calls `write`. After a failure, in this process or another one, it calls
    `resume` and gives the whole batch again.
    """

    def resume(self, state: dict[str, Any] | None) -> dict[str, Any]:
        """Begin to work on the sink, and stop what an earlier process may still be writing. Raises Outage.

        `state` is the JSON object that the last call returned. The runner stores the new one before it calls `write`.
        """


@runtime_checkable
class FillsFromLog(Protocol):
    """A sink that, as long as it is empty, begins with the whole event log. It keeps its cursor."""

    fills_from_log: bool


@runtime_checkable
class ErasesMany(Protocol):
    """A sink that erases several evaluations at once for little more than one."""

    def erase_many(self, eval_ids: Sequence[str]) -> None:
        """Do as `erase` does, for all of them."""
