"""Where a session was last, and whether its tokens are still there."""

import pytest

from tightrope.backends.holdings import BLOCK, Holdings, chain, root_of
from tightrope.engine.process.wire import Held, HeldBlocks
from tightrope.engine.types import GenerateRequest, TokenPrompt
from tightrope.server.cluster import sessions as module
from tightrope.server.cluster.digests import DigestIndex, ReplicaHoldings
from tightrope.server.cluster.sessions import Sessions

KEY, ALICE = b"k" * 32, ("", "alice")
PROMPT = list(range(100))
REQUEST = GenerateRequest("r", TokenPrompt(tuple(PROMPT)))


def tell(index: DigestIndex, holdings: Holdings, number: int) -> None:
    cached, stored = (HeldBlocks(part.is_whole, part.stride, part.added, part.removed) for part in holdings.take())
    held = Held(number, cached, stored, b"", 0.03, {})
    index.apply("a", ReplicaHoldings().changes(held, KEY))


def test_a_session_s_tokens_count_while_the_end_of_its_prompt_is_there() -> None:
    index, holdings = DigestIndex(KEY), Holdings()
    sessions = Sessions(index)
    tell(index, holdings, 0)
    assert sessions.last(ALICE) is None
    sessions.remember(ALICE, REQUEST, "a", PROMPT)
    assert sessions.last(ALICE) == ("a", 0)  # It has been sent there, and has not run.
    blocks = list(chain(root_of(b"", ""), PROMPT))
    holdings.add("cached", blocks, 0)
    tell(index, holdings, 1)
    assert sessions.last(ALICE) == ("a", len(PROMPT))
    holdings.remove("cached", blocks[-1:])
    tell(index, holdings, 2)
    assert sessions.last(ALICE) == ("a", 0)
    assert sessions.last(("other key", "alice")) is None


def test_nothing_is_remembered_of_who_names_no_session_and_little_of_what_was_not_tokenized() -> None:
    sessions = Sessions(DigestIndex(KEY))
    sessions.remember(None, REQUEST, "a", PROMPT)
    assert sessions.last(None) is None
    sessions.remember(ALICE, REQUEST, "a", [])
    assert sessions.last(ALICE) == ("a", 0)


def test_the_sessions_of_use_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SESSIONS", 2)
    sessions = Sessions(DigestIndex(KEY))
    for name in ("one", "two", "one", "three"):
        sessions.remember(("", name), REQUEST, "a", PROMPT[:BLOCK])
    assert [sessions.last(("", name)) is not None for name in ("one", "two", "three")] == [True, False, True]
