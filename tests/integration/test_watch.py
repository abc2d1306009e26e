"""`evalstore watch`."""

import json
import threading
import time
from typing import Any

from sqlalchemy import Connection

from evalstore.storage import event_store
from tests.factories import parsed_event
from tests.integration.shell import Operator


def test_watch_shows_each_change_until_the_evaluation_is_finished(operator: Operator, conn: Connection) -> None:
    event_store.store(conn, [parsed_event("queued")])
    done: list[Any] = []
    watching = threading.Thread(target=lambda: done.append(operator.evalstore("watch", "e", "-o", "jsonl", "--timeout", "60")))
    watching.start()
    time.sleep(3)  # It may begin with any of the states; the last one must show.
    event_store.store(conn, [parsed_event("started", 2, 1, executor_id="x\x1b[31m")])
    time.sleep(1)
    event_store.store(conn, [parsed_event("completed", 3, 2, exit_code=7)])
    watching.join()
    states = [json.loads(line) for line in done[0].out.splitlines()]
    assert done[0].status == 0
    assert [state["version"] for state in states] == sorted({state["version"] for state in states})
    assert (states[-1]["status"], states[-1]["version"], states[-1]["exit_code"]) == ("completed", 3, 7)
    shown = operator.evalstore("watch", "e")
    assert "completed" in shown.out
    assert "exit_code 7" in shown.out
    assert "\x1b" not in shown.out


def test_watch_says_what_is_absent_and_what_is_late(operator: Operator, conn: Connection) -> None:
    event_store.store(conn, [parsed_event("queued")])
    assert operator.evalstore("watch", "absent").status == 3
    assert operator.evalstore("watch", "a/b").status == 3
    late = operator.evalstore("watch", "e", "--timeout", "0.3")
    assert (late.status, "not finished" in late.err) == (1, True)
