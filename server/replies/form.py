"""How a model writes its answers: found in the text of its chat template, never in its name."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from tightrope.server.replies import harmony
from tightrope.server.replies.call_ids import CallId, short_id, wants_short_ids
from tightrope.server.replies.calls.find import call_form
from tightrope.server.replies.calls.form import CallForm, Functions
from tightrope.server.replies.events import CallArguments, CallBegin, CallEnd, CallInput, Content, Event, Reply, Thought
from tightrope.server.replies.harmony import HarmonyReader, speaks_harmony
from tightrope.server.replies.input_text import InputText
from tightrope.server.replies.reader import Reader
from tightrope.server.replies.thoughts import Place, ThoughtMarks, ThoughtReader, switches, thought_marks

Thoughts = Literal["apart", "dropped", "in the text"]  # What becomes of them.


@dataclass(frozen=True, slots=True)
class ReplyForm:
    """The marks of one template."""

    thoughts: ThoughtMarks | None
    is_harmony: bool
    switches: frozenset[str]  # By these variables the template is told whether to think.
    calls: CallForm
    made_id: CallId

    @property
    def has_thoughts(self) -> bool:
        return self.is_harmony or self.thoughts is not None

    def marks(self, *, has_calls: bool) -> tuple[str, ...]:
        """Texts of the tokens that parts of an answer are told by, with calls or without."""
        if self.is_harmony:
            return harmony.MARKS
        thoughts = () if self.thoughts is None else self.thoughts.tokens
        return (*thoughts, *(self.calls.marks if has_calls else ()))


@lru_cache(maxsize=8)
def reply_form(template: str) -> ReplyForm:
    """How a model with this template writes."""
    is_harmony = speaks_harmony(template)
    calls = harmony.HARMONY if is_harmony else call_form(template)
    return ReplyForm(
        None if is_harmony else thought_marks(template),
        is_harmony,
        switches(template),
        calls,
        short_id if wants_short_ids(template) else calls.made_id,
    )


@dataclass(frozen=True, slots=True)
class ReplyPlan:
    """How the answers to one prompt are read."""

    form: ReplyForm
    place: Place  # Where among thoughts the prompt ends.
    thoughts: Thoughts = "apart"
    goes_on: bool = False  # The prompt ends inside a message.
    functions: Functions | None = None  # These may be called; None where none are looked for.
    one_call: bool = False
    custom: frozenset[str] = frozenset()  # These of the functions are called with a text.

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts of the tokens that an answer is told apart by."""
        return self.form.marks(has_calls=self.functions is not None)

    @property
    def reads_thoughts(self) -> bool:
        return self.thoughts != "in the text" and self.form.has_thoughts

    def reader(self) -> "ReplyReader | None":
        """For one answer; None where it is content from end to end."""
        if not self.reads_thoughts and self.functions is None:
            return None
        return ReplyReader(self)

    def whole(self, text: str, *, is_cut: bool) -> Reply:
        """A whole answer; is_cut: the model had more to say."""
        if (reader := self.reader()) is None:
            return Reply(text)
        return Reply.of((*reader.feed(text), *reader.finish(is_cut=is_cut)))


class ReplyReader:
    """Reads one answer: thoughts first, and calls in what is left."""

    def __init__(self, plan: ReplyPlan) -> None:
        form, functions = plan.form, plan.functions
        self._plan = plan
        self._thoughts: ThoughtReader | HarmonyReader | None = None
        self._calls: Reader | None = None
        if form.is_harmony:
            self._thoughts = HarmonyReader(functions or {}, form.made_id, goes_on=plan.goes_on)
        else:
            if plan.reads_thoughts and form.thoughts is not None:
                self._thoughts = ThoughtReader(form.thoughts, plan.place, goes_on=plan.goes_on)
            if functions is not None:
                self._calls = form.calls.reader(functions, form.made_id)
        self._input: InputText | None = None  # Of a custom tool's call that has begun.
        self.num_calls = 0

    def feed(self, text: str) -> list[Event]:
        """What is certain with some more text."""
        events: list[Event] = [Content(text)] if self._thoughts is None else list(self._thoughts.feed(text))
        return self._told(self._with_calls(events))

    def finish(self, *, is_cut: bool = False) -> list[Event]:
        """The rest, when no more text comes. is_cut: the model had more to say."""
        events = [] if self._thoughts is None else self._with_calls(self._thoughts.finish(is_cut=is_cut))
        return self._told([*events, *([] if self._calls is None else self._calls.finish(is_cut=is_cut))])

    def _with_calls(self, events: list[Event]) -> list[Event]:
        calls = self._calls
        if calls is None:
            return events
        return [
            made for event in events for made in (calls.feed(event.text) if isinstance(event, Content) else [event])
        ]

    def _told(self, events: list[Event]) -> list[Event]:
        """Those that the client is to get."""
        plan = self._plan
        told: list[Event] = []
        for event in events:
            match event:
                case Thought(text) if plan.thoughts != "apart":
                    told += [Content(text)] if plan.thoughts == "in the text" else []
                case CallBegin(index=index) | CallArguments(index=index) | CallEnd(index=index):
                    if index == 0 or not plan.one_call:
                        self.num_calls = index + 1
                        told += self._with_input(event)
                case _:
                    told.append(event)
        return told

    def _with_input(self, event: CallBegin | CallArguments | CallEnd) -> list[Event]:
        """The same event, or of a custom tool's call what it is instead."""
        match event:
            case CallBegin(index, call_id, name) if name in self._plan.custom:
                self._input = InputText()
                return [CallBegin(index, call_id, name, is_custom=True)]
            case CallArguments(index, text) if self._input is not None:
                return [CallInput(index, piece)] if (piece := self._input.feed(text)) else []
            case CallEnd(index) if self._input is not None:
                rest, self._input = self._input.finish(), None
                return [*([CallInput(index, rest)] if rest else []), event]
        return [event]
