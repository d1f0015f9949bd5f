"""Answers with a great many tokens: they are written slice by slice, and others are served between those."""

import asyncio

import pytest
from fake_api import api

from tightrope.engine.process.client import EngineClient
from tightrope.engine.types import Prompt, TokenRun
from tightrope.server.http.long_lists import SLICE

pytestmark = pytest.mark.quick

TEXT = "x" * 60_000


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/tokenize", {"prompt": TEXT}, "tokens"),
        ("/tokenize", {"content": TEXT}, "tokens"),
        ("/tokenize", {"content": TEXT, "with_pieces": True}, "tokens"),
        ("/tokenize", {"prompt": TEXT, "return_token_strs": True}, "token_strs"),
        ("/v1/token/encode", {"text": TEXT}, "tokens"),
        ("/v1/internal/encode", {"text": TEXT}, "tokens"),
        ("/api/extra/tokencount", {"prompt": TEXT}, "ids"),
    ],
)
async def test_the_loop_turns_between_the_slices_of_a_long_answer(
    path: str, body: dict[str, object], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, tokenize = [0], EngineClient.tokenize

    async def counted(
        self: EngineClient, prompt: Prompt, adapter: str | None = None, *, last: int | None = None
    ) -> TokenRun:
        tokens = await tokenize(self, prompt, adapter, last=last)
        turns[0] = 0
        return tokens

    async def turn() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(EngineClient, "tokenize", counted)
    async with api() as http:
        turning = asyncio.create_task(turn())
        found = (await http.post(path, json=body)).json()[name]
        turning.cancel()
    assert len(found) in (len(TEXT), len(TEXT) + 1)
    assert turns[0] >= len(TEXT) // SLICE
