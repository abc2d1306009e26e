"""Send events and log them in a file: one JSON line for each event whose send returned."""

import base64
import hashlib
import json
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis
from uuid_utils.compat import uuid7

from models.errors import Outage
from tasks import store_evaluation

CONTENT = ("code", "output", "error")
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 5.0


class Stopped(Exception):
    """The platform stopped before Redis accepted the event."""


class Gateway:
    """Send the events of the platform. Threads may share an instance."""

    def __init__(self, ledger: Path, stop: threading.Event) -> None:
        self._ledger = ledger.open("a", encoding="utf-8", buffering=1)  # line-buffered, so that lines survive a crash
        self._lock = threading.Lock()
        self._stop = stop

    def send(self, type_: str, eval_id: str, **fields: Any) -> None:
        """Send one event. Give content as bytes. Fields that are None are omitted.

        Block while Redis is away, and retry with the same event_id: if the first try reached Redis, the second
        is a duplicate. Raise Stopped if the platform stops meanwhile, and InvalidEvent."""
        event: dict[str, Any] = {
            "type": type_,
            "eval_id": eval_id,
            "event_id": str(uuid7()),
            "occurred_at": datetime.now(UTC).isoformat(),
        }
        entry: dict[str, Any] = dict(event)
        for name, value in fields.items():
            if name in CONTENT and value is not None:
                event |= as_content(name, value)
                entry |= {f"{name}_bytes": len(value), f"{name}_sha256": hashlib.sha256(value).hexdigest()}
            elif value is not None:
                event[name] = entry[name] = value
        self._deliver(event)
        with self._lock:
            self._ledger.write(json.dumps(entry) + "\n")

    def _deliver(self, event: Mapping[str, Any]) -> None:
        wait_s = FIRST_WAIT_S
        while True:
            try:
                store_evaluation.send(event)
            except (Outage, redis.RedisError, OSError) as error:
                print(f"Redis did not take an event, next try in {wait_s:.1f} s: {error}", file=sys.stderr, flush=True)
                if self._stop.wait(wait_s):
                    raise Stopped from error
                wait_s = min(wait_s * 2, LONGEST_WAIT_S)
            else:
                return


def as_content(name: str, data: bytes) -> dict[str, str]:
    """Return `data` as a text field if it is UTF-8, otherwise as base64."""
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return {f"{name}_b64": base64.b64encode(data).decode()}
