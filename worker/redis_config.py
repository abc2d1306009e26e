"""Check whether a Redis server keeps the writes that it confirms. Workers check at the start and after each outage."""

from typing import Any, Final

import redis

from tasks.connections import is_located

# The first version with BLMOVE, which waiting workers use: https://redis.io/docs/latest/commands/blmove/
_OLDEST: Final = (6, 2)


def redis_config_warnings(client: redis.Redis) -> list[str]:
    """Return a sentence for each reason why this server may lose confirmed events or does not work with evalstore.

    Reads INFO and CONFIG if the server allows that. Managed servers often forbid CONFIG, and some forbid both. Raises
    RedisError.
    """
    try:
        info: dict[str, Any] = client.info()
    except redis.ResponseError as error:
        return [f"INFO is forbidden, so it is unknown what the server keeps ({error})"]
    found = []
    if info.get("redis_mode") == "cluster" and not is_located(client):
        found.append("it is a node of a cluster: use an address with redis+cluster://, which follows its slots")
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
