"""The page at /docs: it shows the whole API, loads nothing from anywhere, and nothing in it runs."""

import base64
import re
from hashlib import sha256
from html.parser import HTMLParser

import httpx
import pytest
from fake_api import api

from tightrope.server.http.api_page import api_page

LOADING = {"script", "link", "img", "iframe", "object", "embed", "video", "audio", "source", "base", "form", "svg"}


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, reply: httpx.Response | str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(reply if isinstance(reply, str) else reply.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
async def reply() -> httpx.Response:
    async with api() as http:
        return await http.get("/docs")


async def test_the_page_loads_nothing_and_runs_nothing(reply: httpx.Response) -> None:
    page = Page(reply)
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert not {tag for tag, _ in page.tags} & LOADING
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    anchors = {f"#{attributes['id']}" for _, attributes in page.tags if "id" in attributes}
    assert {*links} <= anchors | {"openapi.json"}
    assert "url(" not in reply.text
    assert "@import" not in reply.text
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", reply.text)


async def test_a_policy_forbids_what_the_page_has_no_need_of(reply: httpx.Response) -> None:
    style = re.findall(r"<style>(.*?)</style>", reply.text, re.DOTALL)
    hashes = " ".join(f"'sha256-{base64.b64encode(sha256(s.encode()).digest()).decode()}'" for s in style)
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["style-src"] == hashes
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert reply.headers["x-frame-options"] == "DENY"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"


async def test_the_page_has_every_route_field_and_answer(reply: httpx.Response) -> None:
    async with api() as http:
        document = (await http.get("/openapi.json")).json()
    text = Page(reply).text
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert f"{method.upper()} {path}" in text
            assert (operation.get("description") or operation["summary"]) in text
            assert all(answer["description"] in text for answer in operation["responses"].values())
    for name, schema in document["components"]["schemas"].items():
        assert name in text
        for field, value in schema.get("properties", {}).items():
            assert field in text
            assert value.get("description", "") in text


def test_no_text_of_the_document_becomes_markup() -> None:
    evil = "\"'><script>alert(1)</script>"
    field = {"type": evil, "description": evil, "default": evil, "enum": [evil]}
    operation = {
        "tags": [evil],
        "description": evil,
        "parameters": [{"name": evil, "schema": {"$ref": f"#/{evil}"}, "description": evil}],
        "requestBody": {"content": {evil: {"schema": field}}},
        "responses": {evil: {"description": evil, "content": {evil: {"schema": {"type": evil, "minimum": evil}}}}},
    }
    page = api_page(
        {
            "info": {"title": evil, "version": evil},
            "paths": {evil: {evil: operation}},
            "components": {"schemas": {evil: {"description": evil, "properties": {evil: field}}}},
        }
    )
    assert "<script" not in page
    assert "script" not in {tag for tag, _ in Page(page).tags}
    assert "alert(1)" in Page(page).text


async def test_a_probe_may_ask_for_the_head_of_the_page_alone(reply: httpx.Response) -> None:
    async with api(api_key="secret") as http:
        head = await http.head("/docs")
    assert (head.status_code, head.headers["content-type"]) == (200, reply.headers["content-type"])


async def test_nothing_is_left_of_the_page_with_scripts_of_others() -> None:
    async with api() as http:
        assert (await http.get("/docs/oauth2-redirect")).status_code == 404
        assert (await http.get("/redoc")).status_code == 404
