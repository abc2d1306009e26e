"""Read confirmations, the notices of committed changes.

    for confirmation in Confirmations("billing"):
        if confirmation["type"].startswith("storage:evaluation:"):
            handle(confirmation["eval_id"], confirmation["version"], confirmation["status"])

Each service reads as a consumer group with its own name, and Redis keeps the group's position. Asking for the next confirmation
acknowledges the one before. If handling is interrupted, the confirmation comes again. Repeats and older versions are skipped.

Confirmations of runs (`storage:run:finished`, `storage:run:updated`) have a `run_id` instead, and may be repeated.
"""

from collections.abc import Iterator
from typing import Any, Final

import msgspec
import redis

from models.confirmations import CREATED, UPDATED
from models.errors import RedisOutage
from tasks import tracing
from tasks.broker import broker
from tasks.connections import as_bytes
from tasks.keys import Names

# Longer than the time in which a confirmation can be relayed again.
_SEEN_VERSION_TTL_S: Final = 3600
# A record ignores versions that it had before, but for these: it changed at the same version, or is gone.
_VERSIONED: Final = {CREATED, UPDATED}


class Confirmations:
    """Iterate over the confirmations for one service, in order of version for each evaluation.

    Only one process at a time may read as `group`: two would each get a part of the confirmations. Iterating blocks until the
    next confirmation; with `idle_s` it ends after that time without any. `client` and `namespace` default to the settings.
    Raises RedisOutage: iterate again to continue.
    """

    def __init__(
        self, group: str, *, client: redis.Redis | None = None, namespace: str = "", idle_s: float | None = None
    ) -> None:
        self._names = Names(namespace or broker().namespace)
        self.group, self.idle_s = group, idle_s
        self._client: Any = client or broker().client
        # XREADGROUP must return before the socket times out.
        timeout_s = self._client.connection_pool.connection_kwargs.get("socket_timeout") or 2
        self._block_s = min(1.0, timeout_s / 2)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            try:
                self._client.xgroup_create(self._names.stream, self.group, id="0", mkstream=True)
            except redis.ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise
            yield from self._read("0")  # delivered before, but not acknowledged
            yield from self._read(">")
        except redis.RedisError as error:
            raise RedisOutage(str(error)) from error

    def _read(self, position: str) -> Iterator[dict[str, Any]]:
        waited_s = 0.0
        while True:
            block_ms = int(self._block_s * 1000)
            reply = self._client.xreadgroup(self.group, "evalstore", {self._names.stream: position}, count=100, block=block_ms)
            entries = _entries(reply)
            if not entries:
                waited_s += self._block_s
                if position == "0" or (self.idle_s is not None and waited_s >= self.idle_s):
                    return
                continue
            waited_s = 0.0
            yield from self._unseen(entries)

    def _unseen(self, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> Iterator[dict[str, Any]]:
        confirmations = [msgspec.json.decode(fields[b"confirmation"]) if fields else None for _, fields in entries]
        keys = [self._key(confirmation or {}) for confirmation in confirmations]  # MGET of "" gives None
        seen = dict(zip(keys, self._client.mget(keys), strict=True))
        for (entry_id, fields), key, confirmation in zip(entries, keys, confirmations, strict=True):
            with self._client.pipeline(transaction=True) as pipeline:
                if confirmation and (confirmation["type"] not in _VERSIONED or int(seen[key] or 0) < confirmation["version"]):
                    with tracing.receiving(self._names.stream, self.group, fields, confirmation):
                        yield confirmation
                    if key:
                        seen[key] = confirmation["version"]
                        pipeline.set(key, confirmation["version"], ex=_SEEN_VERSION_TTL_S)
                pipeline.xack(self._names.stream, self.group, entry_id)
                pipeline.execute()

    def _key(self, confirmation: dict[str, Any]) -> str:
        """The key of the version seen last; empty for a confirmation that is about no evaluation."""
        return self._names.seen_version(self.group, confirmation["eval_id"]) if "version" in confirmation else ""


def _entries(reply: Any) -> list[tuple[Any, dict[bytes, bytes]]]:
    """Return the entries of a reply about one stream as bytes, for RESP2 and RESP3, with or without `decode_responses`."""
    if not reply:
        return []
    ((_, entries),) = reply.items() if isinstance(reply, dict) else reply
    if isinstance(reply, dict):  # RESP3 nests the entries in one more list
        (entries,) = entries
    return [
        (entry_id, {as_bytes(name): as_bytes(value) for name, value in (fields or {}).items()}) for entry_id, fields in entries
    ]
