"""Rates of keys, counted in Redis for all processes of the service together.

Without Redis no request is counted and none is refused: reads and writes need PostgreSQL alone, and go on.
docs/decisions/0047 says why.
"""

import asyncio
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import redis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from evalstore.api.problems import Problem
from evalstore.storage.api_keys import Rate
from models.logs import EventLogger
from tasks.keys import Names

if TYPE_CHECKING:
    from limits.aio.strategies import SlidingWindowCounterRateLimiter

log = EventLogger("evalstore.api")

_CONNECTIONS: Final = 8
_ANSWER_S: Final = 0.25  # the longest time that a request waits for Redis
_PAUSE_AFTER_FAILURE_S: Final = 5.0


class RateLimiter:
    """For one event loop. `count` counts a check: `allowed`, `refused`, or `unchecked` without Redis."""

    def __init__(self, redis_url: str, names: Names, count: Callable[[str], None]) -> None:
        self._redis_url, self._prefix, self._count = redis_url, names.rates, count
        self._pool: redis.asyncio.ConnectionPool | None = None
        self._window: SlidingWindowCounterRateLimiter | None = None
        self._paused_until = 0.0

    async def spend(self, key_id: str, rate: Rate) -> dict[str, str]:
        """Count a request of a key. Return the header fields that tell its rate. Raises Problem (429)."""
        from limits import RateLimitItemPerSecond  # noqa: PLC0415 - only keys with a rate need it

        if time.monotonic() < self._paused_until:
            self._count("unchecked")
            return {}
        item = RateLimitItemPerSecond(rate.requests, rate.period_s)
        try:
            async with asyncio.timeout(_ANSWER_S):
                window = self._window or self._open()
                is_allowed = await window.hit(item, key_id)
                reset_at, remaining = await window.get_window_stats(item, key_id)
        except (redis.RedisError, TimeoutError, OSError) as error:
            self._paused_until = time.monotonic() + _PAUSE_AFTER_FAILURE_S
            self._count("unchecked")
            log.warning("rates_unchecked", seconds=_PAUSE_AFTER_FAILURE_S, error=error)
            return {}
        self._count("allowed" if is_allowed else "refused")
        reset_s = min(rate.period_s, max(1, math.ceil(reset_at - time.time())))
        headers = _headers(rate, remaining if is_allowed else 0, reset_s)
        if not is_allowed:
            detail = f"the key may send {rate.requests:,} requests in {rate.period_s:,} s"
            raise Problem(429, "rate-exceeded", detail, headers={**headers, "Retry-After": str(reset_s)})
        return headers

    def _open(self) -> "SlidingWindowCounterRateLimiter":
        from limits.aio.storage import RedisStorage  # noqa: PLC0415 - only keys with a rate need it
        from limits.aio.strategies import SlidingWindowCounterRateLimiter  # noqa: PLC0415

        options: dict[str, Any] = {"socket_timeout": _ANSWER_S, "socket_connect_timeout": _ANSWER_S}
        self._pool = redis.asyncio.BlockingConnectionPool.from_url(
            self._redis_url, max_connections=_CONNECTIONS, timeout=_ANSWER_S, retry=Retry(NoBackoff(), 0), **options
        )
        storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix=self._prefix,
            connection_pool=self._pool,  # type: ignore[arg-type]
        )
        self._window = SlidingWindowCounterRateLimiter(storage)
        return self._window

    async def close(self) -> None:
        """Close the connections to Redis."""
        if self._pool is not None:
            await self._pool.disconnect()


def _headers(rate: Rate, remaining: int, reset_s: int) -> dict[str, str]:
    """Return RateLimit fields: https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/."""
    return {
        "RateLimit-Policy": f'"key";q={rate.requests};w={rate.period_s}',
        "RateLimit": f'"key";r={max(0, remaining)};t={reset_s}',
    }
