"""Check that started processes are ready. A worker imports for a second or two before it takes events."""

import contextlib
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import msgspec
import redis

from tasks.keys import QUEUE, Keys

_TIMEOUT_S = 2.0


def count_workers(environment: Mapping[str, str], since: float) -> int:
    """Count the worker processes started after `since` that take events. Returns 0 during an outage of Redis."""
    keys = Keys.of(environment["EVALSTORE_REDIS_NAMESPACE"], QUEUE)
    client: Any = redis.Redis.from_url(environment["EVALSTORE_REDIS_URL"], socket_timeout=_TIMEOUT_S)
    with contextlib.closing(client), contextlib.suppress(redis.RedisError):
        workers = [msgspec.json.decode(line.partition(b" ")[2]) for line in client.hvals(keys.workers)]
        return sum(worker["since"] >= since for worker in workers)
    return 0


def is_api_live(environment: Mapping[str, str]) -> bool:
    """Return whether the HTTP service answers."""
    url = f"{environment['EVALSTORE_API_URL'].rstrip('/')}/health/live"
    with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:  # noqa: S310
        return bool(response.status == 200)
    return False
