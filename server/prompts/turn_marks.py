"""Which tokens a chat template writes around turns.

A file's flags don't tell it: many tunes have `<|im_end|>` in their vocabulary as a piece that its user defined, or add
it without saying that it is special. The template does: what stands behind the words of the assistant ends its turn.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from tightrope.backends.plain_text import WORDS
from tightrope.engine.types import ModelInfo, TurnMarks
from tightrope.server.http.errors import TemplateFailed
from tightrope.server.prompts.template_probe import TOOL
from tightrope.server.prompts.template_renderer import TemplateRenderer
from tightrope.server.prompts.templates import ChatTemplate

Role = Literal["system", "user", "assistant"]

_ROLE_WORD = re.compile(r"[\w:./-]{1,32}\s*")  # "user\n" stands between marks; a sentence is none.
_ASSISTANT = re.compile("assistant|bot|model|gpt", re.IGNORECASE)
# ends of turns where a turn has several messages: in OpenAI's harmony format, and in Solar's
_SEVERAL_MESSAGES = ({"<|return|>", "<|call|>"}, {"<|flush|>", "<|calls|>"})
_CHAT: tuple[tuple[Role, str], ...] = (
    ("system", "Hornbeam"),
    ("user", "Sycamore"),
    ("assistant", "Whitethorn"),
    ("user", "Buckthorn"),
    ("assistant", "Rowanberry"),
)


@dataclass(frozen=True, slots=True)
class Gap:
    """What a template writes between the words of one message and of the next; None at the ends of the chat."""

    before: Role | None  # The words of this role stand before it.
    text: str
    after: Role | None


def gaps(rendered: str, words: Sequence[tuple[Role, str]]) -> list[Gap]:
    """A rendered chat cut at its messages' words, as far as they are there in this order."""
    found: list[Gap] = []
    before: Role | None = None
    start = 0
    for role, text in words:
        place = rendered.find(text, start)
        if place < 0:
            continue
        found.append(Gap(before, rendered[start:place], role))
        before, start = role, place + len(text)
    return [*found, Gap(before, rendered[start:], None)]


@contextmanager
def choosable() -> Iterator[None]:
    """Tell what can be done about a template that fails."""
    try:
        yield
    except TemplateFailed as error:
        raise TemplateFailed(f"{error.message}; choose another with --chat-template") from None


async def checked_turn_marks(renderer: TemplateRenderer, template: ChatTemplate, info: ModelInfo) -> TurnMarks:
    """The same as `find_turn_marks`. Raises TemplateFailed if the template, which may be anybody's, reaches too far."""
    with choosable():
        for source in template.sources:
            await renderer.check(source)
    return await find_turn_marks(renderer, template, info)


async def find_turn_marks(renderer: TemplateRenderer, template: ChatTemplate, info: ModelInfo) -> TurnMarks:
    """The marks that the templates write around the messages of a chat; none if they take no plain messages."""
    unknown = {*info.added_texts, *info.special_texts} - {*info.end_texts, info.bos_token}
    if not unknown:
        return TurnMarks()
    found: list[Gap] = []
    for source in template.sources:
        tools = () if source == template.source else (TOOL,)
        found += await _rendered_gaps(renderer, template, tools)
    return turn_marks(found, info)


async def _rendered_gaps(
    renderer: TemplateRenderer, template: ChatTemplate, tools: Sequence[Mapping[str, Any]]
) -> list[Gap]:
    """Those of the longest chat that the template takes."""
    for words in (_CHAT, _CHAT[1:], _CHAT[:-1], _CHAT[1:-1], _CHAT[1:2]):
        messages = [{"role": role, "content": text} for role, text in words]
        try:
            prompt = await template.render(
                renderer, messages, add_generation_prompt=False, continue_final_message=False, tools=tools
            )
        except TemplateFailed:
            continue
        return gaps("".join(span.text for span in prompt.spans), words)
    return []


def turn_marks(found: Iterable[Gap], info: ModelInfo) -> TurnMarks:
    """The marks in the gaps, each one token of the vocabulary.

    An end is what stands behind an assistant's words. In front of them only what names the assistant is a mark: other
    tokens there, such as `<think>`, belong to the answer. Words, headings and blanks are none, even if they are one
    token.
    """
    every = list(found)
    candidates = _candidates(info, "\0".join(gap.text for gap in every))
    if not candidates:
        return TurnMarks()
    pattern = re.compile(f"({'|'.join(map(re.escape, candidates))})")
    cut = [(gap, pattern.split(gap.text)) for gap in every]  # Text and marks take turns in it.
    ends = {mark for gap, pieces in cut if gap.before == "assistant" for mark in _first_mark(pieces)}
    behind = ends | {mark for gap, pieces in cut if gap.before is not None for mark in _first_mark(pieces)}
    before = {mark for gap, pieces in cut if gap.after in ("system", "user") for mark in _opening(pieces, behind)}
    named = {
        mark for gap, pieces in cut if gap.after == "assistant" for mark in pieces[1::2] if _ASSISTANT.search(mark)
    }
    if any(turn_ends <= {*info.special_texts, *info.added_texts} for turn_ends in _SEVERAL_MESSAGES):
        ends.discard("<|end|>")  # There it ends one of the messages of a turn.
    added = (behind | before | named) & set(info.added_texts)
    return TurnMarks(tuple(sorted(added)), tuple(sorted(ends - set(info.end_texts))))


def _candidates(info: ModelInfo, text: str) -> list[str]:
    """The tokens in the text that may be marks, the longest first."""
    every = (token for token in (*info.special_texts, *info.added_texts) if not WORDS.fullmatch(token))
    return sorted({token for token in every if token in text}, key=len, reverse=True)


def _first_mark(pieces: Sequence[str]) -> set[str]:
    """The mark that follows words directly, or behind blanks."""
    return {pieces[1]} if len(pieces) > 1 and not pieces[0].strip() else set()


def _opening(pieces: Sequence[str], behind: Collection[str]) -> set[str]:
    """The marks in front of words, back past one role's name such as "user", to the end of the turn before."""
    marks: set[str] = set()
    may_be_role = True
    for index, piece in enumerate(reversed(pieces)):
        if index % 2:
            marks.add(piece)
            if piece in behind:
                break
        elif piece.strip():
            if not may_be_role or not _ROLE_WORD.fullmatch(piece):
                break
            may_be_role = False
    return marks
