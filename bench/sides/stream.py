"""A worker that an engineer might write by hand: a loop over a Redis stream with a consumer group, and one INSERT for each
batch.

It stores only events: no records, no confirmations, and no dead letters.
"""

import os
from collections.abc import Iterable
from itertools import islice
from typing import Any, Final

import msgspec
import psycopg
import redis

from models.settings import settings

STREAM: Final = "evaluations"
GROUP: Final = "storage"

_TYPES: Final = {
    "eval_id": "text",
    "event_id": "uuid",
    "type": "text",
    "attempt": "int4",
    "occurred_at": "timestamptz",
    "metadata": "jsonb",
    "language": "text",
    "submitter": "text",
    "executor_id": "text",
    "container_id": "text",
    "timeout_s": "float8",
    "exit_code": "int8",
    "duration_ms": "float8",
    "memory_bytes": "int8",
    "code": "bytea",
    "output": "bytea",
}
_SENT_AS: Final = {"jsonb": "text"}
_INSERT: Final = f"""
INSERT INTO evaluation_events ({", ".join(_TYPES)})
SELECT {", ".join(f"{name}::{type_}" for name, type_ in _TYPES.items())}
FROM unnest({", ".join(f"%s::{_SENT_AS.get(type_, type_)}[]" for type_ in _TYPES.values())}) AS given ({", ".join(_TYPES)})
ON CONFLICT DO NOTHING
"""


def main() -> None:
    """Store messages until killed."""
    count, consumer = int(os.environ.get("BENCH_THREADS", "1000")), str(os.getpid())
    decoder = msgspec.json.Decoder(dict[str, Any])
    client = redis.Redis.from_url(settings().redis_url.get_secret_value())
    with psycopg.connect(settings().database_url.get_secret_value()) as conn:
        while True:
            reply: Any = client.xreadgroup(GROUP, consumer, {STREAM: ">"}, count=count, block=1000)
            for _, entries in reply or []:
                _store(conn, [decoder.decode(fields[b"event"]) for _, fields in entries])
                client.xack(STREAM, GROUP, *(entry_id for entry_id, _ in entries))


def _store(conn: psycopg.Connection[Any], events: list[dict[str, Any]]) -> None:
    for event in events:
        for name in ("code", "output"):
            if name in event:
                event[name] = event[name].encode()
        if "metadata" in event:
            event["metadata"] = msgspec.json.encode(event["metadata"]).decode()
    columns = [[event.get(name) for event in events] for name in _TYPES]
    with conn.transaction():
        conn.execute(_INSERT, columns)


def fill(events: Iterable[dict[str, Any]]) -> None:
    remaining = iter(events)
    with redis.Redis.from_url(settings().redis_url.get_secret_value()) as client:
        while some := list(islice(remaining, 1000)):
            with client.pipeline(transaction=False) as pipeline:
                for event in some:
                    pipeline.xadd(STREAM, {"event": msgspec.json.encode(event)})
                pipeline.execute()


if __name__ == "__main__":
    main()
