"""The files of the console: scripts, style and icon. Their addresses change with their content."""

import gzip
import hashlib
from functools import cache
from importlib.resources import files
from typing import Final, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from evalstore.api.problems import Problem

_TYPES: Final = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
_FOR_EVER: Final = "public, max-age=31536000, immutable"


class _File(NamedTuple):
    body: bytes
    compressed: bytes
    media_type: str
    version: str


@cache
def _files() -> dict[str, _File]:
    """Read all files once. They are small."""
    found = {}
    for path in (files("evalstore.console") / "static").iterdir():
        media_type = _TYPES.get(f".{path.name.rpartition('.')[2]}")
        if media_type is not None:
            body = path.read_bytes()
            found[path.name] = _File(body, gzip.compress(body, 9), media_type, hashlib.sha256(body).hexdigest()[:12])
    return found


def address(name: str) -> str:
    """Return the address of a file below the root path, with its version. Raises KeyError."""
    return f"/console/static/{name}?v={_files()[name].version}"


async def serve(request: Request) -> Response:
    """Answer `GET /console/static/{name}`. It needs no session. Raises Problem (404)."""
    file = _files().get(request.path_params["name"])
    if file is None:
        raise Problem(404, "not-found", "the console has no such file")
    is_named = request.query_params.get("v") == file.version
    headers = {"Cache-Control": _FOR_EVER if is_named else "no-cache", "Vary": "Accept-Encoding"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(file.compressed, headers={**headers, "Content-Encoding": "gzip"}, media_type=file.media_type)
    return Response(file.body, headers=headers, media_type=file.media_type)
