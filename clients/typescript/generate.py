"""Write `schema.d.ts`, the types of the HTTP service, from its OpenAPI document: `python clients/typescript/generate.py`.

The shape is that of openapi-typescript (https://openapi-ts.dev), so that openapi-fetch and similar clients take it. This is a
template of our own: the original generator needs Node, and `make docs` and the house tests run without Node. With `--check`,
only report a stale file.
"""

import json
import sys
from pathlib import Path
from typing import Any, Final

from evalstore.api.application import documented_app

Json = dict[str, Any]

TARGET: Final = Path(__file__).with_name("schema.d.ts")
_METHODS: Final = ("get", "put", "post", "delete", "patch", "head")
_SCALARS: Final = {"string": "string", "integer": "number", "number": "number", "boolean": "boolean", "null": "null"}


def generated(document: Json) -> str:
    """Return the TypeScript declarations of an OpenAPI 3.1 document."""
    paths = {path: _object({m: _operation(item[m]) for m in _METHODS if m in item}) for path, item in document["paths"].items()}
    schemas = {name: _type(schema) for name, schema in document["components"]["schemas"].items()}
    header = "// Made by generate.py from the OpenAPI document. Do not edit.\n\n"
    components = _object({"schemas": _object(schemas)})
    return f"{header}export interface paths {_object(paths)}\n\nexport interface components {components}\n"


def _operation(operation: Json) -> str:
    groups: dict[str, dict[str, str]] = {}
    for parameter in operation.get("parameters", []):
        name = parameter["name"] + ("" if parameter.get("required") else "?")
        groups.setdefault(parameter["in"], {})[name] = _type(parameter.get("schema", {}))
    is_required = {where: any(not name.endswith("?") for name in names) for where, names in groups.items()}
    parameters = {where + ("" if is_required[where] else "?"): _object(names) for where, names in groups.items()}
    parts = {"parameters": _object(parameters)}
    if body := operation.get("requestBody"):
        parts["requestBody" + ("" if body.get("required") else "?")] = _object({"content": _content(body)})
    parts["responses"] = _object(
        {status: _object({"content": _content(each)}) for status, each in operation["responses"].items()}
    )
    lines = [operation["summary"], "", *operation.get("description", "").splitlines()]
    return _comment(" ".join(lines).strip()) + _object(parts)


def _content(holder: Json) -> str:
    media = holder.get("content")
    if not media:
        return "never"
    return _object(
        {kind: _type(each["schema"]) if "json" in kind and "nd" not in kind else _raw(kind) for kind, each in media.items()}
    )


def _raw(kind: str) -> str:
    return "Blob | ArrayBuffer" if kind == "application/octet-stream" else "string"


def _type(schema: Json | bool) -> str:
    """Return a schema as a type. The document uses this part of JSON Schema only."""
    if isinstance(schema, bool) or not schema:
        return "unknown"
    if "$ref" in schema:
        return f'components["schemas"][{json.dumps(schema["$ref"].rpartition("/")[2])}]'
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " | ".join(dict.fromkeys(map(_type, schema[union])))
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return " | ".join(map(json.dumps, schema["enum"]))
    kinds = schema.get("type", "object" if "properties" in schema else None)
    if isinstance(kinds, list):
        return " | ".join(_type({**schema, "type": kind}) for kind in kinds)
    if kinds == "array":
        return f"({_type(schema.get('items', {}))})[]"
    return _object_type(schema) if kinds == "object" else _SCALARS.get(kinds or "", "unknown")


def _object_type(schema: Json) -> str:
    required = schema.get("required", [])
    fields = {
        _key(name) + ("" if name in required else "?"): _comment(each.get("description", "") if each else "") + _type(each)
        for name, each in schema.get("properties", {}).items()
    }
    if not fields:
        return f"Record<string, {_type(schema.get('additionalProperties', {}))}>"
    return "{\n" + "".join(_indented(_field(name, text)) for name, text in fields.items()) + "}"


def _object(fields: dict[str, str]) -> str:
    if not fields:
        return "Record<string, never>"
    named = {_key(name.removesuffix("?")) + "?" * name.endswith("?"): text for name, text in fields.items()}
    return "{\n" + "".join(_indented(_field(name, text)) for name, text in named.items()) + "}"


def _field(name: str, text: str) -> str:
    comment, separator, rest = text.partition("*/\n") if text.startswith("/**") else ("", "", text)
    return f"{comment}{separator}{name}: {rest};\n"


def _key(name: str) -> str:
    return name if name.isidentifier() or name.isdecimal() else json.dumps(name)


def _comment(text: str) -> str:
    return f"/** {' '.join(text.split()).replace('*/', '* /')} */\n" if text else ""


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


def main() -> int:
    """Return exit status 1 if `--check` finds a stale file."""
    fresh = generated(documented_app().openapi())
    if TARGET.exists() and TARGET.read_text() == fresh:
        return 0
    if "--check" in sys.argv:
        print("stale, run `make docs`: clients/typescript/schema.d.ts")
        return 1
    TARGET.write_text(fresh)
    print("written: clients/typescript/schema.d.ts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
