"""`/docs`: the OpenAPI document as a page. It needs no script and no other host."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

_STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
h2 { margin-top: 3rem } h3 { margin: 2rem 0 .5rem; border-top: 1px solid #d0d7de; padding-top: 1rem }
code, pre { font: 14px/1.4 ui-monospace, monospace; background: #f6f8fa; border-radius: 4px } code { padding: 1px 4px }
pre { padding: .8rem; overflow: auto } table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #eaeef2 }
.method { font-weight: 600; margin-right: .6rem } nav a { margin-right: 1rem }
@media (prefers-color-scheme: dark) { body { background: #0d1117; color: #e6edf3 } code, pre { background: #161b22 }
a { color: #79c0ff } td, th, h3 { border-color: #30363d } }
"""
# Nothing but the page's own style is loaded or run.
HEADERS: Final = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}


def page(document: Mapping[str, Any]) -> str:
    """The page of an OpenAPI document."""
    info, schemas = document["info"], document["components"]["schemas"]
    (server, *_) = document.get("servers") or [{"url": "/"}]  # the default of the OpenAPI specification
    prefix = server["url"].rstrip("/")
    address = escape(f"{prefix}/openapi.json")
    operations = [
        (prefix + path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    links = "".join(
        f'<a href="#{escape(operation["operationId"])}">{escape(operation["summary"])}</a> ' for *_, operation in operations
    )
    title, release = escape(info["title"]), escape(info["version"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title} {release}</h1>"
        f'{_text(info["description"])}<p><a href="{address}">{address}</a></p><nav>{links}</nav><h2>Requests</h2>'
        + "".join(_operation(path, method, operation) for path, method, operation in operations)
        + "<h2>Shapes</h2>"
        + "".join(_schema(name, schema) for name, schema in schemas.items())
        + "</html>"
    )


def _text(markdown: str) -> str:
    """A paragraph; what stands between backticks as code."""
    pieces = markdown.split("`")
    return "<p>" + "".join(f"<code>{escape(one)}</code>" if at % 2 else escape(one) for at, one in enumerate(pieces)) + "</p>"


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> str:
    rows = [
        (parameter["name"], parameter["in"], _kind(parameter.get("schema", {})), parameter.get("description", ""))
        for parameter in operation.get("parameters", [])
    ]
    body = "".join(
        f"<p>Body, <code>{escape(media)}</code>: {_kind(what['schema'])}</p>{_example(what.get('example'))}"
        for media, what in operation.get("requestBody", {}).get("content", {}).items()
    )
    answers = [
        (status, ", ".join(answer.get("content", {})), _kinds(answer), answer.get("description", ""))
        for status, answer in sorted(operation.get("responses", {}).items())
    ]
    return (
        f'<h3 id="{escape(operation["operationId"])}">{escape(operation["summary"])}</h3>'
        f'<p><span class="method">{escape(method.upper())}</span><code>{escape(path)}</code></p>'
        f"{_text(operation.get('description', ''))}{_table(['parameter', 'in', 'type', ''], rows)}{body}"
        f"{_table(['answer', 'type', 'shape', ''], answers)}"
    )


def _kinds(answer: Mapping[str, Any]) -> str:
    return ", ".join(dict.fromkeys(_kind(what.get("schema", {})) for what in answer.get("content", {}).values()))


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", [])
    rows = [
        (field, _kind(kind), "required" if field in required else "", _described(kind))
        for field, kind in schema.get("properties", {}).items()
    ]
    examples = "".join(_example(example) for example in schema.get("examples", []))
    return (
        f'<h3 id="schema-{escape(name)}">{escape(name)}</h3>{_text(schema.get("description", ""))}'
        f"{_table(['field', 'type', '', ''], rows)}{examples}"
    )


def _described(schema: Mapping[str, Any]) -> str:
    described = [one["description"] for one in (schema, *schema.get("anyOf", [])) if "description" in one]
    return str(described[0]) if described else ""


def _kind(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#schema-{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"<code>{escape(str(one))}</code>" for one in schema["enum"])
    if "const" in schema:
        return f"<code>{escape(str(schema['const']))}</code>"
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return escape(" ".join(filter(None, [str(schema.get("type", "any")), str(schema.get("format", ""))])))


def _example(example: object) -> str:
    return "" if example is None else f"<pre>{escape(json.dumps(example, indent=2))}</pre>"


def _table(head: list[str], rows: Sequence[tuple[str, ...]]) -> str:
    """The first column as code; types are HTML already; the last is text."""
    if not rows:
        return ""
    lines = []
    for first, *middle, last in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in middle)
        lines.append(f"<tr><td><code>{escape(first)}</code></td>{cells}<td>{_text(last)[3:-4]}</td></tr>")
    return f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>{''.join(lines)}</table>"
