"""SillyTavern itself: its server from npm, and its page in a browser, driven as a person would."""

import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from installed import npm_packages
from playwright.sync_api import Locator, Page, expect

VERSION = "1.12.6"
START_S = 240
ANSWER_MS = 240_000
LOOK_MS, RESTS = 20, 100  # Nothing is written any more where so many looks in a row find its sign gone.
MOST_SWIPES = 6


@contextmanager
def sillytavern(data: Path) -> Iterator[str]:
    """Its server while the context lasts, with an empty folder for all that it keeps; the URL of its page."""
    folder = npm_packages(f"sillytavern@{VERSION}") / "node_modules" / "sillytavern"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--port", str(port), "--dataRoot", str(data), "--autorun=false", "--listen=false"]
    process = subprocess.Popen(
        ["node", "server.js", *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    deadline = threading.Timer(START_S, process.kill)
    deadline.start()
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if "Go to:" in line:
                break
        assert process.poll() is None, "".join(said)
        rest = threading.Thread(target=process.stdout.read)  # Nobody else empties the pipe.
        rest.start()
        yield f"http://127.0.0.1:{port}/"
    finally:
        deadline.cancel()
        process.kill()
        process.wait()
        rest.join()
        process.stdout.close()


class Tavern:
    """The page, opened by somebody new."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        page.goto(url)
        page.locator("dialog[open] .popup-button-ok").click()  # It asks for the person's name.

    def connect(self, kind: str, url: str) -> str:
        """Connect to a server as "tabby" or "custom"; what the page says of its model."""
        page = self.page
        self._open("#sys-settings-button")
        if kind == "tabby":
            page.locator("#main_api").select_option("textgenerationwebui")
            page.locator("#textgen_type").select_option("tabby")
            page.locator("#tabby_api_url_text").fill(url)
            page.locator("#api_button_textgenerationwebui").click()
            status = page.locator("#textgenerationwebui_api .online_status_text")
        else:
            page.locator("#main_api").select_option("openai")
            page.locator("#chat_completion_source").select_option("custom")
            page.locator("#custom_api_url_text").fill(f"{url}/v1")
            page.locator("#api_button_openai").click()
            status = page.locator("#openai_api .online_status_text")
        # A custom server counts as there before it has been asked; then stands what it has said.
        expect(status).not_to_have_text(re.compile("No connection|Not connected|Status check bypassed"))
        said = status.inner_text()
        self._open("#sys-settings-button", is_open=False)
        return said

    def answer_with(self, num_tokens: int, *, kind: str) -> None:
        """Stream answers of so many tokens."""
        page = self.page
        self._open("#ai-config-button")
        is_text = kind == "tabby"
        page.locator("#streaming_textgenerationwebui" if is_text else "#stream_toggle").check()
        length = page.locator("#amount_gen_counter" if is_text else "#openai_max_tokens")
        length.fill(str(num_tokens))
        length.press("Tab")
        self._open("#ai-config-button", is_open=False)

    def open_chat(self) -> None:
        """With the first of the characters, who greets."""
        self._open("#rightNavHolder")
        self.page.locator("#rm_button_characters").click()
        self.page.locator(".character_select").first.click()
        expect(self.messages).to_have_count(1)
        self._open("#rightNavHolder", is_open=False)

    def say(self, text: str) -> list[str]:
        """Send a message; what the answer has been while it grew, to the whole."""
        before = self.messages.count()
        self.page.locator("#send_textarea").fill(text)
        self.page.locator("#send_but").click()
        expect(self.messages).to_have_count(before + 2, timeout=ANSWER_MS)
        return self._growing()

    def swipe(self) -> list[str]:
        """Ask for another answer, until there is one; what it has been while it grew. A small model may say nothing."""
        for number in range(2, 2 + MOST_SWIPES):
            self.last.locator(".swipe_right").click()
            expect(self.last.locator(".swipes-counter")).to_contain_text(str(number), timeout=ANSWER_MS)
            if seen := self._growing():
                return seen
        raise AssertionError(f"{MOST_SWIPES} answers are empty")

    @property
    def messages(self) -> Locator:
        return self.page.locator("#chat .mes")

    @property
    def last(self) -> Locator:
        return self.page.locator("#chat .mes.last_mes")

    def _growing(self) -> list[str]:
        """All that the last message has been until its writer rests; without the dots before its first word."""
        seen: list[str] = []
        stop, text = self.page.locator("#mes_stop"), self.last.locator(".mes_text")
        until = time.monotonic() + ANSWER_MS / 1000
        num_rests = 0
        while num_rests < RESTS:
            assert time.monotonic() < until, f"the answer does not end: {seen[-1:]}"
            num_rests = 0 if stop.is_visible() else num_rests + 1
            if (said := text.inner_text().strip()) not in ("", "...", *seen[-1:]):
                seen.append(said)
            self.page.wait_for_timeout(LOOK_MS)
        return seen

    def _open(self, drawer: str, *, is_open: bool = True) -> None:
        """Open or close one of the drawers at the top, whatever it is now."""
        icon = self.page.locator(f"{drawer} .drawer-icon")
        wanted = re.compile(r"\bopenIcon\b" if is_open else r"\bclosedIcon\b")
        if not wanted.search(icon.get_attribute("class") or ""):
            self.page.locator(f"{drawer} .drawer-toggle").click()
        expect(icon).to_have_class(wanted)
