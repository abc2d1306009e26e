"""Pages and actions: one function answers a page as HTML and as JSON.

A function of a page returns its data as a dictionary. `Accept: application/json` or `?format=json` gives these data; else the
template shows them. An action is a POST of a form; see `Pages.action`.
"""

import base64
import binascii
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

import msgspec
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from evalstore.api import problems
from evalstore.api.problems import Problem
from evalstore.api.rendering import json_response
from evalstore.api.service import Service, service_of
from evalstore.console import rendering, sign_in
from evalstore.console.viewer import Viewer, check_typed_count, intent
from evalstore.storage.operator_actions import Intent
from tasks.tracing import release

_NOTICE: Final = "evalstore_console_notice"


@dataclass(frozen=True)
class View:
    """One request for a page, with its viewer. `form` holds the fields of an action."""

    request: Request
    service: Service
    viewer: Viewer
    form: Mapping[str, str] = field(default_factory=dict)

    def query(self, name: str, most: int = 1000) -> str | None:
        """Return a parameter of the query, None if it is missing or empty. Raises Problem (422)."""
        value = self.request.query_params.get(name, "").strip()
        if len(value) > most or "\0" in value:
            raise Problem(422, "invalid", f"{name}: expected up to {most:,} characters without NUL")
        return value or None

    def path(self, name: str) -> str:
        """Return a parameter of the path."""
        return str(self.request.path_params[name])

    def link(self, **changes: str | None) -> str:
        """Return the query of this page with some parameters replaced, None removes one. It begins with `?`."""
        kept = [(name, value) for name, value in self.request.query_params.multi_items() if name not in changes and value]
        return "?" + urlencode([*kept, *((name, value) for name, value in changes.items() if value)])

    def intent(self, verb: str, selection: Mapping[str, Any]) -> Intent:
        """Return the action as `operator_actions` records it, with the reason of the form. Raises Problem (422)."""
        return intent(self.viewer, self.form, verb, selection)

    def check_count(self, count: int) -> None:
        """Raises Problem (422) above 1,000 unless the form repeats the count."""
        check_typed_count(self.form, count)


class Done(NamedTuple):
    """The end of an action: the page to show next, below the root path, and a sentence about the outcome."""

    location: str
    notice: str


@dataclass(frozen=True)
class Shown:
    """Data of a page with values that only its template needs."""

    data: Mapping[str, Any]
    html: Mapping[str, Any]
    status: int = 200


Answer = Mapping[str, Any] | Shown | Response
Function = Callable[[View], Awaitable[Answer]]
Action = Callable[[View], Awaitable[Done | Response]]


class Entry(NamedTuple):
    """A link of the navigation. `key`: pressed after `g`, it opens the page. `for_restricted`: keys with restrictions too."""

    path: str
    title: str
    key: str
    for_restricted: bool


class Pages:
    """The pages of one module."""

    def __init__(self) -> None:
        self.routes: list[Route] = []
        self.entries: list[Entry] = []

    def page(
        self, path: str, template: str, title: str, *, key: str | None = None, for_restricted: bool = False
    ) -> Callable[[Function], Function]:
        """Declare a page below `/console`. With `key` the navigation links to it.

        Restricted keys get 404 unless `for_restricted` is true: such a page uses `view.viewer.visibility`.
        """
        address = f"/console{path}"
        if key is not None:
            self.entries.append(Entry(address, title, key, for_restricted))

        def declare(function: Function) -> Function:
            async def answer(request: Request) -> Response:
                return await _answered(request, lambda: _show(request, function, template, title, address, for_restricted))

            self.routes.append(Route(address, answer, methods=["GET"]))
            return function

        return declare

    def action(self, path: str) -> Callable[[Action], Action]:
        """Declare an action: a POST of a form with `csrf`, of a viewer who may act. `Done` becomes 303 to its location.

        The function takes its reason by `view.intent`, and calls `view.check_count` if it affects many things.
        """
        address = f"/console{path}"

        def declare(function: Action) -> Action:
            async def answer(request: Request) -> Response:
                return await _answered(request, lambda: _act(request, function))

            self.routes.append(Route(address, answer, methods=["POST"]))
            return function

        return declare

    def stream(self, path: str, *, for_restricted: bool = False) -> Callable[[Function], Function]:
        """Declare an address that answers by itself, such as a stream or a download. The function returns a Response."""
        return self.page(path, "", "", for_restricted=for_restricted)


def render(view: View, template: str, title: str, values: Mapping[str, Any], status: int = 200) -> Response:
    """Return a page as the answer of an action."""
    address = view.request.url.path.removeprefix(view.request.scope.get("root_path", ""))
    return rendering.page(view.request, template, {**values, **frame(view.request, view.viewer, title, address)}, status)


async def signed_in(request: Request) -> Viewer | None:
    """Return the viewer. Return None for a browser that has to sign in. Raises Problem (401) for a program."""
    viewer = await sign_in.viewer_of(request)
    if viewer is None and wants_json(request):
        raise Problem(401, "unauthorized", "sign in at /console/login: the session is over or missing")
    return viewer


async def _show(
    request: Request, function: Function, template: str, title: str, address: str, for_restricted: bool
) -> Response:
    viewer = await signed_in(request)
    if viewer is None:
        return sign_in.to_login(request)
    if viewer.is_restricted and not for_restricted:
        if address == "/console" and not wants_json(request):
            return RedirectResponse("/console/evaluations", 303)
        raise Problem(404, "not-found", "there is no such page for this key")
    found = await function(View(request, service_of(request), viewer))
    if isinstance(found, Response):
        return found
    shown = found if isinstance(found, Shown) else Shown(found, {})
    if wants_json(request):
        return json_response(shown.data, shown.status, {"Cache-Control": "no-store", "Vary": "Accept, Cookie"})
    values = {**shown.data, **shown.html, **frame(request, viewer, title, address)}
    response = rendering.page(request, template, values, shown.status)
    if request.cookies.get(_NOTICE):
        response.delete_cookie(_NOTICE, path=f"{request.scope.get('root_path', '')}/console")
    if request.cookies.get(sign_in.COOKIE) != viewer.token:
        sign_in.set_cookie(request, response, viewer.token)
    return response


def frame(request: Request, viewer: Viewer | None, title: str, address: str) -> dict[str, Any]:
    """Return the values that the layout needs."""
    entries: Sequence[Entry] = request.app.state.console_entries
    json_query = [(name, value) for name, value in request.query_params.multi_items() if name != "format"]
    return {
        "title": title,
        "here": address,
        "viewer": viewer,
        "entries": [entry for entry in entries if viewer and (entry.for_restricted or not viewer.is_restricted)],
        "notice": _notice(request),
        "json_link": "?" + urlencode([*json_query, ("format", "json")]),
        "is_read_only": service_of(request).settings.console == "read-only",
        "release": release(),
    }


def _notice(request: Request) -> str | None:
    try:
        return base64.urlsafe_b64decode(request.cookies.get(_NOTICE, "").encode()).decode() or None
    except (ValueError, binascii.Error):
        return None


async def _act(request: Request, function: Action) -> Response:
    form, viewer = await sign_in.form_of(request), await signed_in(request)
    if viewer is None:
        return sign_in.to_login(request)
    viewer.check_csrf(request.headers.get("x-csrf-token") or form.get("csrf", ""))
    if service_of(request).settings.console == "read-only":
        raise Problem(403, "forbidden", "the console is read-only: EVALSTORE_CONSOLE")
    if not viewer.may_act:
        raise Problem(403, "forbidden", "an action needs a key with the scope admin")
    done = await function(View(request, service_of(request), viewer, form))
    if isinstance(done, Response):
        return done
    if wants_json(request):
        return json_response(done._asdict())
    response = RedirectResponse(done.location, 303)
    response.set_cookie(
        _NOTICE,
        base64.urlsafe_b64encode(done.notice[:1000].encode("utf-8", "backslashreplace")).decode(),
        path=f"{request.scope.get('root_path', '')}/console",
        max_age=60,
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
    return response


def wants_json(request: Request) -> bool:
    """Tell whether the answer has to be JSON: `?format=json`, or an Accept header that names it before HTML."""
    if (form := request.query_params.get("format")) is not None:
        return form == "json"
    accept = request.headers.get("accept", "")
    return "application/json" in accept and "text/html" not in accept


async def _answered(request: Request, answer: Callable[[], Awaitable[Response]]) -> Response:
    """Answer, and turn errors into a page or into a problem."""
    try:
        return await answer()
    except Exception as error:  # noqa: BLE001 - every request is answered; `of` logs unexpected errors
        problem = problems.of(error)
    if wants_json(request):
        return problems.response(problem, request.state.request_id)
    values = {"problem": problem, "body": msgspec.to_builtins(problems.body(problem, request.state.request_id))}
    response = rendering.page(request, "problem.html", {**values, **frame(request, None, "Problem", "")}, problem.status)
    response.headers.update(problem.headers)
    return response


def answering(function: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint that answers errors with pages."""

    async def answer(request: Request) -> Response:
        return await _answered(request, lambda: function(request))

    return answer
