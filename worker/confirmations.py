"""Telling other services what was stored: the Redis stream, and a pub/sub channel for each type."""

import time
from collections.abc import Sequence
from typing import Final

import redis
from sqlalchemy import Connection

from models.errors import RedisOutage
from storage import confirmations
from storage.confirmations import Line, Relayed, StreamId
from worker import tracing
from worker.broker import Broker

STREAM: Final = "evalstore:confirmations"
KEEP_S: Final = 24 * 3600
_CHUNK: Final = 500


def relay(conn: Connection, broker: Broker) -> int:
    """Publish all that is pending; returns how many confirmations were.

    Raises DatabaseOutage, RedisOutage (retry: at worst some are published again).
    """

    def publish(known: StreamId, lines: Sequence[Line]) -> Relayed:
        oldest_ms = int((time.time() - KEEP_S) * 1000)
        try:
            for start in range(0, max(1, len(lines)), _CHUNK):
                bodies, traces = zip(*lines[start : start + _CHUNK], strict=True) if lines else ((), ())
                with tracing.publishing(STREAM, traces) as traceparents:
                    about = (*known, oldest_ms, len(bodies))
                    ms, seq, done = broker.run("confirm", [STREAM], *about, *bodies, *traceparents)
                known = StreamId(ms, seq)
                if not done:
                    return Relayed(known, done=False)
        except redis.RedisError as error:
            raise RedisOutage(str(error)) from error
        broker.metrics.ledger.add("evalstore_confirmations_relayed_total", by=len(lines))
        return Relayed(known, done=True)

    return confirmations.relay(conn, publish)
