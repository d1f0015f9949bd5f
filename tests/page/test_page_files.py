"""What is served of the page, to whom, and under which policy. What it does is tested in Chromium, beside this file."""

import re

import httpx
import pytest
from checkout import ROOT
from fake_api import api

pytestmark = pytest.mark.quick

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
STATIC = ROOT / "server/page/static"
FILES = sorted(path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*") if path.is_file())
SCRIPTS = [name for name in FILES if name.endswith(".js")]


async def page(**settings: object) -> httpx.Response:
    async with api(**settings) as http:
        return await http.get("/", headers={"accept": BROWSER})


async def test_a_browser_gets_the_page():
    reply = await page()

    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "accept" in reply.headers["vary"]
    assert '<script type="module" src="/page/main.js">' in reply.text


@pytest.mark.parametrize("accept", [None, "*/*", "application/json", "application/json, text/plain, */*", "text/*"])
async def test_probes_get_what_tgi_answers(accept: str | None):
    async with api() as http:
        http.headers.pop("accept")
        reply = await http.get("/", headers={} if accept is None else {"accept": accept})

    assert (reply.status_code, reply.content) == (200, b"")
    assert "accept" in reply.headers["vary"]


async def test_a_head_request_is_answered_as_a_get():
    async with api() as http:
        reply = await http.head("/", headers={"accept": BROWSER})

    assert (reply.status_code, reply.content) == (200, b"")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"


async def test_every_file_is_served_without_a_key_and_under_the_policy():
    async with api(api_key="secret") as http:
        for name in FILES:
            reply = await http.get(f"/page/{name}")
            policy = dict(
                part.strip().partition(" ")[::2] for part in reply.headers["content-security-policy"].split(";")
            )
            closed = ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types")

            assert reply.status_code == 200
            assert reply.content == (STATIC / name).read_bytes()
            assert {policy.pop(name) for name in closed} == {"'none'"}
            assert policy.pop("require-trusted-types-for") == "'script'"
            assert set(policy.values()) == {"'self'"}
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert reply.headers["referrer-policy"] == "no-referrer"


async def test_the_page_itself_is_served_without_a_key():
    assert (await page(api_key="secret")).status_code == 200


async def test_a_file_that_has_not_changed_is_not_sent_again():
    async with api() as http:
        first = await http.get("/page/page.css")
        again = await http.get("/page/page.css", headers={"if-none-match": first.headers["etag"]})

    assert (again.status_code, again.content) == (304, b"")


async def test_nothing_else_is_served_there():
    async with api() as http:
        for name in ("", "nothing.js", "../files.py", "..%2ffiles.py", "%2e%2e/routes.py", "static/main.js"):
            reply = await http.get(f"/page/{name}")
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")


async def test_another_path_under_the_page_asks_for_the_key():
    async with api(api_key="secret") as http:
        assert (await http.get("/page/nothing.js")).status_code == 401


def test_the_page_names_nothing_of_another_host_and_nothing_inline():
    text = (STATIC / "page.html").read_text("utf-8")

    assert re.findall(r"""(?:src|href)="(?!/page/|#)""", text) == []
    assert re.findall(r"\s(?:style|on\w+)=", text) == []
    assert re.findall(r"<style|<script(?![^>]*\ssrc=)", text) == []
    assert not re.search(r"url\(|@import", (STATIC / "page.css").read_text("utf-8"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_makes_markup_or_code_of_text(name: str):
    text = (STATIC / name).read_text("utf-8")
    made = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser|srcdoc|setHTML"

    assert re.findall(made, text) == []
    assert set(re.findall(r'from "([^"]+)"', text)) <= {
        f"{'../' * name.count('/') or './'}{other}" for other in SCRIPTS
    } | {f"./{other.rpartition('/')[2]}" for other in SCRIPTS}


async def test_the_plan_tells_where_the_memory_goes():
    async with api() as http:
        plan = (await http.get("/plan")).json()

    assert plan["cache_tokens"] == 4096
    assert plan["used_tokens"] == plan["reusable_tokens"] == 0
    assert plan["device"] == "cpu"
    assert [plan[name] for name in plan if name.startswith("device")] == ["cpu", [], [], [], [], [], []]


async def test_the_plan_asks_for_the_key():
    async with api(api_key="secret") as http:
        assert (await http.get("/plan")).status_code == 401
        assert (await http.get("/plan", headers={"x-api-key": "secret"})).status_code == 200
