"""Serve below a path of a proxy, like `/evalstore`. EVALSTORE_API_ROOT_PATH or uvicorn's `--root-path` sets the path."""

import re
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class PathPrefixMiddleware:
    """Removes the prefix from paths, and adds it to the header Location. It is the outermost application.

    Requests arrive with the prefix or without it, because some proxies keep it and some remove it. The inner application sees
    `path` and `raw_path` without the prefix, and the prefix as `root_path`.
    """

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if b"://" in scope.get("raw_path", b""):
            scope = _in_origin_form(scope)
        prefix = (scope.get("root_path") or self._prefix).rstrip("/") if scope["type"] == "http" else ""
        if not prefix:
            await self._app(scope, receive, send)
            return

        async def send_prefixed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    (name, prefix.encode() + value if name == b"location" and value.startswith(b"/") else value)
                    for name, value in message.get("headers", ())
                ]
            await send(message)

        await self._app(_without(prefix, scope), receive, send_prefixed)


def _in_origin_form(scope: Scope) -> Scope:
    """Remove scheme and authority from a target in absolute form, as proxies send it. Uvicorn leaves them in the path.

    https://www.rfc-editor.org/rfc/rfc9112#name-absolute-form
    """
    absolute = f"^({re.escape(scope.get('root_path', ''))})https?://[^/]*/?"
    raw_path, found = re.subn(absolute.encode(), rb"\1/", scope["raw_path"], flags=re.IGNORECASE)
    path = re.sub(absolute, r"\1/", scope["path"], flags=re.IGNORECASE)
    return {**scope, "path": path, "raw_path": raw_path} if found else scope


def _without(prefix: str, scope: Scope) -> MutableMapping[str, Any]:
    path, raw_path, raw_prefix = scope["path"], scope.get("raw_path") or b"", prefix.encode()
    for _ in range(2):  # uvicorn adds `--root-path` a second time to a path that has it already.
        if path == prefix or path.startswith(f"{prefix}/"):
            path = path[len(prefix) :] or "/"
        if raw_path == raw_prefix or raw_path.startswith(raw_prefix + b"/"):
            raw_path = raw_path[len(raw_prefix) :] or b"/"
    return {**scope, "path": path, "raw_path": raw_path, "root_path": prefix}
