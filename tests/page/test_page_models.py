"""The page at `/` in Chromium with several models, an adapter, and a model that thinks, behind a real server."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from browser import PHONE
from chat_page import SHORT, answers, ask, chat_page, is_done, say, words
from checkout import ADAPTERS
from playwright.sync_api import Browser, Page, expect
from real_server import RunningServer, run_server

from tightrope.backends.locate import bundled_model

LOAD_MS = 300_000  # A busy machine takes a minute to load a model.
# Greedily the tiny model repeats itself, with or without an adapter.
SEEDED = {"seed": 7, "temperature": 1.5, "max_tokens": 16}
QUESTION = "What is a tightrope?"
# It opens thoughts itself, as templates of models that always think do.
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """SmolLM2, and a tiny llama with an adapter, of which one at a time is loaded, and a file that is no model."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "broken.gguf").write_text("no model")
    own = {"max-model-len": 512, "max-num-seqs": 1, "threads": 1}
    adapters = {"limarp": str(ADAPTERS / "llama-lora-r4")}
    tables = {
        "smol": {"model": str(bundled_model()), **own},
        "tiny": {"model": str(ADAPTERS / "llama-bf16"), "lora": adapters, **own},
        "broken": {"model": "broken.gguf"},
    }
    (folder / "models.json").write_text(json.dumps(tables))
    with run_server("--models", str(folder / "models.json"), "--models-max", "1") as server:
        yield server


def message(url: str, **more: object) -> dict[str, str | None]:
    """The API's answer to the question."""
    body = {"messages": [{"role": "user", "content": QUESTION}], **more}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=LOAD_MS / 1000)
    assert reply.status_code == 200, reply.text
    found: dict[str, str | None] = reply.json()["choices"][0]["message"]
    return found


def written(page: Page) -> str:
    """The last answer as the model wrote it: what a visitor may edit, with its Markdown."""
    answers(page).last.get_by_role("button", name="Edit").click()
    text = page.get_by_label("Edited words").input_value()
    page.get_by_role("button", name="Cancel").click()
    return text


@pytest.mark.slow
@pytest.mark.parametrize("context", [{}, PHONE], ids=["desk", "phone"])
def test_models_and_adapters_are_chosen_and_loaded_for_an_answer(
    browser: Browser, several: RunningServer, context: dict[str, object]
):
    found = {}
    with chat_page(browser, several.url, values=SEEDED, **context) as visit:
        page = visit.page
        options = page.locator("#model option").all_inner_texts()
        assert [text.split(" (")[0] for text in options] == ["smol", "tiny", "+ limarp", "broken"]
        for name, label in (("smol", "smol"), ("tiny", "tiny"), ("limarp", "+ limarp")):
            page.get_by_label("Model or adapter").select_option(name)
            page.get_by_label("Message", exact=True).fill(QUESTION)
            with page.expect_request("**/v1/chat/completions") as request:
                page.get_by_role("button", name="Send").click()  # On a phone the key for it ends a line.
            assert request.value.post_data_json["model"] == name
            expect(answers(page)).to_have_count(1)
            is_done(page, LOAD_MS)
            expect(page.locator(f"#model option[value={name}]")).to_have_text(label)
            found[name] = written(page)
            page.evaluate("document.getElementById('new-chat').click()")  # On a phone the list lies under the chat.
            expect(answers(page)).to_have_count(0)
    assert found["smol"] != found["tiny"]
    assert found["tiny"] != found["limarp"]
    assert found == {name: message(several.url, **SEEDED, model=name)["content"] for name in found}


def test_a_model_that_cannot_be_loaded_is_told_and_another_answers(browser: Browser, several: RunningServer):
    with chat_page(browser, several.url, is_checked=False) as visit:
        page = visit.page
        expect(page.locator("body[data-ready]")).to_be_attached()
        page.get_by_label("Model or adapter").select_option("broken")
        say(page, "Hello?")
        problem = answers(page).last.get_by_role("alert")
        expect(problem).to_contain_text("the model `broken` can't be loaded", timeout=LOAD_MS)
        expect(page.locator("#model option[value=broken]")).to_have_text("broken (failed)")
        page.get_by_label("Model or adapter").select_option("smol")
        page.get_by_role("button", name="Try again").click()
        expect(words(page)).to_contain_text(re.compile(r"\w"), timeout=LOAD_MS)
        is_done(page, LOAD_MS)
        expect(problem).to_be_hidden()
        assert [line for line in visit.problems if "500" not in line] == []


def test_thoughts_are_folded_above_the_answer(browser: Browser, tmp_path: Path):
    """This model never ends its thoughts by itself, so that all it writes is one."""
    template = tmp_path / "thinks.jinja"
    template.write_text(THINKS)
    with run_server("--max-model-len=512", "--chat-template", str(template)) as server:
        expected = message(server.url, **SHORT)
        with chat_page(browser, server.url) as visit:
            shown = ask(visit.page, QUESTION, LOAD_MS)
            folded = answers(visit.page).last.locator("details.thought")
            assert folded.get_attribute("open") is None
            expect(folded.locator("summary")).to_have_text(re.compile(r"Thoughts · \d+ words"))
            folded.locator("summary").click()
            expect(folded.locator(".thought-text")).to_be_visible()
            thought = folded.locator(".thought-text").text_content()
    assert thought == expected["reasoning_content"]
    assert thought
    assert not shown
    assert not expected["content"]
