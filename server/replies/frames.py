"""Grammars around an answer's own: thoughts may stand before it, so many tokens of them and no more.

In a frame, `@answer` stands for the grammar that the answer itself has.
"""

from tightrope.server.replies import harmony
from tightrope.server.replies.lark import REST, Spelling, beginning_with, literal
from tightrope.server.replies.thoughts import Place, ThoughtMarks

_GAP = r"/\n{0,2}/"  # It stands between thoughts and an answer that has a grammar.


def thought_frame(marks: ThoughtMarks, place: Place, spelling: Spelling, budget: int | None) -> str:
    """Around an answer that may begin with thoughts, of `budget` tokens at most; None is no limit, 0 is none at all."""
    closing = f"{spelling.of(marks.closing)} {_GAP}"
    thought = _thought(marks.closing, spelling, budget)
    if place == "inside":
        return f"start: {'thought' if thought else ''} {closing} @answer\n{thought}"
    if not thought or place == "behind":
        return ""
    return f"start: ({spelling.of(marks.opening)} thought {closing})? @answer\n{thought}"


def harmony_frame(spelling: Spelling, budget: int | None, *, goes_on: bool, is_final: bool) -> str:
    """The same for harmony. is_final: the answer is the text of the final message, and not messages of its own."""
    if goes_on:
        return ""
    final = spelling.of(f"{harmony.CHANNEL}final{harmony.MESSAGE}") if is_final else ""
    thought = _thought(harmony.END, spelling, budget)
    if not thought:
        return f"start: {final} @answer" if final else ""
    before = spelling.of(f"{harmony.CHANNEL}analysis{harmony.MESSAGE}")
    behind = spelling.of(f"{harmony.END}{harmony.START}assistant")
    return f"start: ({before} thought {behind})? {final} @answer\n{thought}"


def free_answer(marks: ThoughtMarks | None, spelling: Spelling) -> str:
    """Lark for an answer without a grammar of its own, so that only its thoughts are bounded."""
    if marks is None:
        start = spelling.of(harmony.CHANNEL)
        text = f"FREE: {REST} & ~{beginning_with('analysis')}"
        tokens = " | ".join(f"<[{token_id}]>" for token_id in spelling.ids.values())
        again = f"(({tokens}) TEXT)*" if tokens else ""
        return f"start: {start} FREE {again}\n{text}\nTEXT: {REST}"
    return spelling.free(besides=marks.tokens[0])


def _thought(closing: str, spelling: Spelling, budget: int | None) -> str:
    """The rule for thoughts up to the mark; none where there may be none."""
    if budget == 0:
        return ""
    limits = [] if budget is None else [f"max_tokens={budget}"]
    if not spelling.is_token(closing):
        limits.append(f"stop={literal(closing)}")
    attributes = f"[{', '.join(limits)}]" if limits else ""
    return f"thought{attributes}: {REST}"
