"""How the bridge makes an event of a message, and what its file may hold."""

import json
from pathlib import Path
from typing import Any

import pytest

from evalstore.bridge import mapping
from evalstore.bridge.mapping import Mapped, to_event
from models.errors import InvalidEvent, InvalidSettings
from models.events import check


def event(channel: str, document: Any, **keys: Any) -> dict[str, Any]:
    payload = document if isinstance(document, bytes) else json.dumps(document).encode()
    return to_event(Mapped.model_validate(keys), channel, payload)


def test_a_message_in_our_own_words_needs_no_mapping() -> None:
    given = {"eval_id": "e", "exit_code": 0, "output": "1", "occurred_at": "2026-01-01T00:00:00Z", "event_id": "0" * 8}
    assert event("evaluation:completed", given) == {"type": "evaluation:completed", **given}


def test_fields_are_renamed_for_all_types_or_for_one() -> None:
    fields = {
        "eval_id": "job.id",
        "occurred_at": "ts",
        "evaluation:completed": {"output": "result.stdout", "exit_code": "result.code"},
        "evaluation:failed": {"error": "result"},
    }
    given = {"job": {"id": "e", "pool": "a"}, "ts": 1767225600, "result": {"stdout": "1", "code": 0}}
    made = event("jobs:done", given, types={"jobs:done": "evaluation:completed"}, fields=fields)
    assert made.pop("event_id")
    assert made == {
        "type": "evaluation:completed", "eval_id": "e", "occurred_at": "2026-01-01T00:00:00Z", "output": "1", "exit_code": 0,
        "metadata": {"job": {"pool": "a"}},
    }  # fmt: skip
    check(made)


@pytest.mark.parametrize("time", [1767225600, 1767225600.0, 1767225600000, "2026-01-01T00:00:00Z"])
def test_times_may_be_unix_seconds_or_milliseconds(time: Any) -> None:
    assert event("evaluation:started", {"eval_id": "e", "occurred_at": time})["occurred_at"] == "2026-01-01T00:00:00Z"


def test_members_that_no_field_takes_become_metadata_or_are_dropped() -> None:
    given = {"eval_id": "e", "color": "red", "metadata": {"color": "blue", "n": 1}, "exit_code": 5}
    assert event("evaluation:queued", given)["metadata"] == {"color": "blue", "n": 1, "exit_code": 5}
    assert event("evaluation:queued", given, rest="drop")["metadata"] == {"color": "blue", "n": 1}


def test_the_type_comes_from_the_file_the_payload_or_the_channel() -> None:
    given = {"eval_id": "e", "state": "evaluation:running"}
    assert event("x", given, fields={"type": "state"})["type"] == "evaluation:started"
    assert event("x", {**given, "state": "DONE"}, fields={"type": "state"}, types={"DONE": "evaluation:failed"})["type"] == (
        "evaluation:failed"
    )
    assert event("evaluation:running", {"eval_id": "e"})["type"] == "evaluation:started"
    with pytest.raises(InvalidEvent, match="type: the channel x"):
        event("x", {"eval_id": "e"})


def test_the_same_message_has_the_same_id_and_another_one_has_another() -> None:
    ids = {
        event(channel, payload)["event_id"]
        for channel in ("evaluation:queued", "evaluation:started")
        for payload in (b'{"eval_id":"e"}', b'{"eval_id": "e"}')
        for _ in range(2)
    }
    assert len(ids) == 4


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"\xff", b"1", b'{"eval_id":"e","occurred_at":1e300}'])
def test_what_is_no_event_is_refused_with_its_field(payload: bytes) -> None:
    with pytest.raises(InvalidEvent) as refused:
        event("evaluation:queued", payload)
    assert refused.value.faults[0].field in {"payload", "occurred_at"}
    json.dumps(mapping.unreadable("c", payload))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("channel = ['x']", "channel: there is no such key; did you mean channels?"),
        ("channels = []", "channels: "),
        ("rest = 'keep'", "rest: "),
        ("url = 'redis://u:secret@h'", "a password stands in no file: give url_env or url_file"),
        ("[types]\na = 'evaluation:done'", "there is no type evaluation:done"),
        ("[fields]\neval = 'id'", "there is no field eval"),
        ("[fields.'evaluation:queued']\nexit_code = 'x'", "there is no field exit_code"),
        ("[fields.'evaluation:x']\nexit_code = 'x'", "there is no type evaluation:x"),
        ("[fields", "EVALSTORE_BRIDGE_FILE"),
    ],
)
def test_each_fault_of_the_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bridge.toml"
    path.write_text(text)
    with pytest.raises(InvalidSettings) as refused:
        mapping.load(path)
    assert said in str(refused.value)
    assert "secret" not in str(refused.value)


def test_an_address_comes_from_where_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "url"
    secret.write_text("redis://:pw@file\n")
    monkeypatch.setenv("OLD", "redis://:pw@env")
    assert Mapped().source_url("redis://ours") == "redis://ours"
    assert Mapped(url="redis://old").source_url("redis://ours") == "redis://old"
    assert Mapped(url_env="OLD").source_url("") == "redis://:pw@env"
    assert Mapped(url_file=secret).source_url("") == "redis://:pw@file"
    with pytest.raises(InvalidSettings, match="NOT_SET is not set"):
        Mapped(url_env="NOT_SET").source_url("")
