"""`worker.tasks`, where certain evaluations do to their worker what bad luck does: `dramatiq tests.chaos.crashing`.

By the beginning of its eval_id: `kill-` dies like one that the kernel kills for its memory, `segfault-` crashes, both before
anything of the batch is stored; `late-` dies after the commit of the first batch it is in, if the folder
EVALSTORE_CHAOS_FOLDER does not hold a file of its name yet; `slow-` takes 3 s. `unthread-` ends the thread that fetches,
`wedge-` makes it stand still, which is noticed sooner here. EVALSTORE_CHAOS_CLOCK_S puts its clock that far wrong. The
actors `fail_twice` and `take_long` note their runs in the list `runs`.
"""

# ruff: noqa: E402
import os
import time

if ahead_s := float(os.environ.get("EVALSTORE_CHAOS_CLOCK_S", "0")):
    _time = time.time
    time.time = lambda: _time() + ahead_s

import ctypes
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import dramatiq

from evalstore.storage import event_store
from models.events import Event
from models.record import EventRow
from worker import heartbeat
from worker.batches import Delivery
from worker.consumer import Consumer

_store, _hand_out = event_store.store, Consumer._hand_out


def store(conn: Any, events: Sequence[Event | EventRow], *args: Any, **kwargs: Any) -> Any:
    kinds = {event.eval_id.partition("-")[0]: event.eval_id for event in events}
    if "kill" in kinds:
        os.kill(os.getpid(), signal.SIGKILL)
    if "segfault" in kinds:
        ctypes.string_at(0)
    if "slow" in kinds:
        time.sleep(3)
    stored = _store(conn, events, *args, **kwargs)
    if "late" in kinds:
        mark = Path(os.environ["EVALSTORE_CHAOS_FOLDER"], kinds["late"])
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return stored


def hand_out(self: Consumer, found: list[Delivery]) -> None:
    if any(b'"unthread-' in body for _, body in found):
        raise SystemExit
    if any(b'"wedge-' in body for _, body in found):
        time.sleep(3600)
    _hand_out(self, found)


event_store.store = cast("Any", store)
Consumer._hand_out = hand_out  # type: ignore[method-assign]
heartbeat.WEDGED_AFTER_S = 4.0  # type: ignore[misc]

from worker.tasks import broker


@dramatiq.actor(queue_name="jobs", min_backoff=100, max_backoff=200)
def fail_twice(name: str) -> None:
    if broker.client.rpush("runs", name) < 3:
        raise ValueError(f"{name} \ud800 fails")


@dramatiq.actor(queue_name="jobs")
def take_long(name: str) -> None:
    broker.client.rpush("runs", name)
    time.sleep(10)


__all__ = ["broker"]
