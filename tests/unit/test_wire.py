"""The quick way to read a message never differs from the thorough one: it gives the same, or leaves it to the other."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from enum import IntEnum, StrEnum
from fractions import Fraction
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.errors import InvalidEvent
from models.events import check, decode, parse
from models.fast_decode import check_and_encode, decode_event, decode_message
from models.record import EventRow, to_row
from tasks import store_evaluation

EVENT_ID = "01a202b1-c662-77cc-b904-b98111ee0b99"
REF = {"sha256": "0f" * 32, "size": 5, "encoding": "zstd"}
USUAL: dict[str, dict[str, Any]] = {
    "queued": {
        "code": "print(1)",
        "run_id": "r",
        "language": "lua",
        "submitter": "me",
        "metadata": {"a": [1, 2.5, None, {"b": "c"}]},
    },
    "started": {"executor_id": "e", "container_id": "", "timeout_s": 30, "attempt": 3},
    "completed": {"exit_code": -1, "output": "é😀", "error": "", "duration_ms": 1.5, "memory_bytes": 2**40, "score": 1},
    "failed": {"error": "no", "exit_code": 137, "executor_id": "e"},
    "timed_out": {"output": "…", "duration_ms": 9},
    "cancelled": {"reason": "enough"},
}


def message(event: Mapping[str, Any], **changed: Any) -> bytes:
    fields = {
        "queue_name": "evaluations",
        "actor_name": "store_evaluation",
        "args": [event],
        "kwargs": {},
        "options": {"redis_message_id": "r"},
        "message_id": EVENT_ID,
        "message_timestamp": 1_790_000_000_000,
    }
    return json.dumps(fields | changed, ensure_ascii=False).encode("utf-8", "surrogatepass")


def usual(kind: str, **changed: Any) -> dict[str, Any]:
    common = {"type": f"evaluation:{kind}", "eval_id": "e", "event_id": EVENT_ID, "occurred_at": "2026-01-31T09:30:00.25Z"}
    return common | USUAL[kind] | changed


def thorough(body: bytes) -> EventRow | None:
    try:
        return to_row(parse(decode(body)["args"][0]))
    except InvalidEvent:
        return None


@pytest.mark.parametrize("kind", USUAL)
def test_the_usual_events_are_read_quickly_and_exactly(kind: str) -> None:
    body = message(usual(kind))

    quick = decode_message(body, max_content_bytes=10**6)

    assert quick is not None
    assert quick == thorough(body)
    assert [type(value) for value in quick] == [type(value) for value in thorough(body) or ()]


@pytest.mark.parametrize("kind", USUAL)
def test_absent_and_null_fields_are_the_same_quickly_too(kind: str) -> None:
    needed: dict[str, dict[str, Any]] = {"queued": {"code": ""}, "completed": {"exit_code": 0}, "failed": {"error": ""}}
    required = needed.get(kind, {})
    bare = {name: value for name, value in usual(kind).items() if name not in USUAL[kind]} | required
    nulls = {**dict.fromkeys([*USUAL[kind], "metadata", "attempt"]), **bare}

    assert decode_message(message(bare), max_content_bytes=10**6) == thorough(message(bare))
    assert decode_message(message(nulls), max_content_bytes=10**6) == thorough(message(nulls)) == thorough(message(bare))
    assert thorough(message(bare)) is not None


@pytest.mark.parametrize(
    "changed",
    [
        {"actor_name": "another"},
        {"kwargs": {"a": 1}},
        {"options": {"redis_message_id": "r", "throws": ["x"]}},
        {"args": []},
        {"args": [1, 2]},
        {"message_id": 5},
        {"message_timestamp": "now"},
    ],
    ids=str,
)
def test_an_unusual_envelope_is_left_to_the_thorough_way(changed: dict[str, Any]) -> None:
    assert decode_message(message(usual("started"), **changed), max_content_bytes=10**6) is None


@pytest.mark.parametrize("traceparent", [f"00-{'ab' * 16}-{'cd' * 8}-01", "nonsense", 5, ["x"], None], ids=str)
def test_a_message_with_a_trace_is_read_quickly_whatever_is_wrong_with_the_trace(traceparent: object) -> None:
    found: dict[bytes, Any] = {}
    options = {"redis_message_id": "r", "traceparent": traceparent, "tracestate": "a=b"}

    body = message(usual("started"), options=options)
    quick = decode_message(body, max_content_bytes=10**6, traceparents=found, redis_id=b"r")

    assert quick == thorough(message(usual("started")))
    assert found == ({} if traceparent is None else {b"r": traceparent})


def test_content_that_may_be_too_large_is_left_to_the_thorough_way() -> None:
    assert decode_message(message(usual("queued", code="x" * 2000)), max_content_bytes=1000) is None


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=()), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
of_field: dict[str, st.SearchStrategy[Any]] = {
    "eval_id": st.sampled_from(["e", "a.b~c:d@e+f=g-h_i", ".", "..", "...", "", "a" * 200, "a" * 201, "é", "a\n", "a b", ".a"]),
    "event_id": st.sampled_from(
        [EVENT_ID, EVENT_ID.upper(), EVENT_ID.replace("-", ""), f"{{{EVENT_ID}}}", f"urn:uuid:{EVENT_ID}", "x"]
    ),
    "occurred_at": st.sampled_from(
        [
            *("2026-01-31T09:30:00Z", "2026-01-31T09:30:00.123456Z", "2026-01-31T09:30:00.1234567Z"),
            *("2026-01-31T09:30:00+00:00", "2026-01-31T09:30:00-00:00", "2026-01-31T09:30:00+02:00"),
            *("2026-01-31t09:30:00z", "2026-01-31 09:30:00Z", "2026-02-30T09:30:00Z", "2026-01-31T24:00:00Z"),
            *("2026-01-31T09:30:60Z", "1969-12-31T23:59:59Z", "1970-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z"),
            *("0001-01-01T00:00:00Z", "2026-01-31T09:30:00", "2026-01-31", "2026-01-31T09:30:00.Z", ""),
        ]
    ),
    "attempt": st.sampled_from([1, 1_000_000, 0, 1_000_001, 1.0, True, "1"]),
    "exit_code": st.sampled_from([0, -(2**63), 2**63 - 1, 2**63, -(2**63) - 1, 0.0, False]),
    "memory_bytes": st.sampled_from([0, 2**63 - 1, 2**63, 1.5]),
    "duration_ms": st.sampled_from([0, -0.0, 1e308, 10**400, 2**53 + 1, -1, True]),
    "score": st.sampled_from([0, -0.0, 1e308, 10**400, -1, "1", None]),
    "run_id": st.sampled_from(["r", "", ".", "a" * 200, "a" * 201, "a b", None]),
    "timeout_s": st.sampled_from([0, 0.1, 10**30, "1"]),
    "language": st.sampled_from(["", "x" * 1000, "x" * 1001, "😀" * 1000, "a\0b", "\ud800"]),
    "output": st.text(st.characters(exclude_categories=()), max_size=20),
    "code": st.text(st.characters(exclude_categories=()), max_size=20),
    "metadata": st.dictionaries(st.text(st.characters(exclude_categories=()), max_size=3), anything, max_size=4),
    "code_ref": st.sampled_from([REF, REF | {"size": -1}]),
    "output_ref": st.sampled_from([REF, REF | {"sha256": ""}]),
    "code_b64": st.sampled_from(["YQ==", "!"]),
    "type": st.sampled_from([*(f"evaluation:{kind}" for kind in [*USUAL, "running", "lost", "other"]), 5, None]),
    "unknown": anything,
}
changes = st.dictionaries(st.sampled_from(list(of_field)), st.none(), max_size=3).flatmap(
    lambda names: st.fixed_dictionaries({name: of_field[name] | anything for name in names})
)


@settings(max_examples=1500, deadline=None)
@given(
    st.sampled_from(list(USUAL)), changes, st.sets(st.sampled_from(["event_id", "occurred_at", "code", "exit_code", "error"]))
)
@example("queued", {"metadata": {"a": "\0"}}, set())
@example("queued", {"code": "\0"}, set())
@example("completed", {"output": "\ud83d\ude00"}, set())
@example("started", {"metadata": {"n": 2**63}}, set())
@example("started", {"metadata": {"k" * 70_000: 1}}, set())
def test_the_fast_path_agrees_with_the_slow_path_or_returns_none(
    kind: str, changed: dict[str, Any], left_out: set[str]
) -> None:
    event = {name: value for name, value in usual(kind, **changed).items() if name not in left_out}
    body = message(event)

    quick = decode_message(body, max_content_bytes=10**6)

    if quick is not None:
        assert quick == thorough(body)
        assert repr(quick) == repr(thorough(body))

    bare = json.dumps(event, ensure_ascii=False).encode("utf-8", "surrogatepass")
    if (alone := decode_event(bare, max_content_bytes=10**6)) is not None:
        assert repr(alone) == repr(to_row(check(decode(bare))))
    assert changed or left_out or alone == quick is not None


class _Text(str):
    __slots__ = ()


class _Word(StrEnum):
    STARTED = "evaluation:started"


class _Number(IntEnum):
    ONE = 1


# What a dictionary may hold and JSON does not, or not as it is.
odd = st.sampled_from(
    [
        *(float("nan"), float("inf"), float("-inf"), Decimal("1.5"), _Number.ONE, Fraction(1, 2), 2**63, -(2**70)),
        *(b"bytes", bytearray(b"b"), _Text(EVENT_ID), _Word.STARTED, UUID(EVENT_ID), datetime(2026, 1, 31, 9, 30, tzinfo=UTC)),
        *((1, 2), {1}, {5: 1}, {_Text("k"): 1}, {"n": float("nan")}, {"n": [float("inf")]}, {"t": (1,)}, {"d": Decimal(1)}),
        *(
            {"b": True, "n": None, "i": -(2**63), "f": -0.0},
            {"i": 2**63},
            {"k" * 70_000: 1},
            {"\ud800": 1},
            {"\0": 1},
            {"a": "\0"},
        ),
    ]
)


@settings(max_examples=1500, deadline=None)
@given(
    st.sampled_from(list(USUAL)),
    changes,
    st.dictionaries(st.sampled_from([*of_field, "error", "reason", "executor_id"]), odd, max_size=1),
    st.sets(st.sampled_from(["event_id", "occurred_at", "code", "exit_code", "error"])),
)
@example("started", {}, {"timeout_s": float("nan")}, set())
@example("completed", {}, {"score": float("nan")}, set())
@example("started", {}, {"metadata": {5: 1}}, set())
@example("completed", {}, {"output": b"bytes"}, set())
@example("completed", {"memory_bytes": 2**70}, {}, set())
@example("queued", {"code": "\ud800"}, {}, set())
@example("started", {"type": ["evaluation:started"]}, {}, set())
@example("started", {"metadata": {"k" * 9000: 2**63 - 1}}, {}, set())
def test_an_event_that_a_sender_gives_is_checked_quickly_to_the_same_end(
    kind: str, changed: dict[str, Any], oddly: dict[str, Any], left_out: set[str]
) -> None:
    event = {name: value for name, value in (usual(kind, **changed) | oddly).items() if name not in left_out}

    if (found := check_and_encode(event, max_content_bytes=10**6)) is not None:
        occurred_at, body = found
        checked = check(event)
        assert checked.occurred_at == occurred_at
        assert event["event_id"] == str(checked.event_id)
        assert body == msgspec.json.encode(event)
        assert decode_message(message(event), max_content_bytes=10**6) == to_row(checked) == thorough(message(event))


@pytest.mark.parametrize("kind", USUAL)
@pytest.mark.parametrize("at", ["2026-01-31T09:30:00.25Z", "2026-01-31T09:30:00.250001+00:00", "2026-01-31T09:30:00Z"])
def test_the_usual_events_of_senders_are_checked_quickly(kind: str, at: str) -> None:
    flat = usual(kind, metadata={"a": 1, "b": 2.5, "c": None, "d": "e"}, occurred_at=at)

    found = check_and_encode(flat, max_content_bytes=10**6)

    assert found is not None
    assert found[0] == check(flat).occurred_at


@pytest.mark.parametrize("kind", USUAL)
def test_an_event_travels_as_the_thorough_way_would_have_it(kind: str) -> None:
    usually = usual(kind, metadata={"a": 1}, occurred_at="2026-01-31T10:30:00.25+00:00")
    # An id in capitals is right, and not the usual form.
    (quick,) = store_evaluation.message_with_options(args=(usually,)).args
    (slow,) = store_evaluation.message_with_options(args=(usually | {"event_id": EVENT_ID.upper()},)).args

    assert check_and_encode(usually, max_content_bytes=10**6) is not None
    assert check_and_encode(usually | {"event_id": EVENT_ID.upper()}, max_content_bytes=10**6) is None
    assert quick == slow == usually | {"occurred_at": "2026-01-31T10:30:00.250000Z"}
