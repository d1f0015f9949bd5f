"""What a model writes, who may have learned it anywhere, stays text: nothing of it runs, loads or leads astray."""

import json
from pathlib import Path

import pytest
from chat_page import ask, chat_page, say, stream, words
from playwright.sync_api import Browser, Page, expect

EVIL = {
    "a script": "<script>window.ran = 1</script>",
    "an image": '<img src=x onerror="window.ran = 1"> <img src="https://evil.example/pixel.png">',
    "a frame": '<iframe srcdoc="<script>parent.ran = 1</script>"></iframe><object data="https://evil.example"></object>',
    "a drawing": '<svg onload="window.ran=1"><a xlink:href="javascript:window.ran=1"><text>x</text></a></svg>',
    "a style": "<style>@import '//evil.example/x.css'; * { display: none }</style><link href=//evil.example>",
    "a form": '<form action="https://evil.example"><input name=q autofocus onfocus="window.ran=1"></form>',
    "a base": '<base href="https://evil.example/"><meta http-equiv="refresh" content="0;url=https://evil.example">',
    "a link that runs": "[click](javascript:window.ran=1) [click](JaVaScRiPt:window.ran=1) [x](java\tscript:x)",
    "a link to data": "[click](data:text/html,<script>window.ran=1</script>) [x](vbscript:x) [x](file:///etc/passwd)",
    "an image in Markdown": "![pixel](https://evil.example/pixel.png) ![x](javascript:window.ran=1)",
    "an image with a handler": '![x](https://evil.example/a.png"onerror="window.ran=1)',
    "a link with a handler": '[x](https://evil.example/"onmouseover="window.ran=1)',
    "an address with a handler": 'https://evil.example/"onmouseover="window.ran=1"',
    "a fence with markup": '```"><script>window.ran=1</script>\n</code></pre><script>window.ran = 1</script>\n```',
    "a name of a fence": "```html onload=window.ran=1\n<b>x</b>\n```",
    "a table": "| <img src=x onerror=window.ran=1> | b |\n|-|-|\n| </table><script>window.ran=1</script> | x |",
    "a heading": "# <img src=x onerror=window.ran=1>\n> <script>window.ran=1</script>\n- <svg/onload=window.ran=1>",
    "marks in marks": "**<script>window.ran=1</script>** *<img src=x onerror=window.ran=1>* `<script>x</script>`",
    "entities": "&lt;script&gt;window.ran=1&lt;/script&gt; &#106;avascript:window.ran=1",
    "names of properties": "__proto__ constructor {{constructor.constructor('window.ran=1')()}} ${window.ran=1}",
    "bytes that none can see": "\u202e<script>window.ran=1</script>\u2066 \x00 \ufeff \ud83d\ude00",
}
TAGS = [
    "SCRIPT",
    "IMG",
    "IFRAME",
    "OBJECT",
    "EMBED",
    "STYLE",
    "LINK",
    "FORM",
    "INPUT",
    "BASE",
    "META",
    "SVG",
    "VIDEO",
    "AUDIO",
]
LARGE = 390_000  # just below what is read as Markdown: work that grows with its square takes minutes
BOMBS = {
    "quotes": lambda n: ">" * n,
    "quotes in a line": lambda n: "> " * (n // 4) + "\n" + ">" * (n // 4) + " x",
    "brackets": lambda n: "[" * n,
    "links that never end": lambda n: "[a](" * (n // 4),
    "stars": lambda n: "*a " * (n // 3),
    "pairs of stars": lambda n: "**a*" * (n // 4),
    "underlines": lambda n: "_" * 3 + "a_" * (n // 2),
    "ticks": lambda n: " ".join("`" * (1 + number % 300) for number in range(n // 150)),
    "deep lists": lambda n: "".join(" " * (number % 400) + "- x\n" for number in range(n // 200)),
    "items": lambda n: "- x\n" * (n // 4),
    "pipes": lambda n: "|" * (n // 3) + "\n" + "|-" * (n // 3),
    "rows": lambda n: "|a|b|\n|-|-|\n" + "|x|y|\n" * (n // 6),
    "a fence of blanks": lambda n: "```" + " " * n + "`",
    "a heading of marks": lambda n: "# " * (n // 2) + "x",
    "a divider of blanks": lambda n: "a|b\n---" + " " * n + "x",
    "rules": lambda n: "- " * (n // 2) + "x",
    "one word": lambda n: "x" * n,
    "addresses": lambda n: "http://" * (n // 7),
    "escapes": lambda n: "\\*" * (n // 2),
    "line breaks": lambda n: "\n" * n,
    "more than is read": lambda n: "*x*\n" * n,
}


def shown(page: Page) -> set[str]:
    """The tags that an answer is made of."""
    return set(words(page).evaluate("words => [...words.querySelectorAll('*')].map(one => one.tagName.toUpperCase())"))


@pytest.fixture(scope="module")
def page(browser: Browser, server_url: str):
    """One page for all of them: each is a chat of its own."""
    with chat_page(browser, server_url, answers=["unused"]) as visit:
        yield visit.page


def answered(page: Page, text: str, **more: object) -> str:
    """What is seen of an answer."""
    page.unroute("**/v1/chat/completions")
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(headers={"content-type": "text/event-stream"}, body=stream(text, **more)),
    )
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)
    return ask(page, "Hello?")


@pytest.mark.parametrize("kind", EVIL)
def test_nothing_in_an_answer_runs_or_loads(page: Page, kind: str):
    answered(page, EVIL[kind], thought=EVIL[kind])

    assert page.evaluate("window.ran") is None
    assert shown(page) & {*TAGS} == set()
    links = words(page).locator("a").evaluate_all("all => all.map(one => [one.href, one.rel, one.target])")
    assert all(href.startswith("https://evil.example/") for href, _, _ in links)  # which only a click opens
    assert all("noopener" in rel and "noreferrer" in rel and target == "_blank" for _, rel, target in links)
    assert (
        words(page)
        .evaluate("words => [...words.querySelectorAll('*')].flatMap(one => one.getAttributeNames())")
        .count("onerror")
        == 0
    )
    for word in ("script", "onerror", "javascript"):
        if word in EVIL[kind] and "](" not in EVIL[kind]:
            assert word in words(page).text_content()


@pytest.mark.parametrize("kind", ["a script", "an image", "a drawing"])
def test_nothing_in_a_title_an_error_or_a_chat_of_a_file_runs(
    browser: Browser, server_url: str, tmp_path: Path, kind: str
):
    evil = EVIL[kind]
    turns = [
        {"id": 1, "parent": 0, "role": "user", "text": evil},
        {"id": 2, "parent": 1, "role": "assistant", "text": evil, "thought": evil, "end": evil, "error": evil,
         "odds": [{"at": 0, "tokens": [[evil, -0.1, [[evil, -0.1], [evil + "x", -2]]]]}]},
    ]  # fmt: skip
    file = tmp_path / "chats.json"
    file.write_text(
        json.dumps({"format": "tightrope chats 1", "chats": [{"title": evil, "system": evil, "turns": turns}]})
    )
    error = {"error": {"message": evil}}
    with chat_page(browser, server_url, answers=[f"data: {json.dumps(error)}\n\n"]) as visit:
        page = visit.page
        page.locator("#import-file").set_input_files(file)
        page.locator("#chat-list .title").first.click()
        expect(page.locator("#chat-list .title").first).to_have_text(evil)
        words(page).locator(".token").first.hover()
        expect(page.locator("#odds .chosen")).to_be_visible()
        say(page, evil)
        expect(page.locator("article.assistant .problem").last).to_have_text(evil)
        assert page.evaluate("window.ran") is None
        assert page.locator("#thread script, #thread img, #chats script, #odds script").count() == 0


def test_what_would_make_markup_of_text_is_forbidden_by_the_policy(browser: Browser, server_url: str):
    with chat_page(browser, server_url) as visit:
        page = visit.page
        tried = page.evaluate(
            """async () => {
              const results = {};
              const attempt = async (name, work) => {
                try { results[name] = String(await work()); } catch (error) { results[name] = "refused"; }
              };
              await attempt("markup", () => (document.createElement("p").innerHTML = "<b>x</b>"));
              await attempt("elsewhere", () => fetch("https://evil.example/"));
              const script = document.createElement("script");
              await attempt("script", () => (script.text = "window.ran = 1"));
              return results;
            }"""
        )
        assert tried == {"markup": "refused", "elsewhere": "refused", "script": "refused"}
        visit.problems.clear()  # the browser tells of each
        visit.hosts.discard("evil.example")


@pytest.mark.parametrize("kind", BOMBS)
def test_no_text_takes_long_to_read(page: Page, kind: str):
    page.evaluate(
        """async (text) => {
          const { blocks } = await import("/page/markdown/blocks.js");
          const letters = (node) => node.text?.length ?? node.children.reduce((sum, child) => sum + letters(child), 0);
          window.letters = null;
          setTimeout(() => { window.letters = blocks(text).reduce((sum, block) => sum + letters(block), 0); });
        }""",
        BOMBS[kind](LARGE),
    )
    page.wait_for_function("window.letters !== null")

    assert page.evaluate("window.letters") <= len(BOMBS[kind](LARGE)) + LARGE  # a line of code has its break besides


@pytest.mark.parametrize("kind", ["quotes", "stars", "items", "rows", "one word", "more than is read"])
def test_a_large_answer_is_shown_while_the_page_stays_alive(page: Page, kind: str):
    assert answered(page, BOMBS[kind](100_000))
    assert words(page).locator("*").count() < 50_000
