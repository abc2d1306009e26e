"""The table of fields: what events carry, each field once.

A class lists the fields that the same types of events carry. The event models inherit these classes. From the table derive:
the event models (models/events.py), the fast decoder (models/fast_decode.py), the rows and the record (models/record.py), the
columns in PostgreSQL (evalstore/storage), the client's `Evaluation`, the OpenAPI schemas and the reference pages.

To add a field: one line here and one migration. CONTRIBUTING.md has the steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, NamedTuple, TypeVar, dataclass_transform, get_args, get_type_hints

from models.kinds import Attempt, Base64, Content, EvalId, EventId, Int64, Kind, Metadata, Number, Ref, RunId, Text, Time

_Class = TypeVar("_Class", bound=type)


class Required(NamedTuple):
    """The types of events that need a field."""

    events: tuple[str, ...]


class Field(NamedTuple):
    """A line of the table. `events` are the types of events that carry the field, `required` those that need it."""

    name: str
    kind: Kind
    doc: str
    events: tuple[str, ...]
    required: tuple[str, ...]

    @property
    def is_content(self) -> bool:
        return self.kind.sql == "bytea"


FIELDS: Final[list[Field]] = []
SENT: Final = ("queued", "started", "completed", "failed", "timed_out", "cancelled")


@dataclass_transform(kw_only_default=True)
def _carried_by(*events: str) -> Callable[[_Class], _Class]:
    """Add the fields of a class to the table; these types of events carry them."""

    def add(group: _Class) -> _Class:
        # A dataclass without methods: pydantic lets a model inherit its fields.
        dataclass(init=False, repr=False, eq=False, kw_only=True)(group)
        for name, hint in get_type_hints(group, include_extras=True).items():
            if (kind := _kind(hint)) is not None:
                [doc] = [given for given in get_args(hint)[1:] if isinstance(given, str)]
                required = [type_ for given in get_args(hint)[1:] if isinstance(given, Required) for type_ in given.events]
                FIELDS.append(Field(name, kind, doc, events, tuple(required)))
        return group

    return add


def _kind(hint: Any) -> Kind | None:
    """Return the kind in an annotation, or None where no column holds the value."""
    if isinstance(hint, Kind):
        return hint
    return next((kind for inner in get_args(hint) if (kind := _kind(inner)) is not None), None)


@_carried_by(*SENT)
class Common:
    """All types of events carry these."""

    eval_id: Annotated[EvalId, "the evaluation", Required(SENT)]
    event_id: Annotated[EventId, "the event"] = None
    occurred_at: Annotated[Time, "when it happened; now, where it is missing"] = None
    attempt: Annotated[Attempt | None, "the number of this execution of the evaluation"] = 1
    metadata: Annotated[Metadata, "anything else; later events win, key by key"] = None


@_carried_by("queued")
class Queued:
    """The record takes these from the first queued event of the highest attempt that has one."""

    run_id: Annotated[RunId | None, "the run it belongs to"] = None
    language: Annotated[Text | None, "the language of the code; default `python`"] = None
    submitter: Annotated[Text | None, "who asked for it"] = None


@_carried_by("queued")
class Code:
    """The record takes these from the event of `Queued`."""

    code: Annotated[Content | None, "the code to run", Required(("queued",))] = None
    code_b64: Base64 | None = None
    code_ref: Ref = None


@_carried_by("started", "completed", "failed", "timed_out")
class Ran:
    """The record takes each of these fields separately: from the result if the result has it, else from the attempt's last
    started event."""

    executor_id: Annotated[Text | None, "the executor that ran it"] = None
    container_id: Annotated[Text | None, "the container it ran in"] = None


@_carried_by("started")
class Started:
    """The record takes these from the first started event of the attempt."""

    timeout_s: Annotated[Number | None, "the time limit of this attempt"] = None


@_carried_by("completed", "failed", "timed_out")
class Measured:
    """The record takes these from the result."""

    exit_code: Annotated[Int64 | None, "the program's exit code", Required(("completed",))] = None
    duration_ms: Annotated[Number | None, "how long it ran"] = None
    memory_bytes: Annotated[Int64 | None, "the most memory it had"] = None


@_carried_by("completed")
class Graded:
    """The record takes these from the result."""

    score: Annotated[Number | None, "what a grader gave"] = None


@_carried_by("cancelled")
class Cancelled:
    """The record takes these from the result."""

    reason: Annotated[Text | None, "why it was called off"] = None


@_carried_by("completed", "failed", "timed_out")
class Output:
    """The record takes these from the result."""

    output: Annotated[Content | None, "standard output"] = None
    output_b64: Base64 | None = None
    output_ref: Ref = None
    error: Annotated[Content | None, "standard error", Required(("failed",))] = None
    error_b64: Base64 | None = None
    error_ref: Ref = None


class Scalars(Cancelled, Graded, Measured, Started, Ran, Queued):
    """All fields that a column of the record holds as the event gave them, in the order of the table."""


def _names(*groups: type) -> tuple[str, ...]:
    return tuple(field.name for field in FIELDS if any(field.name in group.__annotations__ for group in groups))


SCALARS: Final = _names(*Scalars.__bases__)
CONTENTS: Final = tuple(field.name for field in FIELDS if field.is_content)
# The scalars by the event that the record takes them from. Each source's columns follow one another in both rows.
FROM_QUEUED: Final = _names(Queued)
FROM_STARTED: Final = _names(Started)
FROM_RESULT: Final = _names(Measured, Graded, Cancelled)

_TYPES: Final = {field.name: field.kind.sql for field in FIELDS}
_SCALAR_TYPES: Final = {name: _TYPES[name] for name in SCALARS}

# The columns of `evaluation_events` and `evaluations`, with their types, in the order of the rows in models/record.py.
EVENT_COLUMNS: Final[dict[str, str]] = {
    **{name: _TYPES[name] for name in ("eval_id", "event_id")},
    "type": "text",
    **{name: _TYPES[name] for name in ("attempt", "occurred_at", "metadata")},
    **_SCALAR_TYPES,
    **{name: _TYPES[name] for name in CONTENTS},
    "extra": "text",
}
RECORD_COLUMNS: Final[dict[str, str]] = {
    "eval_id": "text",
    "status": "text",
    "attempt": "int4",
    "version": "int4",
    **_SCALAR_TYPES,
    "metadata": "jsonb",
    "metadata_truncated": "bool",
    **dict.fromkeys(("queued_at", "started_at", "finished_at"), "timestamptz"),
    **dict.fromkeys(("code_event_id", "result_event_id"), "uuid"),
}
