"""What came of each request of a soak, and which of it is a fault."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Literal

from bench.asks import Ask
from bench.sse import Reply, RequestFailed, exchange

ANSWER_S = 180.0  # what has no answer by then is taken for lost
KILL_NOTICED_S = 1.0  # after /health is well again, an answer that had begun to fail may still be on its way

End = Literal["answered", "refused", "failed", "left", "cut", "lost", "wrong"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ended; times are seconds of the soak.

    answered: as was asked. refused: 4xx. failed: 5xx, TGI's 424, or an error event at the end of a stream that had
    begun. left: its client hung up. cut: a stream or body ended without its end. lost: no answer at all. wrong: whole,
    but not what was asked for.
    """

    kind: str
    expected: str
    begin_s: float
    end_s: float
    end: End
    status: int
    text: str = ""  # of what was no success, its beginning

    @property
    def is_as_expected(self) -> bool:
        """Whether the request fared as it should while nothing is killed."""
        if self.expected == "nothing":  # a client that leaves may have been quick enough to be answered
            return self.end in ("left", "answered")
        return self.end == ("refused" if self.expected == "refusal" else "answered")

    @property
    def may_follow_a_kill(self) -> bool:
        """Whether an engine's death explains the end: an error is told, and nothing is cut or lost."""
        return self.end == "failed"


@dataclass(slots=True)
class Kill:
    """The engine's death by -9; `back_s` is when /health was well again, None until then."""

    at_s: float
    was: str  # "loading" or "serving"
    back_s: float | None = None


async def perform(url: str, ask: Ask, began_s: float) -> Outcome:
    """Send one request and read what comes; times count from `began_s` of `time.perf_counter`."""
    sent_s = time.perf_counter() - began_s
    end: End
    status, text = 0, ""
    try:
        async with asyncio.timeout(ANSWER_S if ask.hang_up_s is None else ask.hang_up_s):
            most = ask.hang_up_events
            reply = await exchange(
                url, ask.path, ask.payload, ask.headers, lambda n: most is not None and n >= most, ask.missing
            )
        end, status = judged(ask, reply), reply.status
        if end not in ("answered", "left"):
            text = (reply.events[-1][1] if reply.events else reply.body)[:300].decode(errors="replace")
    except TimeoutError:
        end = "lost" if ask.hang_up_s is None else "left"
    except RequestFailed as error:
        end, text = "lost", str(error)
    return Outcome(ask.kind, ask.expected, sent_s, time.perf_counter() - began_s, end, status, text)


def judged(ask: Ask, reply: Reply) -> End:
    """How an exchange ended that gave a reply."""
    if reply.status == 424 or reply.status >= 500:
        return "failed"
    if reply.status != 200:
        return "refused"
    if ask.hang_up_events is not None and len(reply.events) >= ask.hang_up_events and not reply.is_whole:
        return "left"
    if not reply.is_whole:
        return "cut"
    if ask.expected == "stream" or reply.events:
        return _end_of_stream(reply)
    try:
        return "answered" if ask.check is None or ask.check(json.loads(reply.body)) else "wrong"
    except (ValueError, LookupError, TypeError):
        return "wrong"


def _end_of_stream(reply: Reply) -> End:
    """A stream ends with [DONE], TGI's event with the whole text, or an error."""
    last = reply.events[-1][1] if reply.events else b"null"
    if last == b"[DONE]":
        return "answered"
    event = json.loads(last)
    if not isinstance(event, dict):
        return "cut"
    if "error" in event:
        return "failed"
    return "answered" if event.get("generated_text") is not None else "cut"


def near_a_kill(outcome: Outcome, kills: Sequence[Kill]) -> bool:
    """Whether an engine was dead, or loading, at some moment between the request and its end."""
    return any(
        outcome.end_s >= kill.at_s and (kill.back_s is None or outcome.begin_s <= kill.back_s + KILL_NOTICED_S)
        for kill in kills
    )


def recoveries_s(kills: Sequence[Kill]) -> list[float]:
    """Seconds from a kill to a healthy server, of those that no other kill has met on the way."""
    later = [kill.at_s for kill in kills[1:]] + [inf]
    return [
        kill.back_s - kill.at_s
        for kill, next_s in zip(kills, later, strict=True)
        if kill.back_s is not None and kill.back_s <= next_s
    ]


def faults(outcomes: Sequence[Outcome], kills: Sequence[Kill]) -> list[Outcome]:
    """The outcomes that nothing excuses."""
    return [
        outcome
        for outcome in outcomes
        if not outcome.is_as_expected and not (outcome.may_follow_a_kill and near_a_kill(outcome, kills))
    ]


def by_kind(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """How many requests of each kind ended how; all kinds of bad input are one."""
    found: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        ends = found.setdefault(outcome.kind.partition(":")[0], {})
        ends[outcome.end] = ends.get(outcome.end, 0) + 1
    return {kind: found[kind] for kind in sorted(found)}


def told(found: Sequence[Outcome], most: int = 30) -> list[dict[str, object]]:
    """Faults as JSON, the first of them in full."""
    return [asdict(outcome) for outcome in found[:most]]
