"""The page at `/` in Chromium with several models behind a real server."""

import json
import re
from collections.abc import Iterator

import pytest
from chat_page import answers, chat_page, is_done, say, words
from playwright.sync_api import Browser, expect
from real_server import RunningServer, run_server

from tightrope.backends.locate import bundled_model

LOAD_MS = 300_000  # A busy machine takes a minute to load a model.


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """SmolLM2, and a file that is no model."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "broken.gguf").write_text("no model")
    own = {"max-model-len": 512, "max-num-seqs": 1, "threads": 1}
    tables = {
        "smol": {"model": str(bundled_model()), **own},
        "broken": {"model": "broken.gguf"},
    }
    (folder / "models.json").write_text(json.dumps(tables))
    with run_server("--models", str(folder / "models.json"), "--models-max", "1") as server:
        yield server


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
