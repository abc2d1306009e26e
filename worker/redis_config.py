"""What a Redis server's settings mean for what it confirms: looked at when a worker starts, and after each outage."""

from typing import Any, Final

import redis

# The first with BLMOVE, by which workers wait: https://redis.io/docs/latest/commands/blmove/
_OLDEST: Final = (6, 2)


def redis_config_warnings(client: redis.Redis) -> list[str]:
    """Why this server could lose events that it confirmed, or cannot be worked with: a sentence each.

    Reads INFO and CONFIG where that is allowed: managed servers often forbid CONFIG, careful ones both, as dangerous.
    Raises what redis raises.
    """
    try:
        info: dict[str, Any] = client.info()
    except redis.ResponseError as error:
        return [f"INFO is forbidden, so that it cannot be told what it keeps ({error})"]
    found = []
    version = str(info.get("redis_version", ""))
    if version and tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < _OLDEST:
        found.append(f"it is Redis {version}, and workers need 6.2 or later")
    if not info.get("aof_enabled"):
        found.append("appendonly is off: when it stops unexpectedly, events that it confirmed are lost")
    elif _setting(client, "appendfsync") == "no":
        found.append("appendfsync is no: when its machine fails, events that it confirmed in the last half minute are lost")
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy.startswith("allkeys"):
        found.append(f"maxmemory-policy is {policy}: when it is full it drops the whole queue instead of refusing more")
    return found


def _setting(client: redis.Redis, name: str) -> str | None:
    try:
        found: Any = client.config_get(name)
    except redis.ResponseError:
        return None
    return str(found[name]) if found.get(name) is not None else None
