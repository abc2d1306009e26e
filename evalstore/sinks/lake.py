"""The lake: appends events, each once. The cursor is in the same commit. docs/decisions/0049"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from uuid import UUID

from pydantic import Field

from evalstore.lake.errors import LakeDamaged, LakeMismatch
from evalstore.lake.lake import Lake
from evalstore.sinks.options import Options
from evalstore.sinks.protocol import Batch
from models.errors import Outage
from models.settings import Settings

NAME: Final = "lake"


class LakeOptions(Options):
    """The keys of the table `[lake]` with `type = "lake"`."""

    type: str = NAME
    hash_ranges: int = Field(default=1, ge=1, le=1)
    batch_events: int = Field(default=100_000, ge=1, le=100_000)
    batch_bytes: int | None = Field(default=40_000_000, ge=1000, le=64_000_000)
    batch_s: float = Field(default=60, ge=0, le=60)
    timeout_s: float = Field(default=900, ge=1, le=86_400)


class LakeSink:
    """See `Sink` and `KeepsCursor`. A new lake is filled from the event log."""

    fills_from_log = True

    def __init__(self, given: Settings) -> None:
        self._settings = given
        self._lake: Lake | None = None

    def write(self, batch: Batch) -> None:
        """Append the events, and set the cursor. Raises Outage."""
        with self._open() as lake:
            lake.append_events(batch.events, _without_id(batch.cursor))

    def erase(self, eval_id: str) -> None:
        """Erase from all files. Raises Outage."""
        self.erase_many([eval_id])

    def erase_many(self, eval_ids: Sequence[str]) -> None:
        """Erase several evaluations at once: each file that holds some is rewritten once. Raises Outage."""
        with self._open() as lake:
            lake.erase(eval_ids)

    def cursor(self) -> dict[str, Any] | None:
        """Return the cursor of the last commit. Raises Outage."""
        with self._open() as lake:
            return lake.cursor()

    @contextmanager
    def _open(self) -> Iterator[Lake]:
        """No event is at fault where the lake itself is: it waits for an operator."""
        try:
            if self._lake is None:
                self._lake = Lake.open(self._settings)
            yield self._lake
        except (LakeMismatch, LakeDamaged) as error:
            raise Outage(str(error)) from error

    def close(self) -> None:
        """Close the connections to the database."""
        if self._lake is not None:
            self._lake.close()


def _without_id(cursor: dict[str, Any]) -> dict[str, Any]:
    """Return the cursor of a replay without the last evaluation's id, which may be erased later.

    The replay then goes on with all events of that moment. The lake leaves out those that it has.
    """
    if cursor.get("replay_at") is None:
        return cursor
    at = cursor["replay_at"][0]
    return cursor | {"replay_at": [at, "", "0001-01-01T00:00:00Z", str(UUID(int=0))]}


def create(_name: str, _options: LakeOptions, settings: Settings) -> LakeSink:
    """Return the sink. Connects to nothing yet."""
    return LakeSink(settings)
