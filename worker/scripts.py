"""The Lua scripts in worker/lua/."""

from pathlib import Path
from typing import Any, Final

import redis

_LUA: Final = Path(__file__).parent / "lua"


class Scripts:
    """Runs scripts on one Redis. Any thread may use it."""

    def __init__(self, client: redis.Redis) -> None:
        self._scripts = {path.stem: client.register_script(path.read_text(encoding="utf-8")) for path in _LUA.glob("*.lua")}

    def run(self, name: str, keys: list[str], *args: Any) -> Any:
        """Run worker/lua/<name>.lua and return its reply. Raises RedisError; every script is safe to run again."""
        return self._scripts[name](keys=keys, args=args)
