"""The page at `/` as its visitors use it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from browser import WAIT_MS, Visit, visit
from playwright.sync_api import Browser, Locator, Page, Route, expect

SHORT = MappingProxyType({"temperature": 0, "max_tokens": 12})
LONG = MappingProxyType({"temperature": 0, "max_tokens": 3000, "ignore_eos": True})
expect.set_options(timeout=WAIT_MS)


@contextmanager
def chat_page(
    browser: Browser,
    url: str,
    *,
    values: Mapping[str, Any] = SHORT,
    answers: Sequence[str] | None = None,
    is_checked: bool = True,
    **context: object,
) -> Iterator[Visit]:
    """The page, ready, for a visitor who has set these fields of sampling; afterwards nothing must have gone wrong.

    answers: streams that are given instead of the server's, one after the other, the last one again and again.
    """
    with visit(browser, **context) as found:
        kept = json.dumps({"values": dict(values)})
        found.page.add_init_script(
            f"localStorage['tightrope.preferences'] ??= {json.dumps(kept)}; window.confirm = () => true"
        )
        if answers is not None:
            scripted(found.page, answers)
        found.page.goto(url)
        if is_checked:
            expect(found.page.locator("body[data-ready]")).to_be_attached()
        yield found
        if is_checked:
            found.check(url)


def scripted(page: Page, answers: Sequence[str]) -> None:
    """Give these streams for requests to write."""
    left = list(answers)

    def fulfil(route: Route) -> None:
        body = left.pop(0) if len(left) > 1 else left[0]
        route.fulfill(status=200, headers={"content-type": "text/event-stream"}, body=body)

    page.route("**/v1/chat/completions", fulfil)


def stream(text: str, *, thought: str = "", usage: Mapping[str, Any] | None = None, end: str = "stop") -> str:
    """A whole answer as the server streams it, in pieces of a few letters."""
    deltas = [{"reasoning_content": thought}] if thought else []
    deltas += [{"content": text[place : place + 7]} for place in range(0, len(text), 7)]
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": end}]})
    if usage is not None:
        chunks.append({"choices": [], "usage": dict(usage)})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def reload(page: Page) -> None:
    """Load the page again, and wait until it listens."""
    page.reload()
    expect(page.locator("body[data-ready]")).to_be_attached()


def say(page: Page, text: str) -> None:
    """Write and send, by keyboard."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answers(page: Page) -> Locator:
    return page.locator("article.assistant")


def words(page: Page) -> Locator:
    """The words of the last answer."""
    return answers(page).last.locator(".words")


def is_done(page: Page, wait_ms: float = WAIT_MS) -> None:
    """Wait until nothing is being written."""
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=wait_ms)


def ask(page: Page, text: str, wait_ms: float = WAIT_MS) -> str:
    """Say something, and wait for the whole answer."""
    count = answers(page).count()
    say(page, text)
    expect(answers(page)).to_have_count(count + 1)
    is_done(page, wait_ms)
    return words(page).inner_text()
