"""The page at `/` in Chromium, over the real server and the bundled model: what a visitor does, and what he sees."""

import json
import re
from pathlib import Path

import httpx
import pytest
from browser import PHONE
from chat_page import LONG, SHORT, answers, ask, chat_page, is_done, reload, say, words
from playwright.sync_api import Browser, Page, expect
from real_server import run_server


def counter(url: str, name: str) -> float:
    """A counter of /metrics."""
    (value,) = re.findall(rf"^{name}(?:_total)? (\S+)$", httpx.get(f"{url}/metrics", timeout=60).text, re.MULTILINE)
    return float(value)


def begun(page: Page) -> str:
    """The first words of an answer that is being written."""
    expect(words(page)).to_contain_text(re.compile(r"\w+ \w+ \w+"))
    return words(page).inner_text()


def test_a_chat_is_answered_turn_by_turn(browser: Browser, server_url: str):
    with chat_page(browser, server_url) as visit:
        first = ask(visit.page, "What is a tightrope?")
        second = ask(visit.page, "And who walks on it?")

        assert first
        assert second
        expect(answers(visit.page)).to_have_count(2)
        expect(answers(visit.page).first.locator(".facts")).to_contain_text(re.compile(r"\d+ tokens"))
        expect(answers(visit.page).first.locator(".facts")).to_contain_text("a second")


def test_the_answer_is_the_one_that_the_api_gives(browser: Browser, server_url: str):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 12}
    expected = httpx.post(f"{server_url}/v1/chat/completions", json=body, timeout=60).json()

    with chat_page(browser, server_url) as visit:
        shown = ask(visit.page, "What is the capital of France?")

    plain = expected["choices"][0]["message"]["content"]
    assert re.findall(r"\w+", shown) == re.findall(r"\w+", plain)


def test_the_meter_tells_what_the_server_has_kept_moved_and_read(browser: Browser, server_url: str):
    with chat_page(browser, server_url) as visit:
        page = visit.page
        ask(page, "Tell me of the sea, and of the ships on it.")
        with page.expect_response("**/v1/chat/completions") as reply:
            ask(page, "Go on.")
        (usage,) = [json.loads(found) for found in re.findall(r'"usage":({.*})}', reply.value.text())]
        legend = page.locator("#legend").inner_text()

    found = {name: int(n.replace(",", "")) for n, name in re.findall(r"([\d,]+) (kept|moved|new|answered)", legend)}
    cached, moved = usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens_details"]["moved_tokens"]
    sizes = {"kept": cached - moved, "moved": moved, "new": usage["prompt_tokens"] - cached}
    sizes["answered"] = usage["completion_tokens"]
    assert found == {name: size for name, size in sizes.items() if size}
    assert f"{usage['total_tokens']} of 8,192 tokens" in legend


def test_a_chat_that_has_filled_the_window_goes_without_its_oldest_turns(browser: Browser):
    with run_server("--max-model-len=512") as server, chat_page(browser, server.url) as visit:
        page = visit.page
        for number in range(6):
            ask(page, f"This is letter {number}. " + "The sea is wide, and the ships are small. " * 9)
            expect(answers(page).last.locator(".problem")).to_be_hidden()
        expect(page.locator(".cut:visible")).to_have_count(1)
        expect(page.locator("#legend")).to_contain_text("moved")


def test_a_stop_ends_the_answer_on_the_server_too(browser: Browser, server_url: str):
    before = counter(server_url, "tightrope_cancelled")
    with chat_page(browser, server_url, values=LONG) as visit:
        say(visit.page, "Count from one to a thousand.")
        start = begun(visit.page)
        visit.page.get_by_role("button", name="Stop").click()
        is_done(visit.page)

        assert words(visit.page).inner_text().startswith(start[:10])
        expect(answers(visit.page).last.locator(".facts")).to_contain_text("stopped")
    while counter(server_url, "tightrope_cancelled") == before:
        pass


def test_a_swipe_writes_another_answer_and_both_stay(browser: Browser, server_url: str):
    with chat_page(browser, server_url, values={"max_tokens": 12, "temperature": 1.5}) as visit:
        page = visit.page
        first = ask(page, "Invent a name.")
        place = answers(page).last.locator(".place")
        expect(place).to_have_text("1 / 1")
        answers(page).last.get_by_role("button", name="Another answer").click()
        expect(place).to_have_text("2 / 2")
        is_done(page)
        second = words(page).inner_text()
        answers(page).last.get_by_role("button", name="Previous").click()
        expect(place).to_have_text("1 / 2")
        assert words(page).inner_text() == first
        answers(page).last.get_by_role("button", name="Next").click()
        expect(place).to_have_text("2 / 2")
        assert words(page).inner_text() == second
        expect(answers(page)).to_have_count(1)


def test_an_edited_answer_is_gone_on_with(browser: Browser, server_url: str):
    with chat_page(browser, server_url) as visit:
        page = visit.page
        ask(page, "Who are you?")
        answers(page).last.get_by_role("button", name="Edit").click()
        page.get_by_label("Edited words").fill("I am a lighthouse keeper, and every")
        page.get_by_role("button", name="Keep and go on").click()
        expect(words(page)).to_contain_text(re.compile(r"I am a lighthouse keeper, and every\W*\w+"))
        is_done(page)
        expect(answers(page)).to_have_count(1)
        expect(answers(page).last.locator(".place")).to_have_text("1 / 1")


def test_a_turn_of_the_visitor_in_other_words_is_a_branch(browser: Browser, server_url: str):
    with chat_page(browser, server_url) as visit:
        page = visit.page
        ask(page, "Say red.")
        said = page.locator("article.user")
        said.first.hover()
        said.first.get_by_role("button", name="Edit").click()
        page.get_by_label("Edited words").fill("Say blue.")
        page.get_by_role("button", name="Send as another branch").click()
        expect(said.first.locator(".place")).to_have_text("2 / 2")
        is_done(page)
        said.first.get_by_role("button", name="Previous").click()
        expect(said.first.locator(".words")).to_have_text("Say red.")


def test_chats_are_there_after_a_reload(browser: Browser, server_url: str):
    with chat_page(browser, server_url) as visit:
        page = visit.page
        answer = ask(page, "What is a harbour?")
        page.get_by_role("button", name="New chat").click()
        expect(answers(page)).to_have_count(0)
        ask(page, "What is a bridge?")
        reload(page)
        expect(page.locator("article.user .words")).to_have_text("What is a bridge?")
        page.get_by_role("button", name="What is a harbour?").click()
        expect(page.locator("article.user .words")).to_have_text("What is a harbour?")
        assert words(page).inner_text() == answer
        expect(answers(page).last.locator(".token").first).to_be_attached()


def test_an_answer_that_is_being_written_goes_on_after_a_reload(browser: Browser, server_url: str):
    values = {**LONG, "max_tokens": 120}
    with chat_page(browser, server_url, values=values) as visit:
        page = visit.page
        say(page, "Tell me a long story.")
        begun(page)
        reload(page)
        expect(answers(page)).to_have_count(1)
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        is_done(page)
        resumed = words(page).inner_text()
    with chat_page(browser, server_url, values=values) as visit:
        assert ask(visit.page, "Tell me a long story.") == resumed


def test_an_error_is_told_and_the_answer_can_be_asked_for_again(browser: Browser, server_url: str):
    with chat_page(browser, server_url, values=SHORT) as visit:
        page = visit.page
        page.route("**/v1/chat/completions", lambda route: route.abort())
        say(page, "Hello?")
        expect(answers(page).last.locator(".problem")).to_contain_text("can't be reached")
        page.unroute("**/v1/chat/completions")
        answers(page).last.get_by_role("button", name="Try again").click()
        is_done(page)
        expect(words(page)).to_contain_text(re.compile(r"\w"))
        expect(answers(page).last.locator(".problem")).to_be_hidden()
        assert [problem for problem in visit.problems if "net::ERR_FAILED" not in problem] == []
        visit.problems.clear()  # the browser itself tells of a request that failed


def test_a_refusal_is_told_in_the_servers_words(browser: Browser, server_url: str):
    with chat_page(browser, server_url) as visit:
        page = visit.page
        page.get_by_role("button", name="Settings", exact=True).click()
        page.get_by_label("Rivals shown for each token").fill("20")
        page.get_by_label("Dynamic temperature", exact=False).first.focus()
        page.evaluate(
            "localStorage['tightrope.preferences'] = JSON.stringify({values: {dynatemp_range: 1, mirostat_mode: 7}})"
        )
        reload(page)
        say(page, "Hello?")
        expect(answers(page).last.locator(".problem")).to_contain_text("mirostat")
        assert all("400" in problem for problem in visit.problems)
        visit.problems.clear()


def test_the_key_is_asked_for_and_kept_in_the_tab_alone(browser: Browser):
    with (
        run_server("--gguf-engine=llama.cpp", "--api-key=open sesame") as server,
        chat_page(browser, server.url, is_checked=False) as visit,
    ):
        page = visit.page
        for key in ("wrong", "open sesame"):
            page.get_by_label("Key", exact=True).fill(key)
            page.get_by_role("button", name="Go on").click()
        expect(page.locator("body[data-ready]")).to_be_attached()
        assert ask(page, "What is a key?")
        kept = page.evaluate("[{...sessionStorage}, {...localStorage}].map(place => JSON.stringify(place))")
        assert "open sesame" in kept[0]
        assert "open sesame" not in kept[1]
        reload(page)
        other = page.context.new_page()
        other.goto(server.url)
        expect(other.get_by_label("Key", exact=True)).to_be_visible()
        assert all("401" in problem for problem in visit.problems)


def test_everything_can_be_done_by_keyboard_alone(browser: Browser, server_url: str):
    with chat_page(browser, server_url, values={"max_tokens": 12, "temperature": 1.5}) as visit:
        page, press = visit.page, visit.page.keyboard.press
        page.keyboard.type("Invent a word.")  # The box has the focus from the start.
        press("Enter")
        expect(answers(page)).to_have_count(1)
        is_done(page)
        first = words(page).inner_text()
        press("Alt+ArrowRight")
        expect(answers(page).last.locator(".place")).to_have_text("2 / 2")
        is_done(page)
        press("Alt+ArrowLeft")
        expect(answers(page).last.locator(".place")).to_have_text("1 / 2")
        assert words(page).inner_text() == first
        press("Alt+ArrowUp")
        press("e")
        expect(page.get_by_label("Edited words")).to_be_focused()
        page.keyboard.type(" So it")
        press("Control+Enter")
        expect(words(page)).to_contain_text("So it")
        is_done(page)
        for drawer, name in (("settings", "Settings"), ("chats", "Chats")):
            is_open = page.locator(f"body.with-{drawer}").count() > 0
            press(f"Alt+{drawer[0]}")
            expect(page.locator(f"body.with-{drawer}")).to_have_count(0 if is_open else 1)
            assert (
                page.get_by_role("button", name=name, exact=True).get_attribute("aria-expanded") != str(is_open).lower()
            )
        press("Alt+n")
        expect(answers(page)).to_have_count(0)
        expect(page.get_by_label("Message", exact=True)).to_be_focused()


def test_escape_stops_an_answer(browser: Browser, server_url: str):
    with chat_page(browser, server_url, values=LONG) as visit:
        say(visit.page, "Count from one to a thousand.")
        begun(visit.page)
        visit.page.keyboard.press("Escape")
        is_done(visit.page)
        expect(answers(visit.page).last.locator(".facts")).to_contain_text("stopped")


def test_a_word_tells_its_probability_where_the_pointer_rests(browser: Browser, server_url: str):
    with chat_page(browser, server_url) as visit:
        page = visit.page
        ask(page, "What is the capital of France?")
        token = words(page).locator(".token").nth(2)
        token.hover()
        rows = page.locator("#odds .row")
        expect(rows).to_have_count(5)
        assert page.locator("#odds .chosen code").inner_text().replace("·", " ") == token.text_content()
        shares = [
            float(text.rstrip("%")) for text in rows.locator("span:last-child").all_inner_texts() if "under" not in text
        ]
        assert shares == sorted(shares, reverse=True)
        page.get_by_label("Message", exact=True).hover()
        expect(page.locator("#odds")).to_be_hidden()
        joined = "".join(words(page).locator(".token").all_text_contents())
        assert joined == words(page).text_content()


def test_the_system_message_and_the_fields_reach_the_request(browser: Browser, server_url: str):
    with chat_page(browser, server_url) as visit:
        page = visit.page
        page.get_by_role("button", name="Settings", exact=True).click()
        page.get_by_label("System message").fill("You speak of boats alone.")
        page.locator("#field-temperature").fill("0.3")
        page.locator("#field-stop").fill("boat\\nyard")
        page.locator("summary", has_text="Repetition").click()
        page.locator("#field-dry_multiplier").fill("0.8")
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "Hello.")
        body = json.loads(sent.value.post_data)
        reload(page)
        expect(page.locator("#system")).to_have_value("You speak of boats alone.")

    assert body["messages"][0] == {"role": "system", "content": "You speak of boats alone."}
    assert (body["temperature"], body["dry_multiplier"], body["stop"]) == (0.3, 0.8, ["boat\nyard"])
    assert body["max_tokens"] == 12
    assert "top_p" not in body


def test_every_field_of_the_page_is_one_that_the_server_honours(browser: Browser, server_url: str):
    with chat_page(browser, server_url) as visit:
        fields = visit.page.evaluate("import('/page/fields.js').then(({FIELDS}) => FIELDS)")
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "explain": True}
    for field in fields:
        value = field.get("high", 1)
        match field["kind"]:
            case "lines":
                value = ["zq"]
            case "text":
                value = "zq"
            case "flag":
                value = True
            case "choice":
                value = type(field["neutral"])(field["options"][-1])
        if field["name"] in ("min_tokens", "max_tokens"):  # 4,096 tokens of an answer that rambles on take minutes
            value = chat["max_tokens"]
        body = {**chat, field["name"]: value}
        reply = httpx.post(f"{server_url}/v1/chat/completions", json=body, timeout=60)
        if field["name"] == "thinking_token_budget":  # this model's template knows no thoughts
            assert "thinking_token_budget" in reply.text
            continue
        assert reply.status_code == 200, reply.text
        assert field["name"] not in [name for name, _ in reply.json()["explain"]["ignored"]] or field["about"].count(
            "template"
        )


def test_the_memory_is_shown_as_a_bar(browser: Browser, server_url: str):
    plan = httpx.get(f"{server_url}/plan", timeout=60).json()
    with chat_page(browser, server_url) as visit:
        visit.page.get_by_role("button", name="Settings", exact=True).click()
        pieces = visit.page.locator(".plan span")
        expect(pieces).to_have_count(4)
        widths = [float(style) for style in pieces.evaluate_all("all => all.map(one => parseFloat(one.style.width))")]

    shares = [
        plan[name] / plan["memory_bytes"] for name in ("weight_bytes", "cache_bytes", "workspace_bytes", "run_bytes")
    ]
    assert widths == pytest.approx([100 * share for share in shares], abs=0.01)
    assert 0 < plan["weight_bytes"] < plan["memory_bytes"]


def test_chats_go_out_as_a_file_and_come_in_again(browser: Browser, server_url: str, tmp_path: Path):
    with chat_page(browser, server_url) as visit:
        page = visit.page
        answer = ask(page, "What is a letter?")
        with page.expect_download() as download:
            page.get_by_role("button", name="Export").click()
        file = tmp_path / "chats.json"
        download.value.save_as(file)
    with chat_page(browser, server_url) as visit:
        page = visit.page
        page.locator("#import-file").set_input_files(file)
        page.get_by_role("button", name="What is a letter?").click()
        assert words(page).inner_text() == answer
        file.write_text('{"format": "another"}')
        page.locator("#import-file").set_input_files(file)
        expect(page.locator("#notice")).to_contain_text("none of this page's")


def test_on_a_phone_all_is_within_reach(browser: Browser, server_url: str):
    with chat_page(browser, server_url, **PHONE) as visit:
        page = visit.page
        page.get_by_label("Message", exact=True).fill("What is a phone?")
        page.get_by_role("button", name="Send").tap()
        expect(answers(page)).to_have_count(1)
        is_done(page)
        for name in ("Chats", "Settings"):
            page.get_by_role("button", name=name, exact=True).tap()
            drawer = page.locator(f"#{name.lower()}")
            expect(drawer).to_be_in_viewport()
            page.get_by_role("button", name=f"Close the {'list of chats' if name == 'Chats' else 'settings'}").tap()
            expect(drawer).to_be_hidden()
        words(page).locator(".token").first.tap()
        expect(page.locator("#odds")).to_be_in_viewport(ratio=1)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert all(
            width <= 390
            for width in page.locator("#stage *").evaluate_all("all => all.map(e => e.getBoundingClientRect().right)")
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_in_light_and_in_dark(browser: Browser, server_url: str, scheme: str):
    with chat_page(browser, server_url, color_scheme=scheme) as visit:
        contrast = visit.page.evaluate(CONTRAST)
        visit.page.get_by_role("button", name="Colours: auto").click()
        visit.page.get_by_role("button", name="Colours: light").click()
        chosen = visit.page.evaluate("getComputedStyle(document.body).colorScheme")

    assert chosen == "dark"
    assert min(contrast.values()) >= 4.5, contrast


# WCAG 2.2's contrast of each colour of text with what lies behind it.
CONTRAST = """() => {
  const probe = document.body.appendChild(document.createElement("i"));
  const luminance = (name) => {
    probe.style.color = `var(--${name})`;
    const parts = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
    const [r, g, b] = parts.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = {};
  for (const back of ["paper", "sheet", "raised", "wash"]) {
    for (const front of ["ink", "soft", "accent", "bad"]) {
      const [high, low] = [luminance(back), luminance(front)].sort((a, b) => b - a);
      found[`${front} on ${back}`] = (high + 0.05) / (low + 0.05);
    }
  }
  probe.remove();
  return found;
}"""
