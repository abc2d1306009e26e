"""`/docs`: the OpenAPI document as a page without scripts, which loads nothing from another host."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

_STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h3 { margin: 2rem 0 .5rem; border-top: 1px solid #8888; padding-top: 1rem }
td, th { text-align: left; padding-right: 1rem }
code, pre { font: 14px/1.4 ui-monospace, monospace; background: #8882 } pre { overflow: auto }
:root { color-scheme: light dark }
"""
HEADERS: Final = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}


def render(document: Mapping[str, Any]) -> str:
    """Return the page of an OpenAPI document that has `servers`."""
    prefix = document["servers"][0]["url"].rstrip("/")
    address, title = escape(f"{prefix}/openapi.json"), escape(f"{document['info']['title']} {document['info']['version']}")
    operations = [
        (prefix + path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    links = "".join(f'<li><a href="#{op["operationId"]}">{escape(op["summary"])}</a>' for *_, op in operations)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>{_text(document['info']['description'])}"
        f'<p><a href="{address}">{address}</a></p><ul>{links}</ul>'
        + "".join(_operation(*operation) for operation in operations)
        + "".join(_schema(name, schema) for name, schema in document["components"]["schemas"].items())
    )


def _text(markdown: str) -> str:
    """Return a paragraph, with text between backticks as code."""
    pieces = markdown.split("`")
    return "<p>" + "".join(f"<code>{escape(piece)}</code>" if at % 2 else escape(piece) for at, piece in enumerate(pieces))


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> str:
    parameters = [
        (each["name"], each["in"], _type(each["schema"]), escape(each.get("description", "")))
        for each in operation.get("parameters", ())
    ]
    bodies = [("body", *_media(operation["requestBody"]), "")] if "requestBody" in operation else []
    answers = [
        (status, *_media(answer), escape(answer["description"])) for status, answer in sorted(operation["responses"].items())
    ]
    return (
        f'<h3 id="{operation["operationId"]}">{escape(operation["summary"])}</h3>'
        f"<p>{escape(method.upper())} <code>{escape(path)}</code></p>{_text(operation.get('description', ''))}"
        f"{_table(('request', 'in', 'type', ''), parameters + bodies)}{_table(('answer', 'media type', 'type', ''), answers)}"
    )


def _media(described: Mapping[str, Any]) -> tuple[str, str]:
    """Return the media types of a body or an answer, and their schemas."""
    content = described.get("content", {})
    return escape(", ".join(content)), ", ".join(dict.fromkeys(_type(body.get("schema", {})) for body in content.values()))


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        (field, _type(each), "required" if field in required else "", escape(_description(each)))
        for field, each in schema["properties"].items()
    ]
    examples = "".join(f"<pre>{escape(json.dumps(example, indent=2))}</pre>" for example in schema.get("examples", ()))
    fields = _table(("field", "type", "", ""), rows)
    return f'<h3 id="schema-{escape(name)}">{escape(name)}</h3>{_text(schema.get("description", ""))}{fields}{examples}'


def _description(schema: Mapping[str, Any]) -> str:
    return next((each["description"] for each in (schema, *schema.get("anyOf", ())) if "description" in each), "")


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#schema-{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(escape(str(value)) for value in values)
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return escape(" ".join(filter(None, [schema.get("type", "any"), schema.get("format", "")])))


def _table(heads: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a table whose cells are HTML already. Return an empty text without rows."""
    lines = [f"<tr><td><code>{first}</code><td>{'<td>'.join(rest)}" for first, *rest in rows]
    return f"<table><tr><th>{'<th>'.join(heads)}{''.join(lines)}</table>" if rows else ""
