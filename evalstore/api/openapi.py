"""The parts of the OpenAPI document that FastAPI does not derive from the routes' signatures."""

from typing import Annotated, Any, Final

from fastapi import FastAPI, Header, Path

from evalstore.api.schemas import EVAL_ID, SCHEMAS, ref

Responses = dict[int | str, dict[str, Any]]

# Only for the document. The handlers check: an impossible id is a 404, and a fault names the header as HTTP spells it.
EvalId = Annotated[str, Path(json_schema_extra=EVAL_ID)]
Prefer = Annotated[
    str | None, Header(alias="Prefer", description="`respond-async`: answer 202 at once, and store through the queue.")
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="A request that is repeated with the same key stores one event.",
        json_schema_extra={"pattern": "^[!-~]{1,255}$"},
    ),
]
IfNoneMatch = Annotated[str | None, Header(alias="If-None-Match", description="Answer 304 if the ETag is still this.")]

_HEADERS: Final = {
    "ETag": "The version of the record, or the event that the content is of.",
    "Location": "The path of the record.",
    "Preference-Applied": "`respond-async`",
    "Retry-After": "Seconds to wait before the next attempt.",
    "RateLimit": "Requests that the key may still send, and the seconds until it may send more.",
    "RateLimit-Policy": "The rate of the key: `q` requests in `w` seconds.",
    "WWW-Authenticate": "How to give a key.",
    "Accept-Ranges": "`bytes`",
    "Content-Disposition": "A file name, as an attachment.",
    "Content-Range": "Which bytes of how many.",
    "Repr-Digest": "The SHA-256 of the whole content, if it is known (RFC 9530).",
}
_SECURITY_SCHEMES: Final = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
_PROBLEMS: Final[dict[int, tuple[str, tuple[str, ...]]]] = {
    304: ("Not changed: If-None-Match names the current ETag.", ("ETag",)),
    401: ("The key is missing or not valid.", ("WWW-Authenticate",)),
    403: ("The key does not have the scope.", ()),
    404: ("The evaluation does not exist, or has no such content.", ()),
    408: ("The body arrived too slowly.", ()),
    409: ("Another event is stored in its place.", ()),
    410: ("The evaluation was erased.", ()),
    412: ("The record is not at the version of If-Match.", ()),
    413: ("The request is too large.", ()),
    415: ("The body is compressed or a form. Send it raw.", ()),
    416: ("The content has no such range.", ("Content-Range",)),
    422: ("The request is invalid. `faults` names every wrong field.", ()),
    429: ("The key has sent too many requests, or has too many streams.", ("Retry-After", "RateLimit", "RateLimit-Policy")),
    500: ("A fault of the service.", ()),
    501: ("The service has no object store.", ()),
    503: ("A server that the service needs cannot be reached, or the service is busy. Try again.", ("Retry-After",)),
}


def problems(*statuses: int) -> Responses:
    """Return `responses` for error statuses, and for 304."""
    problem = {"application/problem+json": {"schema": ref("Problem")}}
    return {
        status: response(_PROBLEMS[status][0], {} if status == 304 else problem, _PROBLEMS[status][1]) for status in statuses
    }


def success(*schemas: str, headers: tuple[str, ...] = (), description: str = "Done.") -> dict[str, Any]:
    """Return the response object of a JSON answer that has one of `schemas`."""
    refs = [ref(name) for name in schemas]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    return response(description, {"application/json": {"schema": schema}}, headers)


def response(description: str, content: dict[str, Any], headers: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a response object with the schemas of `headers`."""
    described = {name: {"description": _HEADERS[name], "schema": {"type": "string"}} for name in headers}
    return {
        "description": description,
        **({"content": content} if content else {}),
        **({"headers": described} if described else {}),
    }


def json_body(schema: str) -> dict[str, Any]:
    """Return `openapi_extra` of a JSON body. Handlers read bodies themselves, to bound their memory and to name every fault."""
    example = SCHEMAS[schema]["examples"][0]
    return body({"application/json": {"schema": ref(schema), "example": example}})


ALWAYS: Final = problems(401, 403, 422, 429, 500, 503)
LINES: Final = {"application/x-ndjson": {"schema": {"type": "string", "description": "One Event a line, up to 10,000."}}}


def body(content: dict[str, Any], *, required: bool = True) -> dict[str, Any]:
    """Return `openapi_extra` of a body with these media types."""
    return {"requestBody": {"required": required, "content": content}}


class DocumentedApp(FastAPI):
    """FastAPI whose document has the schemas of schemas.py, and the two ways to give a key.

    FastAPI's own security dependencies would parse the headers a second time: 19 of the 1,500 µs of a POST.
    """

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document["components"] = {"schemas": SCHEMAS, "securitySchemes": _SECURITY_SCHEMES}
        for path, operations in document["paths"].items():
            for operation in operations.values() if path.startswith("/storage/") else ():
                operation["security"] = [{name: []} for name in _SECURITY_SCHEMES]
        return document
