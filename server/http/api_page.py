"""GET /docs: the API's description as one page that needs no script, and nothing from anywhere else.

It is made of the same OpenAPI document that programs read at /openapi.json.
"""

import base64
from collections.abc import Iterator, Mapping
from hashlib import sha256
from html import escape
from typing import Any

from fastapi import FastAPI, Request, Response

Json = Mapping[str, Any]  # An OpenAPI document may hold any JSON.

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
code, pre { font: 14px/1.4 ui-monospace, monospace; }
pre { background: var(--soft); padding: .75rem; overflow-x: auto; border-radius: 6px; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; }
summary b { display: inline-block; min-width: 3.5rem; }
summary span { opacity: .75; margin-left: .75rem; }
table { border-collapse: collapse; width: 100%; margin: .75rem 0; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); }
"""
_STYLE_HASH = base64.b64encode(sha256(STYLE.encode()).digest()).decode()
HEADERS = {
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def add_api_page(app: FastAPI) -> None:
    """Serve the page of what the app has by now, and what is added to it before the first visit."""
    pages: list[bytes] = []

    async def docs(_: Request) -> Response:
        if not pages:
            pages.append(api_page(app.openapi()).encode())
        return Response(pages[0], headers=HEADERS, media_type="text/html; charset=utf-8")

    app.add_route("/docs", docs, include_in_schema=False)  # It has HEAD beside GET.


def api_page(document: Json) -> str:
    """The whole page. All of the document's texts are shown as they are; none of them becomes markup."""
    title = f"{document['info']['title']} {document['info']['version']}"
    tags: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            tags.setdefault(operation.get("tags", ["other"])[0], []).append(_operation(path, method, operation))
    sections = "".join(f"<h2 id={_anchor('tag', tag)}>{escape(tag)}</h2>{''.join(tags[tag])}" for tag in tags)
    contents = " · ".join(f"<a href={_anchor('#tag', tag)}>{escape(tag)}</a>" for tag in tags)
    schemas = "".join(_schema(name, schema) for name, schema in document["components"]["schemas"].items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1><p>Every route with its fields and answers; "
        '<a href="openapi.json">openapi.json</a> has the same for programs.</p>'
        f'<p>{contents} · <a href="#shapes">shapes</a></p>{sections}<h2 id="shapes">Shapes</h2>{schemas}</body></html>'
    )


def _anchor(kind: str, name: str) -> str:
    return f'"{kind}-{escape(name)}"'


def _operation(path: str, method: str, operation: Json) -> str:
    """One route, folded up."""
    about = operation.get("description") or operation.get("summary", "")
    parts = []
    if found := operation.get("parameters"):
        rows = ((p["name"], p["schema"], p.get("required", False), p.get("description", "")) for p in found)
        parts.append(_table(("parameter", "type", "meaning"), map(_field, rows)))
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<p>Body, <code>{escape(media)}</code>: {_type(content.get('schema', {}))}</p>")
    answers = (
        f"<td>{escape(status)}</td><td>{_contents(reply)}</td><td>{escape(reply['description'])}</td>"
        for status, reply in operation["responses"].items()
    )
    parts.append(_table(("status", "answer", "when"), answers))
    return (
        f"<details><summary><b>{escape(method.upper())}</b> <code>{escape(path)}</code>"
        f"<span>{escape(about)}</span></summary>{''.join(parts)}</details>"
    )


def _contents(reply: Json) -> str:
    shown = (f"<code>{escape(m)}</code>: {_type(c.get('schema', {}))}" for m, c in reply.get("content", {}).items())
    return "<br>".join(shown) or "empty"


def _schema(name: str, schema: Json) -> str:
    """One shape, folded up: its fields, those that must be there first."""
    required = frozenset(schema.get("required", ()))
    fields = sorted(schema.get("properties", {}).items(), key=lambda item: item[0] not in required)
    rows = ((field, value, field in required, value.get("description", "")) for field, value in fields)
    body = _table(("field", "type", "meaning"), map(_field, rows)) if fields else f"<p>{_type(schema)}</p>"
    about = escape(schema.get("description", ""))
    summary = f"<summary><code>{escape(name)}</code><span>{about}</span></summary>"
    return f"<details id={_anchor('shape', name)}>{summary}{body}</details>"


def _field(row: tuple[str, Json, bool, str]) -> str:
    name, schema, is_required, about = row
    default = schema.get("default")
    notes = [about, "required" if is_required else "", "" if default is None else f"default: {default}"]
    meaning = escape("; ".join(note for note in notes if note))
    return f"<td><code>{escape(name)}</code></td><td>{_type(schema)}</td><td>{meaning}</td>"


def _table(heads: tuple[str, ...], rows: Iterator[str]) -> str:
    head = "".join(f"<th>{head}</th>" for head in heads)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "minLength": "characters at least:",
    "maxLength": "characters at most:",
    "minItems": "items at least:",
    "maxItems": "items at most:",
}


def _type(schema: Json) -> str:
    """A schema in words, with links to the shapes that it names."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"<a href={_anchor('#shape', name)}>{escape(name)}</a>"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(map(_type, schema[key])))
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"<code>{escape(repr(value))}</code>" for value in values)
    kind = schema.get("type", "anything")
    if kind == "array":
        of = f"list of {_type(schema.get('items', {}))}"
    elif kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        of = f"object of {_type(schema['additionalProperties'])}"
    else:
        of = escape(str(kind))
    return ", ".join([of, *(f"{words} {escape(str(schema[key]))}" for key, words in _BOUNDS.items() if key in schema)])
