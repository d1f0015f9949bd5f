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
    tables = {
        "smol": {"model": str(bundled_model()), **own},
        "tiny": {
            "model": str(ADAPTERS / "llama-bf16"),
            "lora": {"limarp": str(ADAPTERS / "llama-lora-r4")},
            **own,
        },
        "broken": {"model": "broken.gguf"},
    }
    (folder / "models.json").write_text(json.dumps(tables))
    with run_server("--models", str(folder / "models.json"), "--models-max", "1") as server:
        yield server


def listed(page: Page) -> list[str]:
    """The choices at the top."""
    return page.locator("#model option").all_inner_texts()


def said(server: RunningServer, model: str, text: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": text}], **SHORT}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=LOAD_MS / 1000)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def letters(text: str) -> str:
    """What of an answer no Markdown takes for its own."""
    return "".join(re.findall(r"\w", text))


@pytest.mark.parametrize("context", [{}, PHONE], ids=["desk", "phone"])
def test_models_and_adapters_are_chosen_and_loaded_for_an_answer(
    browser: Browser, several: RunningServer, context: dict[str, object]
):
    with chat_page(browser, several.url, **context) as visit:
        page = visit.page
        assert [text.split(" (")[0] for text in listed(page)] == ["smol", "tiny", "+ limarp", "broken"]
        found: dict[str, str] = {}
        for name, label in (("smol", "smol"), ("tiny", "tiny"), ("limarp", "+ limarp")):
            page.get_by_label("Model or adapter").select_option(name)
            found[name] = ask(page, "What is a tightrope?", LOAD_MS)
            expect(page.locator(f"#model option[value={name}]")).to_have_text(label)
            page.evaluate("document.getElementById('new-chat').click()")  # On a phone the list lies under the chat.
    assert found["tiny"] != found["limarp"]
    for name, text in found.items():
        assert letters(text) == letters(said(several, name, "What is a tightrope?")), name


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
        is_done(page, LOAD_MS)
        expect(problem).to_be_hidden()
        assert words(page).inner_text()
        assert [line for line in visit.problems if "500" not in line] == []


def test_thoughts_are_folded_above_the_answer(browser: Browser, tmp_path: Path):
    template = tmp_path / "thinks.jinja"
    template.write_text(THINKS)
    values = {**SHORT, "max_tokens": 40, "thinking_token_budget": 8, "ignore_eos": True}
    with run_server("--max-model-len=512", "--chat-template", str(template)) as server:
        body = {"messages": [{"role": "user", "content": "What is a tightrope?"}], **values}
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=LOAD_MS / 1000)
        message = reply.json()["choices"][0]["message"]
        with chat_page(browser, server.url, values=values) as visit:
            page = visit.page
            shown = ask(page, "What is a tightrope?")
            folded = answers(page).last.locator("details.thought")
            assert folded.get_attribute("open") is None
            expect(folded.locator("summary")).to_have_text(re.compile(r"Thoughts · \d+ words"))
            folded.locator("summary").click()
            thought = folded.locator(".thought-text").inner_text()
            again = ask(page, "And who walks on it?")
    assert letters(thought) == letters(message["reasoning_content"])
    assert letters(shown) == letters(message["content"])
    assert again
