"""`GET /storage/evaluations/{id}` is what is asked for most. It is answered before FastAPI looks at it, which would take longer
over it than all the rest does.

The route in record_routes.py describes it in the document, and answers whatever is not asked for in the usual form.
"""

import re
from typing import Final, NamedTuple

from fastapi import FastAPI
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from evalstore.api import record_routes

_PATH: Final = re.compile(r"/storage/evaluations/([A-Za-z0-9._~:@+=-]{1,200})", re.ASCII)


class _Route(NamedTuple):
    """By whose path requests are counted."""

    path: str


class FastReadMiddleware:
    """Around the application, within Guard."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._route = _Route("/storage/evaluations/{eval_id}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_get = scope["type"] == "http" and scope["method"] == "GET"
        match = _PATH.fullmatch(scope["path"]) if is_get else None
        if match is None:
            await self._app(scope, receive, send)
            return
        scope["app"], scope["route"] = self._app, self._route
        answer = await record_routes.record(Request(scope), match[1])
        await answer(scope, receive, send)
