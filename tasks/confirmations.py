"""Reading confirmations: what was stored, told to other services.

    for confirmation in Confirmations("billing"):
        handle(confirmation["eval_id"], confirmation["version"], confirmation["status"])

A service reads as one consumer group under its name; Redis remembers where it was. A confirmation is acknowledged when the next
is asked for: one whose handling was interrupted comes again. Repeats, and versions below one that was handled, are left out.
"""

from collections.abc import Iterator
from typing import Any, Final

import msgspec
import redis

from models.errors import RedisOutage
from models.settings import settings
from tasks import tracing
from tasks.broker import broker
from tasks.connections import as_bytes
from tasks.keys import Names

# For longer than confirmations can be relayed again.
_REMEMBER_S: Final = 3600


class Confirmations:
    """The confirmations for one service, in order of version for each evaluation.

    Let one process at a time read as `group`: two would each see a part, and the order only of that part. Iterating blocks
    for the next; with `idle_s` it ends when none came for that long.
    `namespace` is by default EVALSTORE_REDIS_NAMESPACE. Raises RedisOutage: iterate again to go on.
    """

    def __init__(
        self, group: str, *, client: redis.Redis | None = None, namespace: str = "", idle_s: float | None = None
    ) -> None:
        self._names = Names(namespace or settings().redis_namespace)
        self.group, self.idle_s = group, idle_s
        self._client: Any = client or broker().client
        # Shorter than the client waits for any answer.
        patience_s = self._client.connection_pool.connection_kwargs.get("socket_timeout") or 2
        self._block_s = min(1.0, patience_s / 2)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            try:
                self._client.xgroup_create(self._names.stream, self.group, id="0", mkstream=True)
            except redis.ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise
            yield from self._read("0")  # what was begun and not acknowledged
            yield from self._read(">")
        except redis.RedisError as error:
            raise RedisOutage(str(error)) from error

    def _read(self, position: str) -> Iterator[dict[str, Any]]:
        waited_s = 0.0
        while True:
            block_ms = int(self._block_s * 1000)
            found = self._client.xreadgroup(self.group, "evalstore", {self._names.stream: position}, count=100, block=block_ms)
            entries = _entries(found)
            if not entries:
                waited_s += self._block_s
                if position == "0" or (self.idle_s is not None and waited_s >= self.idle_s):
                    return
                continue
            waited_s = 0.0
            yield from self._news(entries)

    def _news(self, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> Iterator[dict[str, Any]]:
        read = [msgspec.json.decode(fields[b"confirmation"]) if fields else None for _, fields in entries]
        keys = [self._key(confirmation) if confirmation else "" for confirmation in read]  # which is no key
        seen = dict(zip(keys, self._client.mget(keys), strict=True))
        for (entry_id, fields), key, confirmation in zip(entries, keys, read, strict=True):
            with self._client.pipeline(transaction=True) as pipeline:
                if confirmation and int(seen[key] or 0) < confirmation["version"]:
                    with tracing.receiving(self._names.stream, self.group, fields, confirmation):
                        yield confirmation
                    seen[key] = confirmation["version"]
                    pipeline.set(key, confirmation["version"], ex=_REMEMBER_S)
                pipeline.xack(self._names.stream, self.group, entry_id)
                pipeline.execute()

    def _key(self, confirmation: dict[str, Any]) -> str:
        return self._names.seen_version(self.group, confirmation["eval_id"])


def _entries(found: Any) -> list[tuple[Any, dict[bytes, bytes]]]:
    """Those of the one stream that was read, in the shape of RESP2, whatever a client's protocol and whether it decodes."""
    if not found:
        return []
    ((_, entries),) = found.items() if isinstance(found, dict) else found
    if isinstance(found, dict):  # RESP3 has a list of what one XREADGROUP found in a stream
        (entries,) = entries
    return [
        (entry_id, {as_bytes(name): as_bytes(value) for name, value in (fields or {}).items()}) for entry_id, fields in entries
    ]
