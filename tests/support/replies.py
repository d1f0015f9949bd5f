"""Reading model texts: whole, cut into characters, and cut short; and what of them is text."""

from collections.abc import Sequence

from tightrope.server.replies.events import CallArguments, CallBegin, CallEnd, Event, Reply
from tightrope.server.replies.form import ReplyPlan

Calls = list[tuple[str, str]]
Read = tuple[str, str, Calls]


def events_of(plan: ReplyPlan, pieces: Sequence[str], *, is_cut: bool = False) -> list[Event]:
    """The events of a text that comes in these pieces."""
    reader = plan.reader()
    assert reader is not None
    return [*(event for piece in pieces for event in reader.feed(piece)), *reader.finish(is_cut=is_cut)]


def joined(events: Sequence[Event]) -> Read:
    """Thoughts, content and calls; checks that calls are told in order."""
    num_open, num_begun = 0, 0
    for event in events:
        match event:
            case CallBegin(index=index):
                assert (index, num_open) == (num_begun, 0), "a call begins within another"
                num_open, num_begun = 1, num_begun + 1
            case CallArguments(index=index):
                assert (index, num_open) == (num_begun - 1, 1), "arguments outside of their call"
            case CallEnd(index=index):
                assert (index, num_open) == (num_begun - 1, 1), "an end without a beginning"
                num_open = 0
            case _:
                assert num_open == 0, "text within a call"
                assert event.text, "an empty piece"
    assert num_open == 0, "a call without an end"
    reply = Reply.of(events)
    return reply.thought, reply.content, [(call.name, call.arguments) for call in reply.calls]


def read(plan: ReplyPlan, text: str, *, is_cut: bool = False) -> Read:
    """A text read whole, and a character at a time, which must be the same."""
    whole = joined(events_of(plan, [text], is_cut=is_cut))
    assert joined(events_of(plan, list(text), is_cut=is_cut)) == whole, text
    return whole
