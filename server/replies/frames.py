"""Grammars around an answer's own: thoughts may stand before it, so many tokens of them and no more.

In a frame, `@answer` stands for the grammar that the answer itself has.
"""

from tightrope.engine.errors import InvalidRequest
from tightrope.server.replies import harmony
from tightrope.server.replies.lark import REST, Spelling, beginning_with, quoted
from tightrope.server.replies.thoughts import Place, ThoughtMarks

BUDGET = "thinking_token_budget"  # The field that bounds thoughts.
_GAP = r"/\n{0,2}/"  # It stands between thoughts and an answer that has a grammar.


def thought_frame(marks: ThoughtMarks, place: Place, spelling: Spelling, budget: int | None) -> str:
    """Around an answer that may begin with thoughts, of `budget` tokens at most; None is no limit, 0 is none at all."""
    inside, rules = _thought(marks.closing, spelling, budget)
    if place == "inside":
        return f"start: {inside} {_GAP} @answer\n{rules}"
    if budget == 0 or place == "behind":
        return ""
    return f"start: ({spelling.of(marks.opening)} {inside} {_GAP})? @answer\n{rules}"


def harmony_frame(spelling: Spelling, budget: int | None, *, goes_on: bool, is_final: bool) -> str:
    """The same for harmony. is_final: the answer is the text of the final message, and not messages of its own."""
    if goes_on:
        return ""
    final = spelling.of(f"{harmony.CHANNEL}final{harmony.MESSAGE}") if is_final else ""
    if budget == 0:
        return f"start: {final} @answer" if final else ""
    inside, rules = _thought(harmony.END, spelling, budget)
    before = spelling.of(f"{harmony.CHANNEL}analysis{harmony.MESSAGE}")
    behind = spelling.of(f"{harmony.START}assistant")
    return f"start: ({before} {inside} {behind})? {final} @answer\n{rules}"


def free_answer(marks: ThoughtMarks | None, spelling: Spelling) -> str:
    """Lark for an answer without a grammar of its own, so that only its thoughts are bounded."""
    if marks is None:
        start = spelling.of(harmony.CHANNEL)
        text = f"FREE: {REST} & ~{beginning_with('analysis')}"
        tokens = " | ".join(f"<[{token_id}]>" for token_id in spelling.ids.values())
        again = f"(({tokens}) TEXT)*" if tokens else ""
        return f"start: {start} FREE {again}\n{text}\nTEXT: {REST}"
    return spelling.free(besides=marks.tokens[0])


def _thought(closing: str, spelling: Spelling, budget: int | None) -> tuple[str, str]:
    """Lark for thoughts up to the mark and the mark itself, and the rules for it. Raises InvalidRequest.

    The library's own `stop` isn't used: it breaks down at marks of several tokens.
    """
    if budget == 0:
        return spelling.of(closing), ""
    limit = "" if budget is None else f"[max_tokens={budget}]"
    if spelling.is_token(closing):
        return f"thought {spelling.of(closing)}", f"thought{limit}: {REST}"
    if closing in spelling.others:
        return (
            f"thought <[{spelling.others[closing]}]>",
            f"thought{limit}: THOUGHT\nTHOUGHT: {REST} & ~/(?s:.*){quoted(closing)}(?s:.*)/",
        )
    if budget is not None:
        raise InvalidRequest(f"{BUDGET}: {closing} is not one token of this model", BUDGET)
    return "thought", f"thought[lazy]: /(?s:.*){quoted(closing)}/"
