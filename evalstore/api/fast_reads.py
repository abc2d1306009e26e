"""Answer `GET /storage/evaluations/{id}` before FastAPI, whose routing costs more than the rest of the request.

The route in record_routes.py documents the request, and answers ids in another form.
"""

import re
from typing import Final, NamedTuple

from fastapi import FastAPI
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from evalstore.api import record_routes
from evalstore.api.service import service_of

_PATH: Final = re.compile(r"/storage/evaluations/([A-Za-z0-9._~:@+=-]{1,200})", re.ASCII)


_WAIT: Final = re.compile(rb"wait=([1-5]?\d|60)")


class _Route(NamedTuple):
    """The path template that metrics and spans name."""

    path: str


class FastReadMiddleware:
    """Around the FastAPI application, within RequestLimitsMiddleware, which answers exceptions."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._route = _Route("/storage/evaluations/{eval_id}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_get = scope["type"] == "http" and scope["method"] == "GET"
        waiting = _WAIT.fullmatch(scope["query_string"]) if is_get and scope["query_string"] else None
        match = _PATH.fullmatch(scope["path"]) if is_get and (waiting or not scope["query_string"]) else None
        if match is None:
            await self._app(scope, receive, send)
            return
        scope["app"], scope["route"] = self._app, self._route
        request = Request(scope, receive)
        caller = await service_of(request).access.authorize(request, "read")
        wait_s = float(waiting[1]) if waiting else None
        answer = await record_routes.answer(request, caller, match[1], request.headers.get("if-none-match"), wait_s)
        await answer(scope, receive, send)
