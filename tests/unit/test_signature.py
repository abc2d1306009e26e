"""Dead letters that died of the same thing have the same signature, and those that did not have not."""

from uuid import UUID

import pytest

from evalstore.storage.dead_letters import signature
from models.errors import EventIdReused, InvalidEvent
from models.events import parse

SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (str(EventIdReused("run-1", UUID(int=1))), str(EventIdReused("it's another", UUID(int=2**127)))),
        ("event_id 0190a2f5-7a4c-7000-8000-000000000000 is odd", "event_id FFFFFFFF-FFFF-4FFF-BFFF-FFFFFFFFFFFF is odd"),
        ("output: 104,857,601 bytes, expected at most 100", "output: 7 bytes, expected at most 104,857,600"),
        ("key 'a' is \"b\"", "key 'it\\'s' is \"c \\\" d\""),
        ("metadata: metadata.tags[2]: NUL is not allowed", "metadata: metadata.user.name: NUL is not allowed"),
        (f"content {SHA256} is missing", f"content {SHA256[::-1]} is missing"),
        ("at 0x7f3c12ab", "at 0x1"),
        ("took 1.5 s", "took 30 s"),
        ("the same\nwith line 1", "the same\nwith another line"),
        ("x" * 5000 + "a", "x" * 5000 + "b"),
    ],
)
def test_errors_that_differ_in_ids_numbers_paths_or_quotes_share_a_signature(one: str, other: str) -> None:
    assert signature("E", one) == signature("E", other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("exit_code: expected a 64-bit integer", "memory_bytes: expected a 64-bit integer"),
        ("can't read the file, don't know why", "can't write the file, don't know why"),
        ("value 'a' missing", "missing value 'a'"),
        ("defaced", "effaced"),  # words of the letters a to f are no ids
    ],
)
def test_errors_with_different_words_have_different_signatures(one: str, other: str) -> None:
    assert signature("E", one) != signature("E", other)


def test_another_class_of_error_is_another_group() -> None:
    assert signature("OneError", "x") != signature("OtherError", "x")


def test_any_text_has_a_signature_and_always_the_same() -> None:
    assert signature("E\ud800", "odd \udfff \0 text") == signature("E\ud800", "odd \udfff \0 text")
    assert len(signature("", "")) == 16


def test_no_error_message_takes_long() -> None:
    for hostile in ("'" * 100_000, "'\\" * 50_000, "1," * 50_000, "metadata." * 10_000, "a1" * 50_000):
        assert len(signature("E", hostile)) == 16


def test_a_hundred_events_that_break_the_same_rule_are_one_group() -> None:
    groups = set()
    for number in range(100):
        with pytest.raises(InvalidEvent) as raised:
            parse({"type": "evaluation:completed", "eval_id": f"run-{number}", "exit_code": f"{number}", "x": number})
        groups.add(signature("InvalidEvent", str(raised.value)))
    assert len(groups) == 1
