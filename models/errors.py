"""The errors that evalstore raises, split by what the caller does about them.

EvalstoreError
├── Outage                      wait and try again: the message is good
│   ├── DatabaseOutage
│   │   ├── DatabaseMisconfigured   the settings or the server need a correction first
│   │   └── DatabaseTimeout     a time limit of evalstore ended the work: PostgreSQL is there
│   ├── RedisOutage
│   │   └── SpoolFull           the spool has no room either
│   ├── ObjectStoreOutage
│   │   └── ObjectUnavailable   only this object fails: continue with others
│   └── SendRefused             a signal handler interrupted another send, or the interpreter ends
├── BadMessage                  give up: the same message would fail again
│   ├── InvalidEvent            a field is missing, wrong or unknown
│   └── EventIdReused           this event_id is stored with another body
├── NotDurable                  send again, or continue without durability
├── ObjectMissing               wait for a grace period, then give up
├── ObjectDamaged               give up, or put the object again from a good copy
├── SchemaMismatch              run `evalstore migrate`, or deploy the release that fits the database
└── InvalidSettings             correct the environment variables that the message names

Errors of one room are defined there:

EvalstoreError
├── Outage
│   ├── SinkUnavailable         evalstore.sinks: the sink takes nothing now
│   ├── LakeOutage              evalstore.lake: the warehouse or the catalog cannot be used
│   └── ServiceOutage           evalstore.client: the HTTP service cannot be reached, or asks to wait
├── ServiceError                evalstore.client: the HTTP service refuses a request
│   ├── NotFound                evalstore.client: there is no such evaluation or content
│   ├── Conflict                evalstore.client: another event is stored in its place
│   └── VersionChanged          evalstore.client: read the record again
├── LakeMismatch                evalstore.lake: the warehouse belongs to another evalstore or a newer release
├── LakeDamaged                 evalstore.lake: a file of the lake is missing or cannot be read
├── QueryRefused                evalstore.lake: the query writes, is wrong, or exceeds a limit
├── LeaseLost                   evalstore.storage: another process works on the sink, or it was moved: read its cursor again
├── UnreadableState             evalstore.sinks: learn again from the event log
├── TooManyWebhooks             evalstore.storage: remove a subscription first
├── AlreadyQueued               evalstore.storage: another queued event is stored
├── VersionChanged              evalstore.storage: a conditional write met another version
├── EvaluationErased            evalstore.storage: the evaluation is erased, and stays so
├── Hidden                      evalstore.storage: the key may not write these evaluations
├── ChangesLost                 evalstore.storage: changes may be gone before they were read: begin again
├── OtherKey                    evalstore.storage: the object store holds the tombstones of another evalstore
├── OlderProcesses              evalstore.telemetry: replace the processes of an older release first
├── Restart                     evalstore.storage: begin the transaction again
├── Undecodable                 models.merge_state: rebuild the merge state from the event log
├── RegistryUnavailable         evalstore.telemetry: EVALSTORE_RUNTIME_DIR cannot be used
├── ServerError                 evalstore.local: a local server did not start
└── AlreadyRunning              evalstore.local: another process uses the data folder
"""

from collections.abc import Sequence
from typing import Final, NamedTuple


def printable(text: str) -> str:
    """Write lone surrogates in `text` as `\\udXXX`: logs are UTF-8 and could not hold them."""
    return text.encode("utf-8", "backslashreplace").decode()


class EvalstoreError(Exception):
    """The root of all errors that evalstore raises."""


class Outage(EvalstoreError):
    """A server cannot be reached or refuses work. Retry until it is back."""


class DatabaseOutage(Outage):
    """PostgreSQL is unreachable, restarting, read-only, or out of connections, disk or memory.

    `may_be_the_work`: the request itself may be the cause, because it took too long, needed too much memory, or its connection
    broke. If it fails again while small writes succeed, this is no outage. `is_lost`: the connection ended without an error
    from the server. `is_lock`: another session held a lock for too long.
    """

    def __init__(self, message: str, *, may_be_the_work: bool = False, is_lost: bool = False, is_lock: bool = False) -> None:
        super().__init__(message)
        self.may_be_the_work, self.is_lost, self.is_lock = may_be_the_work or is_lost, is_lost, is_lock


class DatabaseMisconfigured(DatabaseOutage):
    """PostgreSQL does not know the database, role or password. A starting process exits; a running one waits."""

    def __init__(self, message: str) -> None:
        super().__init__(f"mistake in settings: {message}")


class DatabaseTimeout(DatabaseOutage):
    """A time limit that evalstore sets ended a statement, a transaction, or a wait for a lock or a connection.

    PostgreSQL itself is there. Retry.
    """


class RedisOutage(Outage):
    """Redis is unreachable, loading, read-only or full. A message is sent only once Redis confirmed it."""


class SpoolFull(RedisOutage):
    """Redis is out, and the spool is full or cannot be written. None of the messages is kept."""


class ObjectStoreOutage(Outage):
    """The object store is unreachable, slow or refuses work."""


class ObjectUnavailable(ObjectStoreOutage):
    """The object store refuses this object. Other objects can be read and written.

    `needs_operator`: the refusal does not end by itself.
    """

    def __init__(self, message: str, *, needs_operator: bool = False) -> None:
        super().__init__(message)
        self.needs_operator = needs_operator


class SendRefused(Outage):
    """This thread cannot send now: a signal handler or finalizer interrupted another send, or the interpreter ends.

    Nothing was sent. Send the event again after the handler has returned, or from another process.
    """


class ObjectMissing(EvalstoreError):
    """The object store has no such object: not yet, or no longer."""


class ObjectDamaged(EvalstoreError):
    """The content of an object, stored or to be stored, does not fit its name, size or checksum."""


class BadMessage(EvalstoreError):
    """The message fails the same way every time. Do not retry: correct it, or leave it to an operator."""


class Fault(NamedTuple):
    """A wrong field, such as `metadata.tags[2]`, and what was expected."""

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
    """Another event with this `event_id` is stored for the evaluation, and stays."""

    def __init__(self, eval_id: str, event_id: object) -> None:
        self.eval_id, self.event_id = eval_id, event_id
        super().__init__(f"event_id {event_id} of evaluation {eval_id!r} is already stored with another body")

    def __reduce__(self) -> tuple[type["EventIdReused"], tuple[str, object]]:
        return type(self), (self.eval_id, self.event_id)


class NotDurable(EvalstoreError):
    """Only Redis' memory holds a durable message. Send it again (it is stored once), or continue without durability."""


class SchemaMismatch(EvalstoreError):
    """The database's tables belong to another release."""


PASSING: Final = (Outage, SchemaMismatch)
"""Errors that end without a change of the message: a server comes back, a schema is migrated."""


class InvalidSettings(EvalstoreError):
    """Environment variables are wrong. The message names each, without its value, which may be secret."""
