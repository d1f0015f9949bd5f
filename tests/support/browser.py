"""Chromium, driven by Playwright: for the page at `/`, and for web clients. Debian's package is `chromium`."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
# As root there is no sandbox to be had; the others keep it from talking to anybody by itself.
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
ARGUMENTS += ("--disable-component-update", "--disable-sync")
WAIT_MS = 60_000  # a busy two-core machine
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}


@contextmanager
def running_browser() -> Iterator[Browser]:
    """A browser with a new, empty profile while the context lasts; without one here the test is left out, by name.

    Playwright keeps an event loop running meanwhile, so that no coroutine can be tested beside it: a browser is for the
    tests of one file.
    """
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no browser: Debian's package chromium has one")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*ARGUMENTS], headless=True)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page, what went wrong on it, and whom it has asked for anything."""

    page: Page
    problems: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def check(self, url: str) -> None:
        """Nothing went wrong, and nobody but that server was asked."""
        assert self.problems == []
        assert self.hosts <= {urlsplit(url).netloc}

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"{message.type}: {message.text}")

    def _asked(self, request: Request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("blob", "data"):
            self.hosts.add(address.netloc)

    def listen(self) -> None:
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.problems.append(f"thrown: {error}"))
        self.page.on("request", self._asked)


@contextmanager
def visit(browser: Browser, **context: object) -> Iterator[Visit]:
    """A page of a visitor whom the browser doesn't know; context: options of Playwright's, such as PHONE."""
    opened = browser.new_context(**context)
    opened.set_default_timeout(WAIT_MS)
    try:
        found = Visit(opened.new_page())
        found.listen()
        yield found
    finally:
        opened.close()
