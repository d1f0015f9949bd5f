"""Pages of other sites and names of other hosts: what a browser may be talked into stays without effect."""

import asyncio

import httpx
import pytest
from fake_api import api
from served_app import reply_to, serving

from tightrope.server.settings.settings import SettingsError, load_settings

ASKED = {"prompt": "a?", "max_tokens": 1}
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
SDK_HEADERS = "authorization,content-type,x-stainless-arch,x-stainless-retry-count,x-new-header-of-tomorrow"


async def test_the_secret_of_a_cached_prompt_is_out_of_reach_of_another_sites_page() -> None:
    """`cached_tokens` would tell such a page, guess by guess, what somebody else has written."""
    async with api() as http:
        await http.post("/v1/completions", json={**ASKED, "prompt": "the secret word is plum"})
        guess = {**ASKED, "prompt": "the secret word is plum"}
        reply = await http.post("/v1/completions", json=guess, headers={"origin": "https://a.example"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "foreign_origin")
    assert "cached" not in reply.text
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    "origin",
    [
        "https://a.example",
        "null",
        "",
        "http://localhost:3000",
        "http://127.0.0.1",
        "https://localhost",
        "app://obsidian.md",
        "tauri://localhost",
        "chrome-extension://abcdefgh",
        "moz-extension://0b1c",
        "file://",
        "http://localhost.evil.example",
        "http://localhost http://a.example",
        "*",
        "é",
    ],
)
async def test_no_page_but_this_servers_own_is_let_in_unless_it_is_named(origin: str) -> None:
    async with api() as http:
        headers = {"origin": origin.encode()}
        for path in ("/v1/completions", "/generate", "/api/extra/abort", "/v1/load_lora_adapter", "/nothing"):
            reply = await http.post(path, json=ASKED, headers=headers)
            assert reply.status_code == 403, path
        for method in ("PUT", "DELETE", "OPTIONS"):
            assert (await http.request(method, "/v1/completions", headers=headers)).status_code == 403
        reply = await http.options("/v1/completions", headers={**headers, **PREFLIGHT})
        assert reply.status_code == 403
        assert "access-control-allow-origin" not in reply.headers
        reply = await http.get("/v1/models", headers=headers)
        assert "access-control-allow-origin" not in reply.headers
        assert (await http.post("/v1/completions", json=ASKED)).status_code == 200


async def test_this_servers_own_page_and_clients_that_are_no_browser_are_let_in() -> None:
    async with api() as http:
        for own, host in (
            ("http://localhost", "localhost"),
            ("http://localhost", "localhost:80"),
            ("http://127.0.0.1:8080", "127.0.0.1:8080"),
            ("http://[::1]:8080", "[::1]:8080"),
            ("http://192.168.0.7:8080", "192.168.0.7:8080"),
        ):
            reply = await http.post("/v1/completions", json=ASKED, headers={"origin": own, "host": host})
            assert reply.status_code == 200, own
        assert (await http.post("/v1/completions", json=ASKED)).status_code == 200


@pytest.mark.parametrize(
    ("named", "origin"),
    [
        ("https://a.example", "https://a.example"),
        ("https://A.example/", "https://a.example"),
        ("https://a.example:443", "https://a.example"),
        ("https://b.example, http://localhost:3000", "http://localhost:3000"),
        ("null", "null"),
        ("app://obsidian.md", "app://obsidian.md"),
        ("chrome-extension://abcdefgh", "chrome-extension://abcdefgh"),
        ("file://", "file://"),
    ],
)
async def test_an_origin_that_is_named_may_call_and_no_other(named: str, origin: str) -> None:
    async with api(cors_origins=named) as http:
        asked = {"origin": origin, **PREFLIGHT, "access-control-request-headers": SDK_HEADERS}
        reply = await http.options("/v1/chat/completions", headers=asked)
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, origin)
        assert reply.headers["access-control-allow-headers"] == SDK_HEADERS
        assert "POST" in reply.headers["access-control-allow-methods"]
        assert "access-control-allow-credentials" not in reply.headers
        assert "access-control-allow-private-network" not in reply.headers
        asked["access-control-request-private-network"] = "true"
        reply = await http.options("/v1/chat/completions", headers=asked)
        assert (reply.status_code, reply.headers["access-control-allow-private-network"]) == (200, "true")
        reply = await http.post("/v1/completions", json=ASKED, headers={"origin": origin})
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, origin)
        other = await http.post("/v1/completions", json=ASKED, headers={"origin": "https://c.example"})
        assert other.status_code == 403


async def test_a_page_that_is_let_in_can_read_that_its_key_is_wrong() -> None:
    async with api(cors_origins="https://a.example", api_key="secret") as http:
        reply = await http.post("/v1/completions", json=ASKED, headers={"origin": "https://a.example"})
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (401, "https://a.example")


async def test_any_origin_may_call_where_the_settings_say_so_but_never_with_cookies() -> None:
    async with api(cors_origins="*") as http:
        for origin in ("https://a.example", "null"):
            reply = await http.options("/v1/completions", headers={"origin": origin, **PREFLIGHT})
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "*")
            reply = await http.post("/v1/completions", json=ASKED, headers={"origin": origin})
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "*")
            assert "access-control-allow-credentials" not in reply.headers


async def test_the_first_refusal_of_a_page_says_what_would_let_it_in(caplog: pytest.LogCaptureFixture) -> None:
    async with api(cors_origins="https://b.example") as http:
        for origin in ("https://a.example", "https://a.example", "http://localhost:3000"):
            reply = await http.options("/v1/completions", headers={"origin": origin, **PREFLIGHT})
            assert f"--cors-origins https://b.example,{origin}" in reply.json()["error"]["message"]
    lines = [record.getMessage() for record in caplog.records if "another site" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].endswith("--cors-origins https://b.example,https://a.example")


@pytest.mark.parametrize("listens_on", ["127.0.0.1", "0.0.0.0", "::"])
@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example:8080",
        "127.0.0.1.evil.net",
        "evil.example#.localhost",
        "evil.example/.localhost",
        "evil@localhost",
        "[::1]evil.example",
        "[evil.example]",
        "localhost:8080.evil.example",
        "0x7f000001.evil.example",
        "",
    ],
)
async def test_a_name_that_nobody_has_said_is_ours_is_refused_wherever_it_came_in(host: str, listens_on: str) -> None:
    async with api(host=listens_on) as http:
        for reply in (
            await http.get("/v1/models", headers={"host": host}),
            await http.post("/generate", json={"inputs": "a?"}, headers={"host": host, "origin": f"http://{host}"}),
        ):
            assert reply.status_code == 403
            assert "foreign_host" in reply.text


@pytest.mark.parametrize("listens_on", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:80",
        "localhost.",
        "a.localhost",
        "127.0.0.1:9",
        "127.8.8.8",
        "0.0.0.0:8080",
        "192.168.0.7",
        "8.8.8.8:8080",
        "[::1]:80",
        "[fe80::1]:8080",
        "[2001:db8::7]",
    ],
)
async def test_localhost_and_addresses_are_always_answered_to(host: str, listens_on: str) -> None:
    async with api(host=listens_on) as http:
        assert (await http.get("/v1/models", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    ("named", "host", "is_ours"),
    [
        ("my-box.tailnet.example", "my-box.tailnet.example", True),
        ("my-box.tailnet.example", "MY-BOX.tailnet.example.:443", True),
        ("my-box.tailnet.example", "tailnet.example", False),
        ("my-box.tailnet.example", "x.my-box.tailnet.example", False),
        ("a.example,nas", "nas:8080", True),
        ("*.trycloudflare.example", "some-words.trycloudflare.example", True),
        ("*.trycloudflare.example", "trycloudflare.example", False),
        ("*.trycloudflare.example", "eviltrycloudflare.example", False),
        ("*", "whatever.example", True),
    ],
)
async def test_names_of_tunnels_are_answered_to_once_they_are_listed(named: str, host: str, is_ours: bool) -> None:
    async with api(allowed_hosts=named) as http:
        reply = await http.get("/v1/models", headers={"host": host})
        assert reply.status_code == (200 if is_ours else 403)


async def test_the_name_that_a_server_listens_on_is_its_own() -> None:
    async with api(host="nas.lan") as http:
        assert (await http.get("/v1/models", headers={"host": "NAS.lan:8080"})).status_code == 200


async def test_the_first_refusal_of_a_name_says_what_would_let_it_in(caplog: pytest.LogCaptureFixture) -> None:
    async with api() as http:
        for host in ("box.example:8080", "box.example", "other.example"):
            await http.get("/v1/models", headers={"host": host})
    lines = [record.getMessage() for record in caplog.records if "another host" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].endswith("--allowed-hosts box.example")


async def test_two_host_headers_are_a_bad_request() -> None:
    async with serving() as port:
        for hosts in (b"Host: localhost\r\nHost: evil.example", b"Host: localhost\r\nhost: localhost"):
            raw = b"GET /v1/models HTTP/1.1\r\n" + hosts + b"\r\nConnection: close\r\n\r\n"
            assert (await reply_to(port, raw)).startswith(b"HTTP/1.1 400 ")
        raw = b"GET /v1/models HTTP/1.1\r\nHost: evil.example#.localhost\r\nConnection: close\r\n\r\n"
        assert (await reply_to(port, raw)).startswith(b"HTTP/1.1 403 ")
        raw = b"GET /v1/models HTTP/1.0\r\n\r\n"  # before the header was invented
        assert (await reply_to(port, raw)).startswith(b"HTTP/1.1 200 ")


async def test_a_page_behind_a_proxy_that_ends_tls_is_this_servers_own() -> None:
    behind = {"host": "box.example", "origin": "https://box.example"}
    async with (
        serving(allowed_hosts="box.example") as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
    ):
        told, silent = await asyncio.gather(
            http.post("/v1/completions", json=ASKED, headers={**behind, "x-forwarded-proto": "https"}),
            http.post("/v1/completions", json=ASKED, headers=behind),
        )
    assert (told.status_code, silent.status_code) == (200, 403)
    assert "--cors-origins https://box.example" in silent.json()["error"]["message"]


@pytest.mark.parametrize("host", ["box.example", "127.0.0.1:8080"])
async def test_a_browser_may_say_that_a_page_behind_a_silent_proxy_is_this_servers_own(host: str) -> None:
    """Such a proxy tells neither the scheme, nor always the name, that the browser has asked for."""
    behind = {"host": host, "origin": "https://box.example"}
    async with api(allowed_hosts="box.example") as http:
        for told, status in (("same-origin", 200), ("same-site", 403), ("cross-site", 403), ("none", 403), ("", 403)):
            reply = await http.post("/v1/completions", json=ASKED, headers={**behind, "sec-fetch-site": told})
            assert reply.status_code == status, told
        twice = [*behind.items(), ("sec-fetch-site", "same-origin"), ("sec-fetch-site", "cross-site")]
        assert (await http.post("/v1/completions", json=ASKED, headers=twice)).status_code == 403


async def test_a_page_whose_name_was_pointed_here_is_foreign_whatever_its_browser_says_of_it() -> None:
    rebound = {"host": "evil.example", "origin": "http://evil.example", "sec-fetch-site": "same-origin"}
    async with api() as http:
        reply = await http.post("/v1/completions", json=ASKED, headers=rebound)
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "foreign_host")


@pytest.mark.parametrize("value", ["a.example", "https://a.example/page", "https://*.example", "https://", "//a"])
def test_what_is_no_origin_stops_the_start(value: str) -> None:
    with pytest.raises(SettingsError, match="--cors-origins: expected an origin such as "):
        load_settings({"cors-origins": value}, {})


@pytest.mark.parametrize("value", ["https://a.example", "a.example:8080", "a..example", "*.*", "a b", "*example"])
def test_what_is_no_name_of_a_host_stops_the_start(value: str) -> None:
    with pytest.raises(SettingsError, match="--allowed-hosts: expected a host name such as "):
        load_settings({"allowed-hosts": value}, {})
