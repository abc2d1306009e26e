"""Each value is refused at `send` with the name of its field, or the worker reads the same event from the message."""

import enum
import math
from collections import OrderedDict, UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any
from uuid import UUID

import msgspec
import numpy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from models import EvaluationCompleted, EvaluationStarted, InvalidEvent
from models.content import Reference
from models.events import check
from models.record import EventRow, to_row
from models.settings import Settings
from tasks import store_evaluation, store_evaluations
from tasks.actor import _complete
from tasks.broker import encode
from worker.messages import read_message

MAX_BYTES = Settings().max_content_bytes

NAMED = {"eval_id": "e", "event_id": "01a202b1-c662-77cc-b904-b98111ee0b99", "occurred_at": "2026-01-31T09:30:00.25Z"}
STARTED = {**NAMED, "type": "evaluation:started"}
COMPLETED = {**NAMED, "type": "evaluation:completed", "exit_code": 0}
QUEUED = {**NAMED, "type": "evaluation:queued", "code": "x"}
REF: dict[str, Any] = {"sha256": "0f" * 32, "size": 5, "encoding": "zstd"}


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "another text"


class Label(str, enum.Enum):  # noqa: UP042 - StrEnum's value is its text
    """Its value, which encoders write, is not its text, which checks see."""

    text: str
    OK = ("ok", "evaluation:started", "another text")
    STARTED = ("evaluation:started", "another text", "")

    def __new__(cls, text: str, value: str, _: str) -> "Label":
        member = str.__new__(cls, text)
        member._value_ = value
        return member


class Number(enum.IntEnum):
    ONE = 1


class Half(float, enum.Enum):
    HALF = 0.5


class Int(int):
    def __repr__(self) -> str:
        return "another number"


class Float(float):
    def __repr__(self) -> str:
        return "another number"


class Plain(enum.Enum):
    OK = "ok"


@dataclass
class Data:
    a: int = 1


class Struct(msgspec.Struct):
    a: int = 1


class Model(BaseModel):
    a: int = 1


class Nanoseconds(datetime):
    """As pandas' Timestamp writes itself."""

    def isoformat(self, *_: Any, **__: Any) -> str:
        return "2026-01-31T10:30:00.250000999+00:00"


class NotATime(datetime):
    """As pandas' NaT does."""

    def astimezone(self, *_: Any) -> Any:
        return self

    def date(self) -> date:
        raise ValueError("no date")

    def isoformat(self, *_: Any, **__: Any) -> str:
        return "NaT"


class Floating:
    def __float__(self) -> float:
        return 2.5


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def endless() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["a"] = [value, value]
    return value


def read_back(event: Any) -> EventRow:
    """The event that the worker reads from the message of a single and of a bulk send."""
    single = read_message(encode(store_evaluation.message_with_options(args=(event,))), MAX_BYTES)
    travelling, written = _complete(event, Settings())
    assert read_message(encode(store_evaluation.build_message(travelling), written), MAX_BYTES) == single
    return single


SENT: list[tuple[dict[str, Any], str, Any, Any]] = [
    *((COMPLETED, "duration_ms", given, sent) for given, sent in [
        (Decimal(30), 30.0),
        (Decimal("0.1"), 0.1),
        (Fraction(1, 4), 0.25),
        (Float(1.5), 1.5),
        (Half.HALF, 0.5),
        (Int(3), 3.0),
        (Number.ONE, 1.0),
        (10**30, 1e30),
        (2**64, float(2**64)),
        (Floating(), 2.5),
        (numpy.float16(1.5), 1.5),
        (numpy.float32(0.1), float(numpy.float32(0.1))),
        (numpy.float64(0.1), 0.1),
        (numpy.longdouble(1.5), 1.5),
        (numpy.int64(7), 7.0),
        (numpy.uint8(7), 7.0),
        (numpy.array(1.5), 1.5),
    ]),
    (STARTED, "timeout_s", Decimal("1.5"), 1.5),
    (STARTED, "timeout_s", numpy.float32(1.5), 1.5),
    *((COMPLETED, name, given, sent) for name in ("exit_code", "memory_bytes", "attempt") for given, sent in [
        (Int(3), 3),
        (Number.ONE, 1),
        (numpy.int64(7), 7),
        (numpy.uint64(7), 7),
    ]),
    (COMPLETED, "executor_id", Text("x"), "x"),
    (COMPLETED, "executor_id", Label.OK, "ok"),
    (COMPLETED, "executor_id", numpy.str_("x"), "x"),
    (COMPLETED, "eval_id", Label.OK, "ok"),
    (COMPLETED, "eval_id", numpy.str_("x"), "x"),
    (COMPLETED, "output", Text("x\ud800"), b"x\xed\xa0\x80"),
    (COMPLETED, "output", Label.OK, b"ok"),
    (COMPLETED, "output_b64", Text("eA=="), b"x"),
    (COMPLETED, "event_id", UUID(int=5), UUID(int=5)),
    (COMPLETED, "event_id", Text(UUID(int=5)), UUID(int=5)),
    (COMPLETED, "occurred_at", Text("2026-01-31T09:30:00Z"), datetime(2026, 1, 31, 9, 30, tzinfo=UTC)),
    (COMPLETED, "occurred_at", Nanoseconds(2026, 1, 31, 9, 30, tzinfo=UTC), datetime(2026, 1, 31, 9, 30, tzinfo=UTC)),
    (STARTED, "type", Label.STARTED, "evaluation:started"),
    (COMPLETED, "output_ref", Reference._make((Text("0f" * 32), numpy.int64(5), Text("zstd"))), Reference(**REF)),
    (
        COMPLETED,
        "output_ref",
        UserDict(sha256=Text("0f" * 32), size=Number.ONE, encoding=Text("zstd")),
        Reference("0f" * 32, 1, "zstd"),
    ),
    *((STARTED, "metadata", {"a": given}, {"a": sent}) for given, sent in [
        (numpy.float64(1.5), 1.5),
        (numpy.float32(0.1), float(numpy.float32(0.1))),
        (numpy.int64(-7), -7),
        (numpy.uint64(7), 7),
        (numpy.bool_(True), True),
        (numpy.str_("x"), "x"),
        ([numpy.float64(1.5), {"b": numpy.int32(1)}], [1.5, {"b": 1}]),
        ({numpy.str_("k"): 1, Text("t"): 2, Label.OK: 3}, {"k": 1, "t": 2, "ok": 3}),
        (OrderedDict(b=1), {"b": 1}),
        (Float(1.5), 1.5),
        (Half.HALF, 0.5),
        (Int(3), 3),
        (Number.ONE, 1),
        (Label.OK, "ok"),
        (-0.0, -0.0),
        (2**63 - 1, 2**63 - 1),
        (1e300, 1e300),
    ]),
    (STARTED, "metadata", OrderedDict({Text("k"): 1}), {"k": 1}),
]  # fmt: skip


def named(case: tuple[dict[str, Any], str, Any, Any]) -> str:
    """An id that is the same in each process: no object's address is part of it."""
    event, name, value, sent = case
    return f"{event['type'].partition(':')[2]}-{name}-{type(value).__name__}-{sent!r:.40}"


@pytest.mark.parametrize(("event", "name", "value", "sent"), [pytest.param(*case, id=named(case)) for case in SENT])
def test_a_value_that_send_takes_is_what_the_worker_reads(event: dict[str, Any], name: str, value: Any, sent: Any) -> None:
    given = {**event, name: value}
    stored = read_back(given)
    read = getattr(stored, name.partition("_b64")[0].partition("_ref")[0])
    assert (read, repr(read)) == (sent, repr(sent))
    assert stored == to_row(check(given))


JUNK: list[Any] = [
    *(b"x", bytearray(b"x"), memoryview(b"x"), (1,), {1}, 1j, object(), Plain.OK, Data(), Struct(), Model()),
    *(PurePosixPath("x"), timedelta(1), date(2026, 1, 1), UserDict(), MappingProxyType({"a": 1}), range(2)),
    *(numpy.array([1.5, 2]), numpy.datetime64("2026-01-31"), numpy.timedelta64(1, "s"), numpy.complex64(1), numpy.bytes_(b"x")),
    *(numpy.dtype("f8"), numpy.float64, numpy.void(b"x"), math.nan, numpy.float64("nan"), Decimal("NaN"), Decimal("sNaN")),
    *(10**5000, Decimal("1e400"), Fraction(10**400), numpy.longdouble("1e400")),
]


@pytest.mark.parametrize("value", JUNK, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    ("event", "name"),
    [
        *((COMPLETED, name) for name in COMPLETED if name != "type"),
        *((COMPLETED, name) for name in ("attempt", "memory_bytes", "duration_ms", "executor_id", "output", "output_b64")),
        *((COMPLETED, "output_ref"), (COMPLETED, "metadata"), (STARTED, "timeout_s"), (QUEUED, "code"), (QUEUED, "language")),
        *((STARTED, "unknown"), (STARTED, "exit_code")),
    ],
)
def test_a_value_that_cannot_travel_is_refused_with_its_field(event: dict[str, Any], name: str, value: Any) -> None:
    with pytest.raises(InvalidEvent) as refused:
        read_back({**event, name: value})
    assert {fault.field for fault in refused.value.faults} <= {name, name.removesuffix("_b64").removesuffix("_ref")}


@pytest.mark.parametrize(
    "metadata",
    [
        *(
            {"a": value}
            for value in [*JUNK, UUID(int=1), datetime.now(UTC), Decimal(1), Fraction(1, 2), Floating(), None.__class__]
        ),
        *({"a": [{"b": value}]} for value in JUNK),
        *(nested(5000), {"a": nested(5000)}, endless(), {10**5000: 1}, {"a": {b"x": 1}}, {numpy.int64(1): 1}),
        *({"a": {1: 1}}, {"a": numpy.uint64(2**63)}),
    ],
    ids=lambda metadata: type(next(iter(metadata.values()))).__name__,
)
def test_metadata_that_cannot_travel_is_refused_with_its_member(metadata: dict[Any, Any]) -> None:
    with pytest.raises(InvalidEvent, match=r"^metadata: metadata"):
        read_back({**STARTED, "metadata": metadata})


def test_a_name_that_is_no_text_is_refused() -> None:
    for name in (10**5000, b"x", numpy.int64(1), None, ("a",)):
        with pytest.raises(InvalidEvent, match=r"^event: expected text as names"):
            read_back({**STARTED, name: 1})


def test_the_size_of_a_reference_has_64_bits() -> None:
    for size in (2**63, 10**5000, -1, True, Decimal(1), numpy.float64(1)):
        with pytest.raises(InvalidEvent, match=r"^output_ref: size: expected a 64-bit integer"):
            read_back({**COMPLETED, "output_ref": {"sha256": "0f" * 32, "size": size, "encoding": "zstd"}})


def test_a_time_that_is_no_time_is_refused() -> None:
    with pytest.raises(InvalidEvent, match=r"^occurred_at: "):
        read_back({**STARTED, "occurred_at": NotATime(2026, 1, 31, tzinfo=UTC)})


def test_a_model_that_was_never_validated_is_checked_too() -> None:
    unchecked: dict[str, Any] = {**STARTED, "timeout_s": Decimal(3), "metadata": {"a": numpy.int64(1)}}
    started = EvaluationStarted.model_construct(**unchecked)
    assert read_back(started) == read_back({**STARTED, "timeout_s": 3.0, "metadata": {"a": 1}})
    with pytest.raises(InvalidEvent, match=r"^exit_code: "):
        read_back(EvaluationCompleted.model_construct(eval_id="e", exit_code="0"))
    with pytest.raises(InvalidEvent, match=r"^eval_id: required"):
        read_back(EvaluationStarted.model_construct())


def test_a_bulk_names_the_bad_event_and_its_field() -> None:
    bad: list[Any] = [
        {**STARTED, "eval_id": "other", "metadata": {"a": object()}},
        {**STARTED, "eval_id": "/", "timeout_s": math.inf},
        EvaluationStarted.model_construct(eval_id="third", timeout_s="1"),
        5,
    ]
    with pytest.raises(InvalidEvent) as refused:
        store_evaluations([STARTED, *bad])
    assert [(fault.field, fault.problem.partition("(")[2]) for fault in refused.value.faults] == [
        ("[1].metadata", "eval_id other)"),
        ("[2].eval_id", ""),
        ("[2].timeout_s", ""),
        ("[3].timeout_s", "eval_id third)"),
        ("[4].event", ""),
    ]
    for nothing in (None, 5):
        with pytest.raises(InvalidEvent, match=r"^events: expected a list of events"):
            store_evaluations(nothing)  # type: ignore[arg-type]


@pytest.mark.parametrize("at", ["2026-01-31T09:30:00+00:00", "2026-01-31T09:30:00+01:00"])
def test_an_event_keeps_its_metadata_where_the_sender_fills_the_object_anew(at: str) -> None:
    metadata = {"number": 1}
    travelling, _ = _complete({**STARTED, "occurred_at": at, "metadata": metadata}, Settings())
    metadata["number"] = 2
    assert travelling["metadata"] == {"number": 1}


scalars: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.decimals()
    | st.fractions()
    | st.text(st.characters(exclude_categories=()), max_size=5)
    # Hypothesis prints its strategies, and Python does not print an integer of 5,000 digits.
    | st.sampled_from([*(value for value in JUNK if type(value) is not int), *(value for *_, value, _ in SENT)])
    | st.text(max_size=3).map(Text)
    | st.integers().map(Int)
    | st.floats().map(Float)
    | st.floats().map(numpy.float64)
    | st.floats(width=32).map(numpy.float32)
    | st.integers(-(2**63), 2**63 - 1).map(numpy.int64)
    | st.integers(0, 2**64 - 1).map(numpy.uint64)
    | st.booleans().map(numpy.bool_)
    | st.binary(max_size=4)
    | st.uuids()
    | st.datetimes(timezones=st.none() | st.just(UTC))
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=5,
)
fields = [*COMPLETED, "attempt", "metadata", "memory_bytes", "duration_ms", "executor_id", "output", "output_ref", "timeout_s"]


@settings(max_examples=1000, deadline=None)
@given(
    st.sampled_from([STARTED, COMPLETED, QUEUED]),
    st.dictionaries(st.sampled_from([*fields, "output_b64", "unknown"]), anything, max_size=2),
    st.none() | st.dictionaries(st.text(max_size=3), anything, max_size=3),
)
@example(STARTED, {"occurred_at": datetime(2000, 1, 1, fold=1, tzinfo=UTC)}, None)
def test_whatever_is_given_is_refused_by_name_or_read_back_the_same(
    event: Mapping[str, Any], changed: dict[str, Any], metadata: dict[str, Any] | None
) -> None:
    changed = {name: value for name, value in changed.items() if value is not None}
    given = {"metadata": metadata, **event, **changed}
    try:
        stored = read_back(given)
    except InvalidEvent:
        return
    assert repr(stored) == repr(to_row(check(given)))
