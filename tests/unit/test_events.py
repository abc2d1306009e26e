"""The event: every row of DESIGN's table and every sentence of its rules, for good and for bad input."""

import base64
import contextlib
import json
import math
import re
import string
from datetime import UTC, datetime, timedelta, timezone
from enum import StrEnum
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import EvaluationStarted, Event, InvalidEvent
from models.content import Reference
from models.events import check, decode, identified, parse
from models.record import jsonb, to_row

ID = "0190a2f5-7a4c-7000-8000-000000000001"
AT = "2026-01-31T09:30:00.250000Z"
QUEUED = {"type": "evaluation:queued", "eval_id": "e", "code": "print(1)"}
STARTED = {"type": "evaluation:started", "eval_id": "e"}
COMPLETED = {"type": "evaluation:completed", "eval_id": "e", "exit_code": 0}
FAILED = {"type": "evaluation:failed", "eval_id": "e", "error": "boom"}
TIMED_OUT = {"type": "evaluation:timed_out", "eval_id": "e"}
CANCELLED = {"type": "evaluation:cancelled", "eval_id": "e"}
LOST = {"type": "evaluation:lost", "eval_id": "e"}
SENT: list[dict[str, Any]] = [QUEUED, STARTED, COMPLETED, FAILED, TIMED_OUT, CANCELLED]
RESULTS = [COMPLETED, FAILED, TIMED_OUT]
RAN = [STARTED, *RESULTS]
REF = {"sha256": "0f" * 32, "size": 5, "encoding": "identity"}
FIELDS: dict[str, Any] = {
    "code": "x",
    "code_b64": "eA==",
    "code_ref": REF,
    "run_id": "r",
    "language": "python",
    "submitter": "s",
    "executor_id": "x",
    "container_id": "c",
    "timeout_s": 1.5,
    "exit_code": 0,
    "output": "o",
    "output_b64": "bw==",
    "output_ref": REF,
    "error": "e",
    "error_b64": "ZQ==",
    "error_ref": REF,
    "duration_ms": 1.5,
    "memory_bytes": 1,
    "score": 0.5,
    "reason": "r",
}
TEXTS = [
    *((event, name) for event in [QUEUED] for name in ("language", "submitter")),
    *((event, name) for event in RAN for name in ("executor_id", "container_id")),
    (CANCELLED, "reason"),
]
NUMBERS = [(STARTED, "timeout_s"), (COMPLETED, "score"), *((event, "duration_ms") for event in RESULTS)]
INTEGERS = [(event, name) for event in RESULTS for name in ("exit_code", "memory_bytes")]
CONTENTS = [(QUEUED, "code"), *((event, name) for event in RESULTS for name in ("output", "error"))]
INT64 = (-(2**63), 2**63 - 1)


def faults_of(event: object, **limits: int) -> dict[str, str]:
    with pytest.raises(InvalidEvent) as refused:
        check(event, **limits)
    return dict(refused.value.faults)


def without(event: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key != name}


def named(event: dict[str, Any]) -> Event:
    return parse({**event, "event_id": event.get("event_id") or ID, "occurred_at": event.get("occurred_at") or AT})


@pytest.mark.parametrize("event", SENT, ids=lambda event: event["type"])
def test_an_event_needs_no_more_than_what_is_required(event: dict[str, Any]) -> None:
    checked = check(event)
    assert (checked.type, checked.eval_id, checked.attempt) == (event["type"], "e", 1)
    assert (checked.event_id, checked.occurred_at, checked.metadata) == (None, None, None)
    assert parse(event) == checked


@pytest.mark.parametrize(
    ("event", "required"),
    [
        *((event, "type") for event in SENT),
        *((event, "eval_id") for event in SENT),
        (QUEUED, "code"),
        (COMPLETED, "exit_code"),
        (FAILED, "error"),
    ],
)
@pytest.mark.parametrize("null", [False, True])
def test_a_required_field_that_is_missing_or_null_is_named(event: dict[str, Any], required: str, null: bool) -> None:
    given = event | {required: None} if null else without(event, required)
    assert list(faults_of(given)) == [required]
    with pytest.raises(InvalidEvent, match=rf"^{required}: "):
        parse(given)


def test_exit_code_is_required_only_where_the_code_ran_to_its_end() -> None:
    assert [check(event).model_dump()["exit_code"] for event in (FAILED, TIMED_OUT)] == [None, None]


@pytest.mark.parametrize("event", SENT, ids=lambda event: event["type"])
def test_each_type_takes_its_own_fields_and_names_every_other(event: dict[str, Any]) -> None:
    others = {
        "evaluation:queued": {"code", "code_b64", "code_ref", "run_id", "language", "submitter"},
        "evaluation:started": {"executor_id", "container_id", "timeout_s"},
        "evaluation:cancelled": {"reason"},
    }
    results = set(FIELDS) - set().union(*others.values()) | {"executor_id", "container_id"}
    allowed = others.get(event["type"], results if event == COMPLETED else results - {"score"})
    for name, value in FIELDS.items():
        with_field = without(event, name.removesuffix("_b64").removesuffix("_ref")) | {name: value}
        if name in allowed:
            assert check(with_field).model_dump()[name] == value
        else:
            assert set(faults_of(event | {name: value})) == {name}


def test_the_type_running_means_started() -> None:
    running = {**STARTED, "type": "evaluation:running", "timeout_s": 3}
    assert check(running) == check({**STARTED, "timeout_s": 3})
    assert check(running).type == "evaluation:started"
    assert to_row(named(running)) == to_row(named({**STARTED, "timeout_s": 3}))


def test_lost_is_written_by_the_system_alone() -> None:
    assert faults_of(LOST) == {"type": "evaluation:lost is written by the system alone"}
    assert parse(LOST).type == "evaluation:lost"


@pytest.mark.parametrize(
    "type_", ["evaluation:done", "queued", "", "EVALUATION:QUEUED", 1, True, [], {}, ["evaluation:queued"]]
)
def test_an_unknown_type_is_named_along_with_what_else_is_wrong(type_: object) -> None:
    assert set(faults_of({"type": type_, "eval_id": ".", "attempt": 0})) == {"type", "eval_id", "attempt"}
    assert "evaluation:lost" not in faults_of({"type": type_, "eval_id": "e"})["type"]


@pytest.mark.parametrize("data", [None, 1, "x", b"x", [], [QUEUED], True, 1.5])
def test_an_event_is_an_object(data: object) -> None:
    assert list(faults_of(data)) == ["event"]
    with pytest.raises(InvalidEvent, match=r"^event: "):
        parse(data)


def test_all_wrong_fields_are_named_at_once() -> None:
    wrong: dict[str, Any] = {
        "type": "evaluation:completed",
        "eval_id": "",
        "event_id": "x",
        "occurred_at": "yesterday",
        "attempt": 0,
        "metadata": [],
        "executor_id": "\0",
        "container_id": 5,
        "exit_code": "0",
        "output": 5,
        "error_b64": "?",
        "duration_ms": math.nan,
        "memory_bytes": True,
        "score": "high",
        "exitcode": 1,
    }
    assert set(faults_of(wrong)) == set(wrong) - {"type"}
    assert faults_of(wrong)["exitcode"].endswith("did you mean exit_code?")
    with pytest.raises(InvalidEvent) as refused:
        parse(wrong)
    assert {fault.field for fault in refused.value.faults} == set(wrong) - {"type", "exitcode"}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"exit_code": "0"}, "exit_code: expected an integer, not str"),
        ({"exit_code": 1.5}, "exit_code: expected an integer, not float"),
        ({"exit_code": None}, "exit_code: required"),
        ({"attempt": 0}, "attempt: expected at least 1"),
        ({"attempt": 1_000_001}, "attempt: expected at most 1,000,000"),
        ({"duration_ms": "1"}, "duration_ms: expected a number, not str"),
        ({"score": math.nan}, "score: expected a finite number"),
        ({"duration_ms": math.inf}, "duration_ms: expected a finite number"),
        ({"executor_id": "a\0"}, "executor_id: NUL is not allowed"),
        ({"executor_id": "\ud800"}, "executor_id: lone surrogates are not allowed"),
        ({"executor_id": "x" * 1001}, "executor_id: expected at most 1,000 characters"),
        ({"output": b"x"}, "output: expected text, not bytes; as base64 they may be output_b64"),
        ({"submitter": "anna"}, "submitter: not a field of evaluation:completed, but of evaluation:queued"),
        ({"type": "evaluation:complete"}, "did you mean evaluation:completed?"),
    ],
)
def test_what_is_wrong_is_told_in_plain_words(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidEvent) as refused:
        check({"type": "evaluation:completed", "eval_id": "e", "exit_code": 0} | wrong)
    assert told in str(refused.value)


@pytest.mark.parametrize("field", ["event_id", "occurred_at", "attempt", "metadata", *FIELDS])
def test_null_means_absent_even_where_the_field_has_no_place(field: str) -> None:
    for event in SENT:
        if event.get(field) is None:
            assert check(event | {field: None}) == check(event)
            assert to_row(named(event | {field: None})) == to_row(named(event))


@pytest.mark.parametrize(("event", "name"), [*TEXTS, *CONTENTS])
def test_an_empty_text_is_a_value(event: dict[str, Any], name: str) -> None:
    assert check({**event, name: ""}).model_dump()[name] == ""
    stored = getattr(to_row(named({**event, name: ""})), name)
    assert stored in ("", b"")


@pytest.mark.parametrize("field", ["type", "eval_id", "event_id", "occurred_at", "attempt", "metadata"])
def test_an_empty_text_is_not_absent_elsewhere(field: str) -> None:
    assert list(faults_of({**QUEUED, field: ""})) == [field]


@pytest.mark.parametrize(
    "eval_id", ["a", "Z", "0", "...", "-", "~", "a" * 200, string.ascii_letters + string.digits + "._~:@+=-"]
)
def test_a_good_eval_id(eval_id: str) -> None:
    assert check({**STARTED, "eval_id": eval_id}).eval_id == eval_id


@pytest.mark.parametrize(
    "eval_id",
    [
        *("", ".", "..", "a" * 201),
        *("a b", "a/b", "a\n", "\na", "a\0", "é", "\uff21", "a%20", "a,b", "a\\b", "\ud800"),
        *(1, True, None, b"a", ["a"]),
    ],
)
def test_a_bad_eval_id(eval_id: object) -> None:
    assert list(faults_of({**STARTED, "eval_id": eval_id})) == ["eval_id"]


@pytest.mark.parametrize("event_id", [ID, ID.upper(), UUID(ID)])
def test_a_good_event_id(event_id: object) -> None:
    assert check({**STARTED, "event_id": event_id}).event_id == UUID(ID)


@pytest.mark.parametrize(
    "event_id",
    ["", "x", ID[:-1], ID + "0", f"{{{ID}}}", f"urn:uuid:{ID}", ID.replace("-", ""), f" {ID}", f"{ID}\n", 5, True, [ID]],
)
def test_a_bad_event_id(event_id: object) -> None:
    assert list(faults_of({**STARTED, "event_id": event_id})) == ["event_id"]


@pytest.mark.parametrize(
    ("occurred_at", "utc"),
    [
        ("1970-01-01T00:00:00Z", "1970-01-01 00:00:00+00:00"),
        ("1969-12-31T23:00:00-01:00", "1970-01-01 00:00:00+00:00"),
        ("9999-12-31T23:59:59.999999Z", "9999-12-31 23:59:59.999999+00:00"),
        ("9999-12-31T23:59:59.9999999999Z", "9999-12-31 23:59:59.999999+00:00"),
        ("2026-01-31T09:30:00.2500009Z", "2026-01-31 09:30:00.250000+00:00"),
        ("2026-01-31T09:30:00.1Z", "2026-01-31 09:30:00.100000+00:00"),
        ("2026-01-31t09:30:00z", "2026-01-31 09:30:00+00:00"),
        ("2026-01-31 09:30:00-00:00", "2026-01-31 09:30:00+00:00"),
        ("2026-01-31T09:30:00+23:59", "2026-01-30 09:31:00+00:00"),
        ("2024-02-29T00:00:00+05:30", "2024-02-28 18:30:00+00:00"),
        (datetime(2026, 1, 31, 9, tzinfo=timezone(timedelta(hours=2))), "2026-01-31 07:00:00+00:00"),
    ],
)
def test_a_good_occurred_at_is_a_moment_in_utc_truncated_to_microseconds(occurred_at: object, utc: str) -> None:
    moment = check({**STARTED, "occurred_at": occurred_at}).occurred_at
    assert str(moment) == utc
    assert moment is not None
    assert moment.tzinfo is UTC


@pytest.mark.parametrize(
    "occurred_at",
    [
        "1969-12-31T23:59:59.999999Z",
        "1970-01-01T00:59:59+01:00",
        "9999-12-31T23:59:59-00:01",
        "10000-01-01T00:00:00Z",
        "+10000-01-01T00:00:00Z",
        "0000-01-01T00:00:00Z",
        "0001-01-01T00:00:00+23:59",
        "-001-01-01T00:00:00Z",
        "2016-12-31T23:59:60Z",
        "2017-01-01T00:59:60+01:00",
        "2023-02-29T00:00:00Z",
        "2026-13-01T00:00:00Z",
        "2026-01-31T24:00:00Z",
        "2026-01-31T09:60:00Z",
        "2026-01-31T09:30:00",
        "2026-01-31T09:30Z",
        "2026-01-31",
        "2026-01-31T09:30:00+0100",
        "2026-01-31T09:30:00+24:00",
        "2026-01-31T09:30:00+01:60",
        "2026-01-31T09:30:00.Z",
        "2026-01-31T09:30:00,5Z",
        "2026-W05-6T09:30:00Z",
        "20260131T093000Z",
        "\uff12\uff1026-01-31T09:30:00Z",
        "2026-01-31T09:30:00Z\n",
        " 2026-01-31T09:30:00Z",
        "",
        "now",
        1769851800,
        1.5,
        True,
        datetime(2026, 1, 31),  # noqa: DTZ001 - naive on purpose
        datetime.min.replace(tzinfo=timezone(timedelta(hours=1))),
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))),
    ],
)
def test_a_bad_occurred_at(occurred_at: object) -> None:
    assert list(faults_of({**STARTED, "occurred_at": occurred_at})) == ["occurred_at"]


@pytest.mark.parametrize("attempt", [1, 2, 1_000_000])
def test_a_good_attempt(attempt: int) -> None:
    assert check({**STARTED, "attempt": attempt}).attempt == attempt


@pytest.mark.parametrize("attempt", [0, -1, 1_000_001, 2**63, 10**400, 1.0, "1", True, False, [1], math.nan])
def test_a_bad_attempt(attempt: object) -> None:
    assert list(faults_of({**STARTED, "attempt": attempt})) == ["attempt"]


@pytest.mark.parametrize(("event", "name"), TEXTS)
def test_text_is_up_to_1000_characters_without_nul_and_lone_surrogates(event: dict[str, Any], name: str) -> None:
    for good in ("x" * 1000, "😀" * 1000, "a\nb\r\n\x1b[31m\x7f\u202e"):
        assert check({**event, name: good}).model_dump()[name] == good
    bad: Any
    for bad in ("x" * 1001, "a\0b", "\0", "\ud800", "a\udfff", "\ude00\ud83d", 1, True, 1.5, b"x", ["x"], {}):
        assert list(faults_of({**event, name: bad})) == [name]


@pytest.mark.parametrize(("event", "name"), NUMBERS)
def test_a_number_is_a_finite_double(event: dict[str, Any], name: str) -> None:
    for good in (0, 1, -1, 1.5, -0.0, 1e300, 5e-324, 2**53, 2**64):
        assert check({**event, name: good}).model_dump()[name] == good
    bad: Any
    for bad in (math.nan, math.inf, -math.inf, 10**400, "1", "1.5", True, False, [1], {}):
        assert list(faults_of({**event, name: bad})) == [name]


@pytest.mark.parametrize(("event", "name"), INTEGERS)
def test_an_integer_has_64_bits(event: dict[str, Any], name: str) -> None:
    for good in (0, -1, 137, *INT64):
        assert check({**event, name: good}).model_dump()[name] == good
    bad: Any
    for bad in (INT64[0] - 1, INT64[1] + 1, 10**400, 0.0, 1.5, math.nan, "0", True, False, [0]):
        assert list(faults_of({**event, name: bad})) == [name]


@pytest.mark.parametrize(("event", "name"), CONTENTS)
def test_content_is_any_string_or_any_bytes(event: dict[str, Any], name: str) -> None:
    every_byte = bytes(range(256))
    for text in ("", "\0", "\ud800", "\udfff\ud800", "😀", "\ud83d\ude00", "x\r\n"):
        assert check({**event, name: text}).model_dump()[name] == text
    for data in (b"", every_byte):
        given = without(event, name) | {f"{name}_b64": base64.b64encode(data).decode()}
        assert getattr(to_row(named(given)), name) == data
        assert check(given) == parse(given)
    bad: Any
    for bad in (1, True, 1.5, b"x", ["x"], {}, bytearray(b"x")):
        assert list(faults_of({**event, name: bad})) == [name]


@pytest.mark.parametrize(
    "b64", ["eA", "eA=", "e A==", "eA==\n", "eA==eA==", "=", "====", "-_-_", "é", "\ud800", "a" * 5, 1, True, b"eA=="]
)
def test_bytes_travel_as_base64_with_padding_and_nothing_else(b64: object) -> None:
    assert list(faults_of(without(QUEUED, "code") | {"code_b64": b64})) == ["code_b64"]


@pytest.mark.parametrize(("event", "name"), CONTENTS)
def test_content_given_twice_is_refused(event: dict[str, Any], name: str) -> None:
    for other in ({f"{name}_b64": ""}, {f"{name}_ref": REF}):
        assert list(faults_of({**event, name: "", **other})) == [name]
    assert list(faults_of(without(event, name) | {f"{name}_b64": "", f"{name}_ref": REF})) == [name]


@pytest.mark.parametrize(("event", "name"), CONTENTS)
@pytest.mark.parametrize(
    "ref",
    [
        REF,
        REF | {"size": 0},
        REF | {"size": 4 * 1024 * 1024 - 1},
        REF | {"size": 1, "encoding": "zstd"},
        REF | {"size": 100 * 1024 * 1024, "encoding": "zstd"},
    ],
)
def test_a_reference_stands_for_content(event: dict[str, Any], name: str, ref: dict[str, Any]) -> None:
    given = without(event, name) | {f"{name}_ref": ref}
    checked = check(given)
    assert checked.model_dump()[f"{name}_ref"] == ref
    assert getattr(to_row(named(given)), name) == Reference(**ref)
    assert check(checked) == checked == parse(given)
    assert check(given | {f"{name}_ref": Reference(**ref)}) == checked


NO_OBJECTS: list[Any] = [1, True, "x", b"x", [], [*REF.values()], {}]
BAD_PARTS: dict[str, list[Any]] = {
    "sha256": ["0f" * 31, "0F" * 32, "0f" * 32 + "\n", "\u0660" * 64, None, 1, ["x"]],
    "size": [-1, 1.0, True, "1", None, math.nan],
    "encoding": ["gzip", "", None, 1, ["zstd"], {}],
}


@pytest.mark.parametrize(
    ("ref", "problem"),
    [
        *((bad, "an object of sha256, size and encoding") for bad in NO_OBJECTS),
        *((without(REF, name), "an object of sha256, size and encoding") for name in REF),
        (REF | {"more": 1}, "an object of sha256, size and encoding"),
        *((REF | {name: bad}, f"{name}: ") for name, bads in BAD_PARTS.items() for bad in bads),
        (REF | {"size": 4 * 1024 * 1024}, "encoding: expected zstd"),
        (REF | {"size": 0, "encoding": "zstd"}, "encoding: expected identity"),
        (Reference("x", 1, "zstd"), "sha256: "),
    ],
    ids=str,
)
def test_a_bad_reference(ref: object, problem: str) -> None:
    faults = faults_of(without(QUEUED, "code") | {"code_ref": ref})
    assert list(faults) == ["code_ref"]
    assert problem in faults["code_ref"]


def test_what_a_reference_stands_for_is_measured_too() -> None:
    given = without(QUEUED, "code") | {"code_ref": REF}
    assert check(given, max_content_bytes=5)
    assert faults_of(given, max_content_bytes=4) == {"code": "5 bytes, expected at most 4"}


def test_content_is_measured_in_bytes_and_to_the_byte() -> None:
    for text, size in (("x" * 9, 9), ("é" * 5, 10), ("😀" * 3, 12), ("\ud83d\ude00" * 3, 12), ("\ud800" * 3, 9), ("\0" * 9, 9)):
        assert check({**QUEUED, "code": text}, max_content_bytes=size)
        assert list(faults_of({**QUEUED, "code": text}, max_content_bytes=size - 1)) == ["code"]
    for size in range(1, 8):
        given = {**STARTED, "type": "evaluation:failed", "error_b64": base64.b64encode(bytes(size)).decode()}
        assert check(given, max_content_bytes=size)
        assert list(faults_of(given, max_content_bytes=size - 1)) == ["error"]


def test_a_field_nobody_knows_is_refused_at_send_and_kept_at_arrival() -> None:
    unknown: dict[str, Any] = {
        "exitcode": 1,
        "nested": {"b": [1, None, {"c": "\ud800\0"}], "a": 10**30},
        "\ud800": "\udfff",
        "": "",
        "exit_code": "not even a number",
    }
    assert set(faults_of({**QUEUED, **unknown})) == {"exitcode", "nested", "\\ud800", "", "exit_code"}
    kept = to_row(named({**QUEUED, **unknown})).extra
    assert kept is not None
    assert kept.isascii()
    assert json.loads(kept) == unknown
    assert to_row(named({**dict(reversed(unknown.items())), **QUEUED})).extra == kept
    assert to_row(named(QUEUED)).extra is None


@pytest.mark.parametrize("value", [math.nan, math.inf, [{"a": -math.inf}]])
def test_nan_and_infinity_are_refused_in_fields_nobody_knows_too(value: object) -> None:
    with pytest.raises(InvalidEvent, match=r"^future: "):
        parse({**STARTED, "future": value})
    with pytest.raises(InvalidEvent, match=r"^\\ud800: "):
        parse({**STARTED, "\ud800": value})


@pytest.mark.parametrize("name", ["metadata", "future"])
def test_nothing_is_nested_so_deeply_that_it_cannot_be_stored(name: str) -> None:
    deepest = {"metadata": 100, "future": 500}[name]
    value: Any = 1
    for level in range(deepest):
        value = {"a": value} if level % 2 else [value]
    assert to_row(named({**STARTED, name: value}))
    with pytest.raises(InvalidEvent, match=rf"^{name}: .*nested deeper than {deepest} levels"):
        parse({**STARTED, name: {"a": value}})


@pytest.mark.parametrize("key", [1, None, b"x", ("a",), True])
def test_names_are_text(key: Any) -> None:
    assert faults_of({**QUEUED, key: 1}) == {"event": f"expected text as names, not {type(key).__name__}"}
    with pytest.raises(InvalidEvent):
        parse({**QUEUED, key: 1})
    assert list(faults_of({**QUEUED, "metadata": {key: 1}})) == ["metadata"]
    assert list(faults_of({**QUEUED, "metadata": {"a": [{key: 1}]}})) == ["metadata"]


class Colour(StrEnum):
    red = "red"


@pytest.mark.parametrize("event", SENT, ids=lambda event: event["type"])
def test_metadata_is_an_object_of_json(event: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "": "",
        "null": None,
        "numbers": [0, -1, *INT64, 2**53 + 1, 1e16, 1e300, 5e-324, -0.0, 0.1],
        "nested": [{"a": [[], {}]}, "é😀\u2028\x1b\x7f"],
        "bools": [True, False],
    }
    assert check({**event, "metadata": good}).metadata == good
    empty: Any
    for empty in ({}, None):
        assert check({**event, "metadata": empty}).metadata == empty


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [["a", 1]],
        "",
        "{}",
        0,
        True,
        {"a": math.nan},
        {"a": [math.inf]},
        {"a": {"b": -math.inf}},
        {"a": INT64[1] + 1},
        {"a": INT64[0] - 1},
        {"a": 10**400},
        {"a": "\0"},
        {"\0": 1},
        {"a": ["\ud800"]},
        {"\udfff": 1},
        {"a": "\ude00\ud83d"},
        {"a": b"x"},
        {"a": (1, 2)},
        {"a": {1}},
        {"a": datetime(2026, 1, 1, tzinfo=UTC)},
        {"a": UUID(ID)},
        {"a": Ellipsis},
    ],
    ids=ascii,
)
def test_bad_metadata(metadata: object) -> None:
    assert list(faults_of({**STARTED, "metadata": metadata})) == ["metadata"]


def test_metadata_holds_up_to_64_kib_of_json() -> None:
    room = 64 * 1024 - len('{"a":""}')
    for text in ("x" * room, "é" * (room // 2), '"' * (room // 2)):
        assert check({**STARTED, "metadata": {"a": text}})
        assert list(faults_of({**STARTED, "metadata": {"a": text + "xx"}})) == ["metadata"]


def test_metadata_that_contains_itself_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["a"] = [endless]
    assert list(faults_of({**STARTED, "metadata": endless})) == ["metadata"]


def test_members_of_a_text_enumeration_are_texts() -> None:
    checked = check({**QUEUED, "language": Colour.red, "metadata": {"colour": Colour.red}})
    assert to_row(named(dict(checked))).language == "red"


def test_a_model_is_checked_like_an_object() -> None:
    started = EvaluationStarted(eval_id="e", executor_id="x", metadata={"given": None, "nested": {"a": None}})
    assert check(started) == check(
        {**STARTED, "executor_id": "x", "metadata": {"given": None, "nested": {"a": None}}},
    )
    assert set(faults_of(started.model_copy(update={"exitcode": 1, "eval_id": "/"}))) == {"exitcode", "eval_id"}


def test_an_error_can_be_printed_whatever_it_names() -> None:
    with pytest.raises(InvalidEvent) as refused:
        check({**QUEUED, "\ud800": 1, "metadata": {"\udfff": 1}})
    assert str(refused.value).encode().isascii()


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{", b"nope", b"NaN", b"[Infinity]", b"-Infinity", b'{"a":1e999}'),
        *(b'"\xff"', b'"\xed\xa0\x80"', "{}".encode("utf-16")),
        *(b"[" * 100_000, b"1" * 5000),
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_what_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidEvent, match=r"^event: expected JSON"):
        decode(text)


def test_json_gives_exact_values() -> None:
    assert decode(rb'["\ud83d\ude00", "\ud83d", "\udfff\ud800", "\u0000"]') == ["😀", "\ud83d", "\udfff\ud800", "\0"]
    numbers = decode(b"[9007199254740993, 18446744073709551616, 1e16, 5e-324, -0.0, 1E5, 1.0]")
    assert numbers == [2**53 + 1, 2**64, 1e16, 5e-324, 0.0, 1e5, 1.0]
    assert [type(number) for number in numbers] == [int, int] + [float] * 5
    assert decode(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(*INT64) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=20,
)


@given(json_values)
def test_what_decode_gives_is_what_was_encoded(value: Any) -> None:
    assert decode(json.dumps(value).encode()) == value
    assert decode(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_json_for_postgresql_keeps_floats_floats_and_integers_integers(value: dict[str, Any]) -> None:
    back = json.loads(jsonb(value))
    assert repr(back) == repr(value)
    assert b"e+" not in jsonb({"a": 1e300})


odd_values = json_values | st.sampled_from([*FIELDS.values(), math.nan, 10**400, "\ud800", "\0", ID, AT, "e", "x" * 1001])
odd_names = st.sampled_from(["eval_id", "event_id", "occurred_at", "attempt", "metadata", *FIELDS, "future", "\ud800"])


@given(st.sampled_from([*SENT, LOST]), st.dictionaries(odd_names, odd_values), odd_values, odd_values)
def test_whatever_a_message_holds_it_is_stored_or_refused_and_nothing_else(
    event: dict[str, Any], odd: dict[str, Any], message_id: Any, timestamp: Any
) -> None:
    given = {**event, **odd}
    try:
        row = to_row(parse(identified(given, message_id, timestamp)))
        said = "".join(value for value in row if isinstance(value, str))
        assert jsonb(row.metadata or {})
    except InvalidEvent as refused:
        said = str(refused)
    assert said.encode()  # no lone surrogates
    with contextlib.suppress(InvalidEvent):
        check(given)


def test_an_event_without_identity_takes_its_messages() -> None:
    filled = identified(STARTED, ID, 1_769_851_800_250)
    assert parse(filled).event_id == UUID(ID)
    assert str(parse(filled).occurred_at) == "2026-01-31 09:30:00.250000+00:00"
    assert identified({**STARTED, "event_id": None, "occurred_at": None}, ID, 1_769_851_800_250) == filled


def test_an_event_keeps_its_own_identity_good_or_bad() -> None:
    own = {**STARTED, "event_id": "x", "occurred_at": "y"}
    assert identified(own, ID, 0) == own
    assert list(faults_of(own)) == ["event_id", "occurred_at"]
    assert identified({**STARTED, "event_id": "", "occurred_at": ""}, ID, 0)["event_id"] == ""


@pytest.mark.parametrize("message_id", ["", "7", "é", "\ud800", "\0", ID + "0"])
def test_a_message_id_that_is_no_uuid_gives_the_same_event_id_each_time(message_id: str) -> None:
    first, again = (identified(STARTED, message_id, 0)["event_id"] for _ in range(2))
    assert isinstance(first, UUID)
    assert first == again
    assert first != identified(STARTED, message_id + "x", 0)["event_id"]


@pytest.mark.parametrize("event", [None, 5, "x", "", [], [["eval_id", "e"]], True])
def test_only_an_object_has_an_identity(event: Any) -> None:
    with pytest.raises(InvalidEvent, match=r"^event: "):
        identified(event, ID, 0)


@pytest.mark.parametrize("message_id", [None, 7, True, ["x"], {}])
def test_a_message_id_that_is_no_text_is_named(message_id: Any) -> None:
    with pytest.raises(InvalidEvent, match=r"^event_id: "):
        identified(STARTED, message_id, 0)


@pytest.mark.parametrize("timestamp", [None, "0", [], math.nan, math.inf, 10**30, -(10**30), 253_402_300_800_000])
def test_a_message_timestamp_that_is_no_time_is_named(timestamp: Any) -> None:
    with pytest.raises(InvalidEvent, match=r"^occurred_at: "):
        identified(STARTED, ID, timestamp)


def test_a_message_from_before_1970_is_refused() -> None:
    with pytest.raises(InvalidEvent, match=r"^occurred_at: "):
        parse(identified(STARTED, ID, -1))


def test_what_is_wrong_with_metadata_is_told_in_a_line_however_deep_it_is_or_long_its_keys() -> None:
    deep: Any = 1
    for _ in range(200):
        deep = {"a": deep}
    for metadata in (deep, {"k" * 60_000: {"k" * 100: "\0"}}, {"\ud800" * 10_000: 1}):
        with pytest.raises(InvalidEvent) as raised:
            check({"type": "evaluation:started", "eval_id": "e", "metadata": metadata})
        assert re.match(
            r"metadata: metadata.{0,120}…?.{0,120}: (nested deeper than 100 levels|NUL|lone surr)", str(raised.value)
        )
