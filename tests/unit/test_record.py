"""The record is what DESIGN's sentences say, whatever the order of its events and however often each comes."""

import base64
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import fold, merge, merge_state
from models.content import Reference, from_bytes, to_bytes
from models.events import parse
from models.fold import Folded
from models.record import EventRow, to_row
from tests.factories import event

Json = dict[str, Any]
MORE = int(os.environ.get("EVALSTORE_MORE_EXAMPLES", "1"))
ENDINGS = ("evaluation:completed", "evaluation:failed", "evaluation:timed_out", "evaluation:cancelled")
# All of one form, so that as text they sort like the moments and the UUIDs they are.
TIMES = [f"2026-01-01T00:00:00.{micros:06}Z" for micros in (0, 1, 999_999)]
IDS = [f"{first}0000000-0000-4000-8000-00000000000{last}" for first in "08f" for last in "0f"]


def reference(given: list[Json]) -> Json:  # noqa: C901 - one sentence after another
    """DESIGN section 3, "The record is a function of the set of its events", sentence by sentence."""
    events: list[Json] = []
    for each in given:  # "The first one committed stands"
        if each["event_id"] not in [earlier["event_id"] for earlier in events]:
            events.append({name: value for name, value in each.items() if value is not None})

    def of(attempts: set[int], *types: str) -> list[Json]:
        """Those of some types and attempts, by (occurred_at, event_id)."""
        found = [e for e in events if e["type"] in types and e.get("attempt", 1) in attempts]
        return sorted(found, key=lambda e: (e["occurred_at"], e["event_id"]))

    def said(name: str, *sources: Json | None) -> Any:
        """The field from the first source that has it."""
        return next((source[name] for source in sources if source and name in source), None)

    def content(name: str, event: Json | None) -> str | bytes | Reference | None:
        if (ref := said(f"{name}_ref", event)) is not None:
            return Reference(**ref)
        data = said(f"{name}_b64", event)
        text = said(name, event)
        return from_bytes(base64.b64decode(data)) if data is not None else None if text is None else from_bytes(to_bytes(text))

    every_attempt = {event.get("attempt", 1) for event in events}
    attempt = max(every_attempt)
    started = of({attempt}, "evaluation:started", "evaluation:running")
    first_started, last_started = (started[0], started[-1]) if started else (None, None)
    lost = of({attempt}, "evaluation:lost")
    result = next(iter(of({attempt}, *ENDINGS)), None)
    status = "running" if started else "queued"
    for one in lost:
        if not [s for s in started if (s["occurred_at"], s["event_id"]) > (one["occurred_at"], one["event_id"])]:
            status = "lost"
    if result:
        status = result["type"].removeprefix("evaluation:")
    with_queued = [number for number in every_attempt if of({number}, "evaluation:queued")]
    queued = of({max(with_queued)}, "evaluation:queued")[0] if with_queued else None
    metadata: Json = {}
    for number in sorted(every_attempt):
        for phase in (["evaluation:queued"], ["evaluation:started", "evaluation:running"], ["evaluation:lost"], ENDINGS):
            for each in of({number}, *phase):
                metadata |= each.get("metadata", {})
    values = {name: len(json.dumps(value, separators=(",", ":"))) for name, value in metadata.items()}
    large = {name: size for name, size in values.items() if size > merge_state.MAX_VALUE_BYTES}
    kept = sorted(metadata, key=lambda name: hashlib.sha256(name.encode()).digest())[: merge_state.MAX_KEYS]
    bounded = {name: {"$omitted_bytes": large[name]} if name in large else metadata[name] for name in kept}

    def moment(event: Json | None) -> datetime | None:
        return datetime.fromisoformat(event["occurred_at"]) if event else None

    return {
        "eval_id": events[0]["eval_id"],
        "attempt": attempt,
        "status": status,
        "version": len(events),
        **{name: said(name, result) for name in ("exit_code", "duration_ms", "memory_bytes", "score", "reason")},
        **{name: said(name, result, last_started) for name in ("executor_id", "container_id")},
        "timeout_s": said("timeout_s", first_started),
        "language": queued and queued.get("language", "python"),
        "submitter": said("submitter", queued),
        "run_id": said("run_id", queued),
        "metadata": bounded,
        "metadata_truncated": len(metadata) > len(kept) or not large.keys().isdisjoint(kept),
        "queued_at": moment(queued),
        "started_at": moment(first_started),
        "finished_at": moment(result),
        "code": content("code", queued),
        "output": content("output", result),
        "error": content("error", result),
        "created_at": None,
        "updated_at": None,
        "enrichment": None,
    }


texts = st.sampled_from(["", "a", "b", None])
ids = st.sampled_from(["a", "b", None])
numbers = st.sampled_from([0, -0.0, 1.5, 2**53, None])
integers = st.sampled_from([0, 1, -(2**63), None])
contents = st.sampled_from(["", "\0", "\ud800", "\ud83d\ude00"])
b64s = st.sampled_from(["", "/w==", "7aCA"])
refs = st.sampled_from([{"sha256": digit * 64, "size": size, "encoding": "zstd"} for digit in "0f" for size in (1, 5_000_000)])
metadata = st.none() | st.dictionaries(
    st.sampled_from("abcd"),
    st.sampled_from([None, 0, 1.5, "x", [1], {"a": None}, "long" * 8, ["long"] * 8, {"$omitted_bytes": 34}]),
    max_size=3,
)
common = {
    "attempt": st.sampled_from([None, 1, 2, 3]),
    "metadata": metadata,
}
ran = {"executor_id": texts, "container_id": texts}


def one_form(name: str) -> st.SearchStrategy[Json]:
    forms = {name: contents, f"{name}_b64": b64s, f"{name}_ref": refs}
    return st.one_of([st.fixed_dictionaries({form: values}) for form, values in forms.items()])


def kind(type_: str, optional: dict[str, st.SearchStrategy[Any]], *more: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    fields = st.fixed_dictionaries(
        {
            "type": st.just(type_),
            "eval_id": st.just("e"),
            "event_id": st.sampled_from(IDS),
            "occurred_at": st.sampled_from(TIMES),
        },
        optional={**common, **optional},
    )
    return st.tuples(fields, *more).map(lambda parts: {name: value for part in parts for name, value in part.items()})


nothing: st.SearchStrategy[Json] = st.just({})
output, error = nothing | one_form("output"), nothing | one_form("error")
measured = {**ran, "duration_ms": numbers, "memory_bytes": integers}
events = st.one_of(
    kind("evaluation:queued", {"language": texts, "submitter": texts, "run_id": ids}, one_form("code")),
    kind("evaluation:started", {**ran, "timeout_s": numbers}),
    kind("evaluation:running", {**ran, "timeout_s": numbers}),
    kind(
        "evaluation:completed",
        {**measured, "score": numbers},
        st.fixed_dictionaries({"exit_code": st.sampled_from([0, 1])}),
        output,
        error,
    ),
    kind("evaluation:failed", {**measured, "exit_code": integers}, output, one_form("error")),
    kind("evaluation:timed_out", {**measured, "exit_code": integers}, output, error),
    kind("evaluation:cancelled", {"reason": texts}),
    kind("evaluation:lost", {}),
)
event_sets = st.lists(events, min_size=1, max_size=6, unique_by=lambda event: event["event_id"])


@pytest.fixture(autouse=True, scope="module")
def _low_bounds() -> Iterator[None]:
    """Let small examples reach the bounds."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MAX_KEYS", 3), ("MAX_VALUE_BYTES", 30), ("_SHORT", 4), ("MAX_ENDINGS", 2)):
            patch.setattr(merge_state, name, value)
        patch.setattr(fold, "MAX_ENDINGS", 2)
        yield


@settings(max_examples=1000 * MORE, deadline=None)
@given(event_sets)
def test_the_record_is_what_the_rule_says(given: list[Json]) -> None:
    assert merge(map(parse, given)).model_dump() == reference(given)


@settings(max_examples=300 * MORE, deadline=None)
@given(event_sets.flatmap(lambda given: st.tuples(st.just(given), st.lists(st.sampled_from(given)), st.randoms())))
def test_neither_order_nor_repetition_makes_a_difference(drawn: tuple[list[Json], list[Json], Any]) -> None:
    given, repeated, random = drawn
    shuffled = given + repeated
    random.shuffle(shuffled)
    assert merge(map(parse, shuffled)) == merge(map(parse, given))


@st.composite
def parts(draw: st.DrawFn) -> tuple[list[EventRow], list[list[EventRow]]]:
    """A set of events, and the same set in any order and in any parts."""
    given = [
        to_row(parse(one)) for one in draw(st.lists(events, min_size=1, max_size=8, unique_by=lambda one: one["event_id"]))
    ]
    shuffled = draw(st.permutations(given))
    ends = sorted({0, len(given), *draw(st.lists(st.integers(0, len(given)), max_size=6))})
    return given, [shuffled[start:end] for start, end in itertools.pairwise(ends)]


@settings(max_examples=1500 * MORE, deadline=None)
@given(parts())
def test_a_fold_in_any_parts_is_the_fold_of_all(drawn: tuple[list[EventRow], list[list[EventRow]]]) -> None:
    given, of_parts = drawn
    folded: Folded | None = None
    for part in of_parts:
        folded = fold.fold(folded, part)
    expected = fold.fold(None, given)
    assert folded is not None
    assert folded[:2] == expected[:2]
    assert json.dumps(folded.record.metadata, sort_keys=True) == json.dumps(expected.record.metadata, sort_keys=True)


@settings(max_examples=300 * MORE, deadline=None)
@given(st.lists(events, min_size=1, max_size=10))
def test_of_two_events_with_one_id_the_first_stands(given: list[Json]) -> None:
    assert merge(map(parse, given)).model_dump() == reference(given)


def record_of(*given: Json) -> Json:
    return merge(map(parse, given)).model_dump()


def test_no_metadata_gives_an_empty_object_and_null_in_it_is_a_value() -> None:
    assert record_of(event("started"))["metadata"] == {}
    later = event("started", 2, 1, metadata={"a": None})
    assert record_of(event("started", 1, metadata={"a": 1, "b": {"x": 1}}), later)["metadata"] == {"a": None, "b": {"x": 1}}


def test_a_sign_of_life_or_a_result_after_it_was_given_up_still_counts() -> None:
    assert record_of(event("started", 1, 1), event("lost", 2, 2))["status"] == "lost"
    assert record_of(event("started", 1, 1), event("lost", 2, 2), event("running", 3, 3))["status"] == "running"
    assert record_of(event("started", 2, 1), event("lost", 1, 1))["status"] == "running"
    assert record_of(event("started", 1, 1), event("lost", 2, 1))["status"] == "lost"
    assert record_of(event("lost", 1, 9), event("completed", 2, 1))["status"] == "completed"
    assert record_of(event("lost", 1, 9), event("queued", 2, 1, attempt=2))["status"] == "queued"


def test_the_first_of_two_endings_stands_and_a_later_attempt_begins_anew() -> None:
    ends = [event("completed", 2, 5, exit_code=3), event("failed", 1, 5, error="late")]
    assert record_of(*ends)["status"] == "failed"
    again = record_of(*ends, event("started", 4, 0, attempt=2))
    assert (again["status"], again["exit_code"], again["error"], again["version"]) == ("running", None, None, 3)


def test_code_comes_from_the_highest_attempt_that_was_queued() -> None:
    first, second = event("queued", 1, 9, code="one", submitter="s"), event("queued", 2, 1, code="two", attempt=2)
    record = record_of(first, second, event("started", 3, 2, attempt=3))
    assert (record["code"], record["submitter"], record["language"], record["attempt"]) == ("two", None, "python", 3)
    assert str(record["queued_at"]) == "2026-01-01 00:00:01+00:00"


def test_the_language_is_python_where_a_queued_event_names_none() -> None:
    assert record_of(event("queued"))["language"] == "python"
    assert record_of(event("queued", language=""))["language"] == ""
    assert record_of(event("started"))["language"] is None


def test_only_the_events_of_one_evaluation_make_a_record() -> None:
    for wrong in ([], [event("started"), event("started", 2) | {"eval_id": "f"}]):
        with pytest.raises(ValueError, match="exactly one evaluation"):
            record_of(*wrong)
    for missing in ("event_id", "occurred_at"):
        with pytest.raises(ValueError, match="event_id and an occurred_at"):
            record_of(event("started") | {missing: None})
