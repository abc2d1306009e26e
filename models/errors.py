"""Everything evalstore raises, split by what the caller does about it.

EvalstoreError
├── Outage                wait and try again: nothing is wrong with the message
│   ├── DatabaseOutage
│   │   └── DatabaseMisconfigured   … until somebody corrects the settings or the server
│   ├── RedisOutage
│   │   └── SpoolFull     … and the spool cannot take it either
│   ├── ObjectStoreOutage
│   │   └── ObjectUnavailable   … of this one object: others can be read and written
│   └── SendRefused       a signal handler interrupted another send, or the interpreter ends
├── BadMessage            give up: the same message would fail the same way again
│   ├── InvalidEvent      a field is missing, wrong or unknown
│   └── EventIdReused     this event_id is stored with another body
├── ObjectMissing         it may still come: wait for a grace, then give up
├── ObjectDamaged         give up, or put the object again from a good copy
├── SchemaMismatch        run `evalstore migrate`, or deploy the release that fits the database
└── InvalidSettings       correct the environment variables it names
"""

from collections.abc import Sequence
from typing import Final, NamedTuple


def printable(text: str) -> str:
    """`text` with lone surrogates as `\\udXXX`: a name that a sender made up must not break the log it is reported in."""
    return text.encode("utf-8", "backslashreplace").decode()


class EvalstoreError(Exception):
    """The root: catching it catches everything evalstore raises by itself."""


class Outage(EvalstoreError):
    """A server cannot be reached or refuses work for now. Retry, for as long as it takes."""


class DatabaseOutage(Outage):
    """PostgreSQL is away, restarting, read-only, or out of connections, disk or memory.

    `may_be_the_work`: what was asked for may be the cause (it took too long, needed too much memory, or the connection broke
    over it). If it keeps failing so while small writes go through, it is no outage. `is_lost`: the connection ended, and nobody
    said why. `is_lock`: somebody else held a lock for too long. `is_time_limit`: a limit that evalstore sets ended the work,
    which alone shows no outage of the server.
    """

    def __init__(
        self,
        message: str,
        *,
        may_be_the_work: bool = False,
        is_lost: bool = False,
        is_lock: bool = False,
        is_time_limit: bool = False,
    ) -> None:
        super().__init__(message)
        self.is_time_limit = is_time_limit
        self.may_be_the_work, self.is_lost, self.is_lock = may_be_the_work or is_lost, is_lost, is_lock


class DatabaseMisconfigured(DatabaseOutage):
    """PostgreSQL does not know this database, role or password. A process that starts ends; one that runs keeps its work."""

    def __init__(self, message: str) -> None:
        super().__init__(f"mistake in settings: {message}")


class RedisOutage(Outage):
    """Redis is away, loading, read-only or full. Nothing that was not confirmed counts as sent."""


class SpoolFull(RedisOutage):
    """Redis takes nothing, and the sender's spool is full or cannot be written. Nothing of what was given is kept."""


class ObjectStoreOutage(Outage):
    """The object store is away, slow or refuses work."""


class ObjectUnavailable(ObjectStoreOutage):
    """The object store answers, and refuses this one object. Other objects may fare better: do not make them wait.

    `needs_operator`: waiting does not end the refusal.
    """

    def __init__(self, message: str, *, needs_operator: bool = False) -> None:
        super().__init__(message)
        self.needs_operator = needs_operator


class SendRefused(Outage):
    """This thread cannot send now: a signal handler or finalizer interrupted another send, or the interpreter ends.

    Nothing was sent. Send the event again after the handler has returned, or from another process.
    """


class ObjectMissing(EvalstoreError):
    """The object store answers, and has no such object: not yet, or no longer."""


class ObjectDamaged(EvalstoreError):
    """What the object store holds, or what is to be put there, is not what its name, size or checksum says."""


class BadMessage(EvalstoreError):
    """It would fail the same way every time. Do not retry it; correct it or leave it to an operator."""


class Fault(NamedTuple):
    """One wrong field: where (`exit_code`, `metadata.tags[2]`) and what was expected there."""

    field: str
    problem: str


class InvalidEvent(BadMessage, ValueError):
    """The event could never be stored. `faults` names every wrong field."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(Fault(printable(fault.field), printable(fault.problem)) for fault in faults)
        super().__init__("; ".join(f"{fault.field}: {fault.problem}" for fault in self.faults))

    def __reduce__(self) -> tuple[type["InvalidEvent"], tuple[tuple[Fault, ...]]]:
        return type(self), (self.faults,)


class EventIdReused(BadMessage):
    """Another event with this `event_id` is stored for the evaluation; that one stands."""

    def __init__(self, eval_id: str, event_id: object) -> None:
        self.eval_id, self.event_id = eval_id, event_id
        super().__init__(f"event_id {event_id} of evaluation {eval_id!r} is already stored with another body")

    def __reduce__(self) -> tuple[type["EventIdReused"], tuple[str, object]]:
        return type(self), (self.eval_id, self.event_id)


class NotDurable(EvalstoreError):
    """A durable send was confirmed by Redis alone. Send it again (it is stored once), or go on without the promise."""


class SchemaMismatch(EvalstoreError):
    """The tables are not those this release works with."""


PASSING: Final = (Outage, SchemaMismatch)
"""What ends without the message's doing: a server comes back, a schema is migrated."""


class InvalidSettings(EvalstoreError):
    """Environment variables are wrong; the message names each of them. Values are not repeated: they may be secret."""
