"""One request's answers: how they are to be read, and by which grammar they are held to what was asked."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace as with_fields

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.protocol import Engine
from tightrope.engine.types import Grammar, Span, TextPrompt, Token
from tightrope.server.replies.form import ReplyForm, ReplyPlan, Thoughts
from tightrope.server.replies.frames import BUDGET, free_answer, harmony_frame, thought_frame
from tightrope.server.replies.lark import Spelling
from tightrope.server.replies.thoughts import place_in


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request says of thoughts."""

    thoughts: Thoughts = "apart"
    effort: str | None = None
    enabled: bool | None = None
    budget: int | None = None  # In tokens.
    is_off: bool = False  # The template was told not to think, by these or by variables of its own.

    @property
    def named(self) -> list[str]:
        """The fields by which a template is told."""
        given = {"reasoning_effort": self.effort, "enable_thinking": self.enabled}
        return [name for name, value in given.items() if value is not None]


def thinking_variables(form: ReplyForm, wishes: Wishes) -> dict[str, Any]:
    """The variables by which a template is told to think, or not to; effort "none" is not to."""
    variables: dict[str, Any] = {}
    enabled = wishes.enabled
    if wishes.effort is not None:
        enabled = wishes.effort != "none" if enabled is None else enabled
        known = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"} if form.is_harmony else {}
        variables["reasoning_effort"] = known.get(wishes.effort, wishes.effort)
    if enabled is not None:
        variables |= {"enable_thinking": enabled, "thinking": enabled}
    return variables


def plan_reply(form: ReplyForm, wishes: Wishes, prompt: str, continued: str | None = None) -> ReplyPlan:
    """How answers to a prompt are read; continued: the text of the message that it ends in, where it ends in one.

    Raises InvalidRequest for a budget where there are no thoughts.
    """
    if wishes.budget is not None and not form.has_thoughts:
        raise InvalidRequest(f"{BUDGET}: the chat template knows no thoughts", BUDGET)
    place = "outside" if form.thoughts is None else place_in(prompt, form.thoughts, continued)
    return ReplyPlan(form, place, wishes.thoughts, goes_on=continued is not None)


async def find_spelling(engine: Engine, marks: Sequence[str], adapter: str | None) -> Spelling:
    """Which of the marks are one token of the vocabulary."""

    async def tokens_of(mark: str) -> list[Token]:
        return list(await engine.tokenize(TextPrompt((Span(mark),), add_bos=False), adapter))

    found = zip(marks, await asyncio.gather(*map(tokens_of, marks)), strict=True)
    single = [(mark, tokens[0]) for mark, tokens in found if len(tokens) == 1]
    return Spelling(
        {mark: token.token_id for mark, token in single if token.is_special},
        {mark: token.token_id for mark, token in single if not token.is_special},
    )


def framed(
    plan: ReplyPlan, wishes: Wishes, grammar: Grammar | None, spelling: Spelling, *, is_final: bool
) -> Grammar | None:
    """The grammar with room for thoughts in front; one for thoughts alone where only they are bounded.

    is_final: it speaks of what the reader is told, as a response_format does, and not of calls.
    """
    form = plan.form
    if (grammar is None and wishes.budget is None) or not form.has_thoughts:
        return grammar
    is_final = is_final and grammar is not None
    budget = 0 if wishes.is_off and plan.place != "inside" else wishes.budget
    if form.thoughts is None:
        frame = harmony_frame(spelling, budget, goes_on=plan.goes_on, is_final=is_final)
    else:
        frame = thought_frame(form.thoughts, plan.place, spelling, budget)
    if grammar is None:
        grammar = Grammar("lark", free_answer(form.thoughts, spelling), BUDGET)
    return with_fields(grammar, frame=frame)
