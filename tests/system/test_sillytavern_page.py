"""SillyTavern 1.12.6, from npm, in Chromium, against the real server: it connects, streams and swipes."""

from pathlib import Path

import pytest
from browser import running_browser, visit
from sillytavern import Tavern, sillytavern

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engine", ["server_url", "torch_server_url"])
@pytest.mark.parametrize(("kind", "status"), [("tabby", "SmolLM2"), ("custom", "Valid")])
def test_sillytavern_connects_streams_and_swipes(
    kind: str, status: str, engine: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url: str = request.getfixturevalue(engine)
    with sillytavern(tmp_path) as page_url, running_browser() as browser, visit(browser) as visitor:
        tavern = Tavern(visitor.page, page_url)
        assert status.lower() in tavern.connect(kind, url).lower()
        tavern.answer_with(40, kind=kind)
        tavern.open_chat()
        answers = [tavern.say("Hello there. How are you?"), tavern.swipe()]
    for seen in answers:
        assert len(seen) > 1, "it grows while it is written"
