"""Sign in with an API key, a link that works once, or a trusted proxy's header; and sign out."""

import ipaddress
import re
import secrets
import time
from typing import Any, Final
from urllib.parse import parse_qsl, quote

import redis
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from evalstore.api.access import Caller
from evalstore.api.problems import Problem
from evalstore.api.service import Service, service_of
from evalstore.console import rendering
from evalstore.console.viewer import Viewer
from evalstore.storage import console_sessions
from models.networks import is_allowed, parse_networks

COOKIE: Final = "evalstore_console"
LOGIN: Final = "/console/login"
FAILURES: Final = 10  # from one address, in WINDOW_S
WINDOW_S: Final = 60
_FORM_BYTES: Final = 1024 * 1024
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{20,100}", re.ASCII)
_USER: Final = re.compile(r"[^\x00-\x1f\x7f-\x9f]{1,200}")
_NEXT: Final = re.compile(r"/console(?:/[A-Za-z0-9._~:@+=%/-]*)?(?:\?[A-Za-z0-9._~:@+=%&-]*)?", re.ASCII)


class FailedSignIns:
    """Counts failures by network of the client, in Redis for all processes, and here for the time when Redis is away."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._counts: dict[str, int] = {}
        self._began = time.monotonic()

    def _key(self, client: str) -> str:
        return f"{self._service.names.failed_sign_ins}:{client}:{int(time.time()) // WINDOW_S}"

    def _own(self) -> dict[str, int]:
        if time.monotonic() - self._began > WINDOW_S:
            self._counts, self._began = {}, time.monotonic()
        return self._counts

    async def check(self, client: str) -> None:
        """Raises Problem (429) after FAILURES failures."""
        try:
            shared: Any = await self._service.thread(lambda: self._service.redis.get(self._key(client)))
            count = int(shared or 0)
        except redis.RedisError:
            count = self._own().get(client, 0)
        if count >= FAILURES:
            detail = "too many failed sign-ins: wait a minute"
            raise Problem(429, "rate-exceeded", detail, headers={"Retry-After": str(WINDOW_S)})

    async def count(self, client: str) -> None:
        """Count a failure."""
        own = self._own()
        own[client] = own.get(client, 0) + 1

        def add() -> None:
            with self._service.redis.pipeline() as pipeline:
                pipeline.incr(self._key(client))
                pipeline.expire(self._key(client), 2 * WINDOW_S)
                pipeline.execute()

        try:
            await self._service.thread(add)
        except redis.RedisError:
            return


def _client(request: Request) -> str:
    host = request.client.host if request.client else "unknown"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "unknown"
    return host if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


async def form_of(request: Request) -> dict[str, str]:
    """Return the fields of a form. Raises Problem (403 from another site, 413, 415)."""
    refuse_other_sites(request)
    if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        raise Problem(415, "unsupported-type", "expected a form: application/x-www-form-urlencoded")
    async with service_of(request).body(request) as body:
        if len(body) > _FORM_BYTES:
            raise Problem(413, "too-large", f"a form may have {_FORM_BYTES:,} bytes")
        try:
            return dict(parse_qsl(bytes(body).decode(), keep_blank_values=True, max_num_fields=200))
        except ValueError as error:
            raise Problem(422, "invalid", "the form cannot be read") from error


def refuse_other_sites(request: Request) -> None:
    """Raises Problem (403) for a request that a page of another site sends. Browsers name the site in each such request."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    is_foreign = site not in {"same-origin", "none"} if site is not None else False
    if site is None and origin is not None:
        # Pages of other sites cannot set X-Forwarded-Host. A proxy that replaces Host sets it.
        own = (request.headers.get("host"), request.headers.get("x-forwarded-host"))
        is_foreign = origin.partition("://")[2] not in own
    if is_foreign:
        raise Problem(403, "forbidden", "the request comes from another site")


async def viewer_of(request: Request) -> Viewer | None:
    """Return the viewer of a request, or None without a session. Raises Problem, Outage (503)."""
    service, token = service_of(request), _cookie(request)
    may_act = service.settings.console == "on"
    if (user := _proxy_user(request)) is not None:
        request.state.key_id = f"console user {user}"
        return Viewer(f"user {user}", None, frozenset({"read", "write", "admin"}), token or secrets.token_urlsafe(32), may_act)
    if token is None or (key_id := await service.run(lambda conn: console_sessions.find(conn, token))) is None:
        return None
    caller = await service.access.find_by_id(key_id)
    if caller is None or "read" not in caller.scopes:
        return None
    request.state.key_id = caller.key_id
    is_admin = "admin" in caller.scopes
    return Viewer(f"key {key_id}", key_id, caller.scopes, token, may_act and is_admin, caller.visibility)


def _cookie(request: Request) -> str | None:
    token = request.cookies.get(COOKIE, "")
    return token if _TOKEN.fullmatch(token) else None


def _proxy_user(request: Request) -> str | None:
    """Return the user that a trusted proxy names. The connection itself must come from one of the proxies' networks."""
    settings, peer = service_of(request).settings, getattr(request.state, "peer", None)
    if settings.console_proxy_header is None or peer is None:
        return None
    user = request.headers.get(settings.console_proxy_header, "").strip()
    try:
        is_trusted = is_allowed(ipaddress.ip_address(peer), parse_networks(settings.console_proxy_networks or ""))
    except ValueError:
        return None
    return user if is_trusted and _USER.fullmatch(user) else None


def set_cookie(request: Request, response: Response, token: str) -> None:
    """Set the cookie of a session. Scripts cannot read the cookie, and other sites cannot use it."""
    response.set_cookie(
        COOKIE,
        token,
        path=f"{request.scope.get('root_path', '')}/console",
        max_age=int(console_sessions.LONGEST.total_seconds()),
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )


def to_login(request: Request) -> Response:
    """Send the browser to the sign-in, and after it back to the page."""
    page = request.url.path.removeprefix(request.scope.get("root_path", ""))
    address = quote(f"{page}?{request.url.query}" if request.url.query else page, safe="/")
    return RedirectResponse(f"{LOGIN}?next={address}" if page not in {"/console", "/console/"} else LOGIN, 303)


def _after(request: Request) -> str:
    wanted = request.query_params.get("next", "")
    is_page = _NEXT.fullmatch(wanted) and "//" not in wanted and ".." not in wanted and not wanted.startswith(LOGIN)
    return wanted if is_page else "/console"


async def show(request: Request) -> Response:
    """Answer `GET /console/login`: the form, or for `?link=` a session."""
    link = request.query_params.get("link")
    if link is None:
        return _form(request, None, 200)
    limits = _limits(request)
    await limits.check(_client(request))
    service = service_of(request)
    key_id = await service.run(lambda conn: console_sessions.follow_link(conn, link))
    caller = await service.access.find_by_id(key_id) if key_id else None
    if caller is None:
        await limits.count(_client(request))
        return _form(request, "The link was used before, or is too old. Sign in with a key.", 403)
    return await _begin(request, caller)


async def sign_in(request: Request) -> Response:
    """Answer `POST /console/login`: exchange the key of the form for a session. Raises Problem."""
    form = await form_of(request)
    limits, client = _limits(request), _client(request)
    await limits.check(client)
    caller = await service_of(request).access.find(form.get("key", "").strip())
    if caller is None:
        await limits.count(client)
        return _form(request, "The key is unknown, expired or revoked.", 403)
    if "read" not in caller.scopes:
        return _form(request, "The key has no scope read.", 403)
    return await _begin(request, caller)


async def _begin(request: Request, caller: Caller) -> Response:
    service, before = service_of(request), _cookie(request)
    if before is not None:
        await service.run(lambda conn: console_sessions.end(conn, before))
    token = await service.run(lambda conn: console_sessions.begin(conn, caller.key_id))
    request.state.key_id = caller.key_id
    response = RedirectResponse(_after(request), 303)
    set_cookie(request, response, token)
    return response


async def sign_out(request: Request) -> Response:
    """Answer `POST /console/logout`. Raises Problem (403)."""
    form, viewer = await form_of(request), await viewer_of(request)
    if viewer is not None:
        viewer.check_csrf(form.get("csrf", ""))
        await service_of(request).run(lambda conn: console_sessions.end(conn, viewer.token))
    response = RedirectResponse(LOGIN, 303)
    response.delete_cookie(COOKIE, path=f"{request.scope.get('root_path', '')}/console")
    return response


def _limits(request: Request) -> FailedSignIns:
    state = request.app.state
    if not hasattr(state, "failed_sign_ins"):
        state.failed_sign_ins = FailedSignIns(service_of(request))
    found: FailedSignIns = state.failed_sign_ins
    return found


def _form(request: Request, error: str | None, status: int) -> Response:
    address = request.scope.get("root_path", "") + LOGIN
    if (after := _after(request)) != "/console":
        address += f"?next={quote(after, safe='/')}"
    return rendering.page(request, "login.html", {"error": error, "action": address}, status)
