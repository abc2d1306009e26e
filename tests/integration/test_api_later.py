"""What is sent to be stored later, and then once more to be stored at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from tests.chaos.world import World

E = "/storage/evaluations"


@pytest.mark.parametrize("as_batch", [False, True], ids=["one", "batch"])
def test_what_still_waits_in_the_queue_when_it_is_stored_at_once_is_no_dead_letter(
    as_batch: bool,
    start_api: Callable[..., Any],
    database_url: str,
    redis_url: str,
    tmp_path: Path,
    eventually: Callable[..., None],
) -> None:
    api = start_api()
    ended = {"status": "completed", "exit_code": 0}
    for preference in ({"Prefer": "respond-async"}, {}):
        headers = {"Idempotency-Key": "k", **preference}
        if as_batch:
            lines = b'{"type": "evaluation:queued", "eval_id": "e", "code": "c"}\n'
            answers = [
                api.both.post(
                    "/storage/events:batch", content=lines, headers={**headers, "Content-Type": "application/x-ndjson"}
                )
            ]
        else:
            answers = [
                api.both.post(E, json={"eval_id": "e", "code": "c"}, headers=headers),
                api.both.put(f"{E}/e", json=ended, headers=preference),
            ]
        assert all(one.is_success for one in answers), [one.text for one in answers]
    world = World(database_url, redis_url, tmp_path)
    try:
        world.workers().start()
        with redis.Redis.from_url(redis_url) as client:
            eventually(lambda: not client.exists("dramatiq:evaluations.msgs"), within_s=60, what="an empty queue")
    finally:
        world.close()
    with psycopg.connect(database_url) as conn:
        assert conn.execute("SELECT eval_id FROM dead_letters").fetchall() == []
    assert api.both.get(f"{E}/e").json()["version"] == (1 if as_batch else 2)
