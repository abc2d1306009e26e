"""Whether what was started does its work yet: a worker imports for a second or two before it takes the first event."""

import contextlib
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import msgspec
import redis

from tasks.actor import QUEUE
from tasks.broker import Keys

_PATIENCE_S = 2.0


def workers(environment: Mapping[str, str], since: float) -> int:
    """How many worker processes that were started `since` then take events; 0 while Redis does not answer."""
    keys = Keys.of("dramatiq", QUEUE)
    client: Any = redis.Redis.from_url(environment["EVALSTORE_REDIS_URL"], socket_timeout=_PATIENCE_S)
    with contextlib.closing(client), contextlib.suppress(redis.RedisError):
        told = [msgspec.json.decode(line.partition(b" ")[2]) for line in client.hvals(keys.workers)]
        return sum(one["since"] >= since for one in told)
    return 0


def answers(environment: Mapping[str, str]) -> bool:
    """Whether the HTTP service does."""
    url = f"{environment['EVALSTORE_API_URL']}/health/live"
    with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=_PATIENCE_S) as answer:  # noqa: S310
        return bool(answer.status == 200)
    return False
