"""Thoughts before an answer: which marks a template has for them, where a prompt has left off, and their reader.

Sources of the marks: the model cards and chat templates of DeepSeek-R1, Qwen3, GLM-4.5 and MiniMax-M2 (`<think>`),
Magistral (`[THINK]`), Gemma 4 (a channel named thought), Seed-OSS, EXAONE Deep, Kimi-VL, Command A Reasoning.
"""

import re
from dataclasses import dataclass
from typing import Literal

from tightrope.server.replies.events import Content, Thought
from tightrope.server.replies.reader import Reader, Steps, Trimmed


@dataclass(frozen=True, slots=True)
class ThoughtMarks:
    """The texts around thoughts."""

    opening: str
    closing: str
    token: str = ""  # The opening begins with this one, where it is more than a token.

    @property
    def tokens(self) -> tuple[str, str]:
        return self.token or self.opening, self.closing


MARKS = (
    ThoughtMarks("<think>", "</think>"),
    ThoughtMarks("[THINK]", "[/THINK]"),
    ThoughtMarks("<|channel>thought\n", "<channel|>", "<|channel>"),
    ThoughtMarks("<seed:think>", "</seed:think>"),
    ThoughtMarks("<thought>", "</thought>"),
    ThoughtMarks("◁think▷", "◁/think▷"),
    ThoughtMarks("<|START_THINKING|>", "<|END_THINKING|>"),
)

Place = Literal["outside", "inside", "behind"]  # Behind: the prompt itself has closed the thoughts.


def thought_marks(template: str) -> ThoughtMarks | None:
    """The marks that a template speaks of: the first pair that it names both of, else the first that it names one of.

    A template that only cuts thoughts from the history names the closing one alone, and one that only begins them the
    opening one. A template writes a line's end in Jinja's way, so it isn't looked for.
    """
    named = {marks: (marks.closing in template) + (marks.opening.rstrip() in template) for marks in MARKS}
    best = max(MARKS, key=named.__getitem__)
    return best if named[best] else None


def place_in(prompt: str, marks: ThoughtMarks, continued: str | None = None) -> Place:
    """Where an answer to the prompt begins; `continued` is the text of the message that it goes on with."""
    opening = marks.opening.rstrip()
    if continued is not None:
        opened, closed = continued.rfind(opening), continued.rfind(marks.closing)
        return "inside" if opened > closed else "behind" if closed >= 0 else "outside"
    end = prompt.rstrip()
    return "inside" if end.endswith(opening) else "behind" if end.endswith(marks.closing) else "outside"


class ThoughtReader(Reader):
    """Tells thoughts from the rest, which comes as content.

    Thoughts stand at the beginning of an answer, in one piece or several with nothing in between: a mark further on is
    text, as a model may well write about it. White space around thoughts is no part of anything.
    """

    def __init__(self, marks: ThoughtMarks, place: Place, *, goes_on: bool = False) -> None:
        """goes_on: the prompt ends in the midst of thoughts or words, so that a blank may come first."""
        self._marks, self._place, self._goes_on = marks, place, goes_on
        super().__init__()

    def read(self) -> Steps[None]:
        opening, is_inside = self._marks.opening.rstrip(), self._place == "inside"
        keeps_blanks, keeps_start = self._place == "outside" or self._goes_on, self._goes_on
        while True:
            if not is_inside:
                blanks = yield from self.take_blanks()
                if (yield from self.take_if(opening)) is None:
                    break
            if (yield from self.give_until([self._marks.closing], Trimmed(Thought, keeps_start=keeps_start))) is None:
                return
            is_inside = keeps_blanks = keeps_start = False
        if blanks and keeps_blanks and (self.held or not self.is_cut):
            yield Content(blanks)
        yield from self.give_until(())


_SWITCHES = re.compile(r"\b(enable_thinking|thinking|reasoning_effort)\b")


def switches(template: str) -> frozenset[str]:
    """The variables by which a template is told whether, and how much, to think."""
    return frozenset(_SWITCHES.findall(template))
