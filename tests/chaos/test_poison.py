"""Messages that are no good, amid thousands that are: each dies alone, and of its own cause."""

import json
from typing import Any

import pytest

from tests.chaos.world import World, evaluation, evaluations

FIELDS: dict[str, Any] = {
    "queue_name": "evaluations",
    "actor_name": "store_evaluation",
    "args": [],
    "kwargs": {},
    "options": {},
    "message_id": "id",
    "message_timestamp": 1,
}
EVENT = {"type": "evaluation:queued", "eval_id": "bad", "code": "x"}
OPTIONS: list[tuple[str, Any]] = [
    ("retries", "many"),
    ("retries", True),
    ("max_retries", "none"),
    ("min_backoff", []),
    ("max_backoff", {}),
    ("eta", "soon"),
    ("throws", ["ValueError"]),
    ("on_retry_exhausted", 1),
    ("pipe_target", "actor"),
    ("requeue_timestamp", "now"),
    ("traceback", 0),
    ("on_success", 3),
    ("on_failure", {}),
]
BODIES: dict[str, bytes | str] = {
    "nothing": b"",
    "bytes": b"\xff\xfe\x00\x80",
    "half a message": b'{"queue_name": "evaluations", "actor',
    "no object": b"[1, 2, 3]",
    "null": b"null",
    "another object": b'{"hello": "world"}',
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "not a number": json.dumps(FIELDS | {"message_timestamp": float("nan")}),
    "infinite": json.dumps(FIELDS | {"message_timestamp": 1}).replace('"message_timestamp": 1', '"message_timestamp": 1e999'),
    "many digits": json.dumps(FIELDS).replace('"message_timestamp": 1', '"message_timestamp": ' + "9" * 5000),
    "pickle": b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x05hello\x94.",
    "no args": json.dumps(FIELDS),
    "two args": json.dumps(FIELDS | {"args": [EVENT, EVENT]}),
    "args that are no list": json.dumps(FIELDS | {"args": {"event": EVENT}}),
    "keywords": json.dumps(FIELDS | {"args": [EVENT], "kwargs": {"x": 1}}),
    "an event that is a list": json.dumps(FIELDS | {"args": [[EVENT]]}),
    "an event without a type": json.dumps(FIELDS | {"args": [{"eval_id": "bad"}]}),
    "an event of the system": json.dumps(FIELDS | {"args": [{"type": "evaluation:lost", "eval_id": "bad"}]}),
    "an eval_id with a lone surrogate": json.dumps(FIELDS | {"args": [EVENT | {"eval_id": "\ud800"}]}),
    "metadata with a lone surrogate": json.dumps(FIELDS | {"args": [EVENT | {"metadata": {"a": "\udfff"}}]}),
    "metadata with NUL": json.dumps(FIELDS | {"args": [EVENT | {"metadata": {"a\0": 1}}]}),
    "a message_id with NUL": json.dumps(FIELDS | {"args": [{}], "message_id": "\0"}),
    "an exit code that is no integer": json.dumps(
        FIELDS | {"args": [EVENT | {"type": "evaluation:completed", "exit_code": "0"}]}
    ),
    "an unknown actor": json.dumps(FIELDS | {"actor_name": "unknown"}),
    "an actor with a lone surrogate": json.dumps(FIELDS | {"actor_name": "\ud800"}),
    "a job of the other queue": json.dumps(
        FIELDS | {"actor_name": "relay_confirmations", "args": [1, 2], "options": {"max_retries": 0}}
    ),
    **{
        f"the option {name}: {value}": json.dumps(FIELDS | {"args": [EVENT], "options": {name: value}})
        for name, value in OPTIONS
    },
}


def test_messages_that_are_no_good_die_alone_amid_thousands(world: World) -> None:
    """Stock: what cannot be decoded strands everything fetched with it, as long as the process lives, and then the next one's;
    options of a wrong type end the thread that works on them; the others are tried 20 times, for 35 days by default."""
    good = evaluations(1000)
    for position, body in enumerate(BODIES.values()):
        world.send(good[position * 60 : position * 60 + 60])
        world.raw(body)
    world.send(good[len(BODIES) * 60 :])
    world.workers(n=2).start()
    world.wait_settled()
    dead = dict(world.dead())
    assert len(dead) == len(BODIES)
    assert {name for name, body in BODIES.items() if (body.encode() if isinstance(body, str) else body) not in dead} == set()
    assert set(dead.values()) <= {"InvalidEvent", "ActorNotFound", "TypeError"}
    world.audit(others_dead=dead.values())


@pytest.mark.parametrize("threads", [1, 8])
def test_an_event_id_used_again_for_another_body_dies_and_the_first_stands(world: World, threads: int) -> None:
    """Stock, with the same store: the same."""
    events = evaluations(300)
    world.send(events)
    world.workers(threads=threads).start()
    world.wait_settled()
    first = events[0]
    reused = first | {"code": "another"}
    world.raw(world.message(reused).encode())
    world.raw(world.message(first).encode())  # A repeat is a duplicate.
    world.send(evaluations(100))
    world.wait_settled()
    assert [why for _, why in world.dead()] == ["EventIdReused"]


def test_what_a_gateway_in_any_language_sends_is_stored(world: World) -> None:
    """Stock: the same. Escapes, byte order mark, unknown options and fields, no event_id, the same id in the queue twice."""
    event = evaluation("raw")[0]
    body = json.dumps(
        FIELDS | {"args": [event | {"code": "\ud800 \0 é", "new_field": 1}], "options": {"trace": ["x"], "retries": 3}}
    )
    redis_id = world.raw("\ufeff" + body)
    world.client.rpush("dramatiq:evaluations", redis_id)
    world.sent[event["event_id"]] = event
    world.workers().start()
    world.client.rpush("dramatiq:evaluations", redis_id)
    world.audit()
    without = {"type": "evaluation:queued", "eval_id": "nameless", "code": "x"}
    for _ in range(3):
        world.raw(json.dumps(FIELDS | {"args": [without], "message_id": "0190a2f5-7a4c-7000-8000-000000000000"}))
    world.wait_settled()
    assert world.applied() == 2
