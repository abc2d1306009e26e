"""Who may do what: keys from the settings, from files that are read again when they change, and from the table `api_keys`.

Keys are compared by their SHA-256, in constant time, and named in logs by an id that does not give them away.
"""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, NamedTuple

from starlette.requests import Request

from evalstore.api.problems import Problem, unavailable
from evalstore.storage.api_keys import Key, digest
from models.errors import Outage
from models.logs import EventLogger
from models.settings import Settings

log = EventLogger("evalstore.api")

Permission = Literal["read", "write"]

# So old may be what is known of files and of the table: revoking a key works within this.
FRESH_S: Final = 1.0


class Caller(NamedTuple):
    """Who asks: the id of the key, and what it may do."""

    key_id: str
    scopes: frozenset[str]


class _File:
    """The keys of a file, one a line or separated by commas."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._failing = False
        self.keys: tuple[str, ...] = ()

    def refresh(self) -> None:
        try:
            state = self._path.stat()
            seen = (state.st_mtime_ns, state.st_ino, state.st_size)
            if seen != self._seen:
                self.keys = _split(self._path.read_text(encoding="utf-8-sig"))
                self._seen = seen
            self._failing = False
        except (OSError, UnicodeDecodeError) as error:
            # It may be about to be replaced; what it held before goes on being true.
            if not self._failing:
                log.warning("keys_file_unreadable", error=type(error).__name__)
            self._failing = True


def _split(text: str) -> tuple[str, ...]:
    return tuple(key for line in text.splitlines() for part in line.split(",") if (key := part.strip()))


class Access:
    """The keys that are good now. `load` gives those of the table; it raises Outage."""

    def __init__(self, settings: Settings, load: Callable[[], Awaitable[list[Key]]]) -> None:
        self._given: dict[Permission, tuple[str, ...]] = {
            "read": _split(settings.read_api_keys.get_secret_value()),
            "write": _split(settings.write_api_keys.get_secret_value()),
        }
        paths: dict[Permission, Path | None] = {"read": settings.read_api_keys_file, "write": settings.write_api_keys_file}
        self._files: dict[Permission, _File] = {scope: _File(path) for scope, path in paths.items() if path}
        self._load = load
        self._configured: dict[bytes, Caller] = {}
        self._configured_at = self._table_at = -FRESH_S
        self._table: dict[str, Key] | None = None
        self._loading: asyncio.Task[None] | None = None

    async def caller(self, request: Request, wanted: Permission) -> Caller:
        """Who asks. Raises Problem: 401 for a key that is missing or no good, 403 where it may not do this, 503."""
        key = _presented(request.headers)
        if key is None:
            raise _unauthorized("a key is needed: Authorization: Bearer KEY, or X-API-Key: KEY")
        caller = self._of_settings(key) or await self._of_table(key)
        if caller is None:
            raise _unauthorized("the key is not known, or no longer good")
        request.state.key_id = caller.key_id
        if wanted not in caller.scopes:
            raise Problem(403, "forbidden", f"this needs a key that may {wanted}")
        return caller

    def _of_settings(self, key: str) -> Caller | None:
        if time.monotonic() - self._configured_at >= FRESH_S:
            self._refresh_settings()
        presented = digest(key)
        found = None
        for kept, caller in self._configured.items():  # all of them: how long it takes tells nothing
            if hmac.compare_digest(kept, presented):
                found = caller
        return found

    def _refresh_settings(self) -> None:
        scopes: dict[bytes, frozenset[str]] = {}
        for scope, keys in self._given.items():
            file = self._files.get(scope)
            if file:
                file.refresh()
            for key in (*keys, *(file.keys if file else ())):
                scopes[digest(key)] = scopes.get(digest(key), frozenset()) | {scope}
        self._configured = {kept: Caller(f"settings-{digest(kept.hex()).hex()[:8]}", may) for kept, may in scopes.items()}
        self._configured_at = time.monotonic()

    async def _of_table(self, key: str) -> Caller | None:
        prefix, _, rest = key.partition("_")
        key_id, _, secret = rest.partition("_")
        if prefix != "evs" or not secret:
            return None
        if time.monotonic() - self._table_at >= FRESH_S:
            # One loads for all who wait. Whoever goes away meanwhile does not take it along.
            if self._loading is None or self._loading.done():
                self._loading = asyncio.create_task(self._refresh_table())
            await asyncio.shield(self._loading)
        if self._table is None:
            raise unavailable("keys cannot be checked: the database cannot be reached")
        kept = self._table.get(key_id)
        # Compared for an unknown id too, against something of the same length.
        if not hmac.compare_digest(kept.digest if kept else bytes(32), digest(key)) or kept is None:
            return None
        if kept.expires_at is not None and kept.expires_at <= datetime.now(UTC):
            return None
        return Caller(kept.key_id, kept.scopes)

    async def _refresh_table(self) -> None:
        try:
            self._table = {key.key_id: key for key in await self._load()}
        except Outage as error:
            # Nobody can revoke a key meanwhile either: what was known goes on being true.
            log.warning("keys_table_unreadable", error=error)
        self._table_at = time.monotonic()


def _presented(headers: Mapping[str, str]) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key", "").strip() or None


def _unauthorized(detail: str) -> Problem:
    return Problem(401, "unauthorized", detail, headers={"WWW-Authenticate": 'Bearer realm="evalstore"'})
