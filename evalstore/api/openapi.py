"""The OpenAPI document: what FastAPI finds by itself, and the bodies, answers and errors that are declared here."""

import re
from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from evalstore.api.schemas import EVAL_ID, SCHEMAS, ref

_PROBLEMS: Final = {
    304: "It is as it was: the ETag in If-None-Match is the current one.",
    401: "No key, or one that is no good.",
    403: "The key may not do this.",
    404: "There is no such evaluation, or it has no such content.",
    408: "The request came too slowly.",
    409: "Another event is stored in its place.",
    412: "The record is not at the version of If-Match.",
    413: "The request is too large.",
    415: "The body is wrapped or packed, instead of raw.",
    416: "The content has no such range.",
    422: "Something in the request is wrong; every wrong field is named.",
    500: "An error of the service.",
    501: "The service has no object store.",
    503: "A server it needs is away. Try again.",
}
EVAL_ID_PARAMETER: Final = {"name": "eval_id", "in": "path", "required": True, "schema": EVAL_ID}
ALWAYS: Final = (401, 403, 422, 500, 503)


def json_body(schema: str, *, lines: bool = False, single: bool = True) -> dict[str, Any]:
    """`openapi_extra` of a request body."""
    content: dict[str, Any] = {"application/json": _media(schema)} if single else {}
    if lines:
        content["application/x-ndjson"] = {"schema": {"description": "An Event a line, up to 10,000."}}
    return {"requestBody": {"required": True, "content": content}}


def _media(schema: str) -> dict[str, Any]:
    examples = SCHEMAS[schema].get("examples", [])
    return {"schema": ref(schema), **({"example": examples[0]} if examples else {})}


def answers(*problems: int, **schemas: str) -> dict[int | str, dict[str, Any]]:
    """`responses`: `s200="Record"` for what goes well, and which problems there may be besides those there always may be."""
    found: dict[int | str, dict[str, Any]] = {}
    for status, names in schemas.items():
        several = [ref(name) for name in names.split("|")]
        schema = several[0] if len(several) == 1 else {"anyOf": several}
        found[int(status[1:])] = {"description": "Done.", "content": {"application/json": {"schema": schema}}}
    for code in sorted({*problems, *ALWAYS}):
        found[code] = {"description": _PROBLEMS[code]}
        if code != 304:
            found[code]["content"] = {"application/problem+json": {"schema": ref("Problem")}}
    return found


def header(name: str, description: str, pattern: str | None = None) -> dict[str, Any]:
    """A request header, optional."""
    schema = {"type": "string", **({"pattern": pattern} if pattern else {})}
    return {"name": name, "in": "header", "required": False, "schema": schema, "description": description}


def document(app: FastAPI, *, title: str, version: str, description: str) -> Mapping[str, Any]:
    """The whole document, made once."""
    if app.openapi_schema is None:
        made = get_openapi(title=title, version=version, description=description, routes=app.routes)
        components = made.setdefault("components", {})
        components["schemas"] = SCHEMAS
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        for path, operations in made["paths"].items():
            for operation in operations.values():
                for parameter in operation.get("parameters", []):
                    if parameter["name"] == "eval_id":
                        parameter["schema"] = EVAL_ID
                operation["security"] = [{"bearer": []}, {"header": []}] if path.startswith("/storage/") else []
                if not path.startswith("/storage/"):
                    operation.get("responses", {}).pop("422", None)
        app.openapi_schema = made
    return app.openapi_schema


def methods(made: Mapping[str, Any], path: str) -> list[str]:
    """The methods that a path has; GET where it is none of the document's, as those of the document itself."""
    found = (paths for template, paths in made["paths"].items() if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path))
    named = {name.upper() for paths in found for name in paths} or {"GET"}
    return sorted(named | {"HEAD"} if "GET" in named else named)
