"""How a sample of Inspect AI becomes an ending. `tests/integration/test_recording_inspect.py` runs the real one."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from evalstore.inspect_hooks import ending, transcript


class Item(SimpleNamespace):
    """An event or a message."""

    def model_dump_json(self, *, exclude_none: bool) -> str:
        assert exclude_none
        return json.dumps(vars(self))


def sample(**fields: Any) -> Any:
    given: dict[str, Any] = {
        "scores": None,
        "error": None,
        "limit": None,
        "total_time": 1.5,
        "events": [],
        "messages": [],
        "attachments": {},
    }
    return SimpleNamespace(**given | fields)


def scored(value: Any) -> dict[str, Any]:
    return {"first": SimpleNamespace(value=value), "second": SimpleNamespace(value=0.25)}


@pytest.mark.parametrize(
    ("value", "score"),
    [
        ("C", 1.0),
        ("P", 0.5),
        ("I", 0.0),
        ("N", 0.0),
        ("Yes", 1.0),
        ("0.75", 0.75),
        (True, 1.0),
        (3, 3.0),
        ("free text", None),
        ({"a": 1}, None),
        ([1, 2], None),
        (float("nan"), None),
        (float("inf"), None),
    ],
)
def test_the_first_score_is_a_number_where_it_is_one(value: Any, score: float | None) -> None:
    event = ending(sample(scores=scored(value)), "e", 1)
    assert event.get("score") == score
    assert event["type"] == "evaluation:completed"
    assert event["metadata"]["scores"]["second"] == 0.25
    json.dumps(event, allow_nan=False)


@pytest.mark.parametrize(
    ("limit", "status"),
    [
        ("time", "timed_out"),
        ("working", "timed_out"),
        ("operator", "cancelled"),
        ("message", "completed"),
        ("token", "completed"),
        ("turn", "completed"),
        ("cost", "completed"),
        ("context", "completed"),
        ("custom", "completed"),
    ],
)
def test_each_limit_has_its_ending(limit: str, status: str) -> None:
    event = ending(sample(limit=SimpleNamespace(type=limit, limit=3.0, reason=None)), "e", 2)
    assert (event["type"], event["attempt"]) == (f"evaluation:{status}", 2)
    assert event["metadata"]["limit"] == {"type": limit, "limit": 3.0}


def test_an_error_is_failed_and_a_cancellation_cancelled() -> None:
    error = SimpleNamespace(message="ValueError('bad')", traceback="Traceback")
    event = ending(sample(error=error), "e", 1)
    assert (event["type"], event["error"]) == ("evaluation:failed", "ValueError('bad')\nTraceback")
    error = SimpleNamespace(message="CancelledError('by scope')", traceback="Traceback")
    event = ending(sample(error=error), "e", 1)
    assert (event["type"], event["reason"]) == ("evaluation:cancelled", "CancelledError('by scope')")


def test_a_transcript_that_is_too_large_becomes_the_messages_and_then_nothing() -> None:
    large = sample(events=[Item(text="x" * 100)], messages=[Item(text="y")])
    assert transcript(large, 1000) == json.dumps({"text": "x" * 100}) + "\n"
    assert transcript(large, 50) == '{"text": "y"}\n'
    assert transcript(large, 5) is None
    assert transcript(sample(), 1000) is None


def test_the_attachments_of_a_transcript_are_its_last_line() -> None:
    text = transcript(sample(events=[Item(text="attachment://a")], attachments={"a": "long"}), 1000)
    assert text is not None
    assert json.loads(text.splitlines()[-1]) == {"a": "long"}
