"""SillyTavern 1.12.6, from npm, in Chromium, against the real server: it connects, streams and swipes."""

from pathlib import Path

import pytest
from browser import running_browser, visit
from sillytavern import Tavern, sillytavern

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engine", ["server_url", "torch_server_url"])
def test_sillytavern_connects_streams_and_swipes(engine: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url: str = request.getfixturevalue(engine)
    told: dict[str, str] = {}
    answers: list[list[str]] = []
    with sillytavern(tmp_path) as page_url, running_browser() as browser, visit(browser) as visitor:
        tavern = Tavern(visitor.page, page_url)
        tavern.open_chat()
        for kind in ("tabby", "custom"):
            told[kind] = tavern.connect(kind, url)
            tavern.answer_with(40, kind=kind)
            answers += [tavern.say("Hello there. How are you?"), tavern.swipe()]
    assert "smollm2" in told["tabby"].lower()
    assert "No connection" not in told["custom"]
    for seen in answers:
        assert len(seen) > 1, "it grows while it is written"
