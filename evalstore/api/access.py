"""API keys: from the settings, from files that are read again when they change, and from the table `api_keys`.

Keys are compared by their SHA-256 in constant time. Logs name a key by an id from which it cannot be computed.
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
from evalstore.api.rate_limit import RateLimiter
from evalstore.storage.api_keys import Key, Rate, digest, including
from evalstore.storage.visibility import EVERYTHING, Visibility
from models.errors import Outage
from models.logs import EventLogger
from models.settings import Settings

log = EventLogger("evalstore.api")

Permission = Literal["read", "write", "admin"]

# A revoked key stops working within this time.
FRESH_S: Final = 1.0


class Caller(NamedTuple):
    """The id of the key of a request, its scopes, the evaluations that it may see and write, and its rate."""

    key_id: str
    scopes: frozenset[str]
    visibility: Visibility = EVERYTHING
    rate: Rate | None = None


class _KeyFile:
    """A file of keys, one a line or separated by commas."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_state: tuple[int, int, int] | None = None
        self._is_failing = False
        self.keys: tuple[str, ...] = ()

    def refresh(self) -> None:
        """Read the file again if it changed. Keep the last keys while it cannot be read: it may be about to be replaced."""
        try:
            stat = self._path.stat()
            state = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if state != self._read_state:
                self.keys = _split(self._path.read_text(encoding="utf-8-sig"))
                self._read_state = state
            self._is_failing = False
        except (OSError, UnicodeDecodeError) as error:
            if not self._is_failing:
                log.warning("keys_file_unreadable", error=type(error).__name__)
            self._is_failing = True


def _split(text: str) -> tuple[str, ...]:
    return tuple(key for line in text.splitlines() for part in line.split(",") if (key := part.strip()))


class Access:
    """The valid keys. `load` reads the keys of the table and raises Outage."""

    def __init__(self, settings: Settings, load: Callable[[], Awaitable[list[Key]]], limiter: RateLimiter) -> None:
        self._settings_keys: dict[Permission, tuple[str, ...]] = {
            "read": _split(settings.read_api_keys.get_secret_value()),
            "write": _split(settings.write_api_keys.get_secret_value()),
            "admin": _split(settings.admin_api_keys.get_secret_value()),
        }
        paths: dict[Permission, Path | None] = {
            "read": settings.read_api_keys_file,
            "write": settings.write_api_keys_file,
            "admin": settings.admin_api_keys_file,
        }
        self._files: dict[Permission, _KeyFile] = {scope: _KeyFile(path) for scope, path in paths.items() if path}
        self._load, self._limiter = load, limiter
        self._configured: dict[bytes, Caller] = {}
        self._configured_at = self._table_at = -FRESH_S
        self._table: dict[str, Key] | None = None
        self._loading: asyncio.Task[None] | None = None

    async def authorize(self, request: Request, permission: Permission) -> Caller:
        """Return the caller of a request, and count the request if the key has a rate.

        Raises Problem: 401 for a missing or invalid key, 403 without the scope, 429 above the rate, 503.
        """
        caller = await self._identify(request)
        request.state.key_id = caller.key_id
        if caller.rate is not None:
            request.state.rate_headers = await self._limiter.spend(caller.key_id, caller.rate)
        return _permitted(caller, permission)

    async def authorize_again(self, request: Request, permission: Permission) -> Caller:
        """Return the caller of a request that still runs. Count nothing. Raises Problem: 401, 403, 503."""
        return _permitted(await self._identify(request), permission)

    async def _identify(self, request: Request) -> Caller:
        key = _presented(request.headers)
        if key is None:
            raise _unauthorized("a key is required: Authorization: Bearer KEY, or X-API-Key: KEY")
        caller = self._find_configured(key) or await self._find_in_table(key)
        if caller is None:
            raise _unauthorized("the key is unknown, expired or revoked")
        return caller

    def _find_configured(self, key: str) -> Caller | None:
        if time.monotonic() - self._configured_at >= FRESH_S:
            self._refresh_configured()
        presented = digest(key)
        found = None
        for known, caller in self._configured.items():  # Compare all keys, so that the duration does not depend on the key.
            if hmac.compare_digest(known, presented):
                found = caller
        return found

    def _refresh_configured(self) -> None:
        scopes: dict[bytes, frozenset[str]] = {}
        for scope, keys in self._settings_keys.items():
            file = self._files.get(scope)
            if file:
                file.refresh()
            for key in (*keys, *(file.keys if file else ())):
                scopes[digest(key)] = scopes.get(digest(key), frozenset()) | including({scope})
        self._configured = {
            hashed: Caller(f"settings-{digest(hashed.hex()).hex()[:8]}", granted) for hashed, granted in scopes.items()
        }
        self._configured_at = time.monotonic()

    async def _find_in_table(self, key: str) -> Caller | None:
        prefix, _, rest = key.partition("_")
        key_id, _, secret = rest.partition("_")
        if prefix != "evs" or not secret:
            return None
        if time.monotonic() - self._table_at >= FRESH_S:
            # All requests share one load. A client that disconnects must not cancel it.
            if self._loading is None or self._loading.done():
                self._loading = asyncio.create_task(self._refresh_table())
            await asyncio.shield(self._loading)
        if self._table is None:
            raise unavailable("keys cannot be checked: the database cannot be reached")
        stored = self._table.get(key_id)
        # Compare unknown ids too, with a digest of the same length: the duration must not show whether an id exists.
        if not hmac.compare_digest(stored.digest if stored else bytes(32), digest(key)) or stored is None:
            return None
        if stored.expires_at is not None and stored.expires_at <= datetime.now(UTC):
            return None
        scopes = including(stored.scopes)
        if stored.visibility.is_restricted:  # Requests of the scope admin concern everything.
            scopes -= {"admin"}
        return Caller(stored.key_id, scopes, stored.visibility, stored.rate)

    async def _refresh_table(self) -> None:
        try:
            self._table = {key.key_id: key for key in await self._load()}
        except Outage as error:
            # Without the database no key can be revoked either, so the last known keys stay valid.
            log.warning("keys_table_unreadable", error=error)
        self._table_at = time.monotonic()


def _permitted(caller: Caller, permission: Permission) -> Caller:
    if permission not in caller.scopes:
        raise Problem(403, "forbidden", f"this request needs a key with the scope {permission}")
    return caller


def _presented(headers: Mapping[str, str]) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key", "").strip() or None


def _unauthorized(detail: str) -> Problem:
    return Problem(401, "unauthorized", detail, headers={"WWW-Authenticate": 'Bearer realm="evalstore"'})
