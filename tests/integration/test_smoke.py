"""Send, store, acknowledge: the whole path on real servers, for `make test-fast`."""

import os
import subprocess
import sys

import psycopg

from tests.chaos.world import World, wait_until

SEND = """
from tasks import store_evaluation

store_evaluation.send({"type": "evaluation:completed", "eval_id": "smoke", "exit_code": 0, "output": "1"})
store_evaluation.send({"type": "evaluation:queued", "eval_id": "smoke", "code": "print(1)"})
"""


def test_a_sent_event_is_stored_and_acknowledged(world: World) -> None:
    env = {**os.environ, "EVALSTORE_REDIS_URL": world.redis_url}
    subprocess.run([sys.executable, "-c", SEND], env=env, check=True)
    assert world.left() == {"dramatiq:evaluations": 2, "dramatiq:evaluations.msgs": 2}
    world.workers().start()
    wait_until(lambda: world.applied() == 2, what="both events are stored")
    with psycopg.connect(world.database_url) as conn:
        records = conn.execute("SELECT eval_id, status, version, exit_code FROM evaluations").fetchall()
    assert records == [("smoke", "completed", 2, 0)]
    world.wait_settled(within_s=10)
    assert world.dead() == []
