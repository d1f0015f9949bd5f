"""OpenAI's harmony: an answer is several messages, each in a channel, some of them to a tool.

`<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>`; a call goes to
`functions.NAME` in the commentary channel and ends with `<|call|>`. The channel comes before the recipient or after it.

Source: OpenAI, "OpenAI harmony response format".
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from tightrope.engine.guided.json_schema import lark_of_schema
from tightrope.server.replies.call_ids import CallId, long_id
from tightrope.server.replies.calls.form import CallForm, Functions, alternatives, arguments_schema
from tightrope.server.replies.events import CallArguments, CallBegin, CallEnd, Content, Thought
from tightrope.server.replies.lark import REST, Spelling, literal, quoted
from tightrope.server.replies.reader import Reader, Steps

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKS = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN)
_ENDS = (END, CALL, RETURN, START, CHANNEL)
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")


def speaks_harmony(template: str) -> bool:
    """Whether a template writes messages in channels."""
    return CHANNEL in template and MESSAGE in template


class HarmonyReader(Reader):
    """Reads the messages of one answer; the prompt has begun the first, up to the name of the assistant.

    Analysis is thought. Words in the commentary channel that go to nobody are for the reader. A message to a tool that
    wasn't offered is a thought.
    """

    def __init__(self, names: Collection[str] = (), made_id: CallId = long_id, *, goes_on: bool = False) -> None:
        """goes_on: the prompt has begun the text of the final message as well."""
        self._names, self._made_id, self._goes_on = names, made_id, goes_on
        self._num_calls = 0
        super().__init__()

    def read(self) -> Steps[None]:
        mark: str | None = None
        if self._goes_on or (mark := (yield from self.take_if(CHANNEL, START, " to=", MESSAGE))) is None:
            mark = yield from self.give_until(_ENDS)
        while mark is not None:
            if mark in (CHANNEL, " to=", MESSAGE, START):
                mark = yield from self._message(mark)
            else:
                mark = yield from self._between()

    def _between(self) -> Steps[str | None]:
        """Behind a message: what is no message is left out."""
        _, mark = yield from self.take_until(START, CHANNEL)
        return mark

    def _message(self, mark: str) -> Steps[str | None]:
        """One message, of which a mark was read; returns the mark that ends it."""
        header, found = ("", MESSAGE) if mark == MESSAGE else (yield from self.take_until(MESSAGE))
        if found is None:
            return None
        header = mark + header
        recipient, channel = _RECIPIENT.search(header), _CHANNEL_NAME.search(header)
        name = None if recipient is None else recipient[1]
        if name in self._names and name is not None:
            index, self._num_calls = self._num_calls, self._num_calls + 1
            yield CallBegin(index, self._made_id(name, index), name)
            end = yield from self.give_until(_ENDS, lambda text: CallArguments(index, text))
            yield CallEnd(index)
            return end
        is_thought = name is not None or (channel is not None and channel[1] == "analysis")
        return (yield from self.give_until(_ENDS, Thought if is_thought else Content))


@dataclass(frozen=True, slots=True)
class HarmonyCalls(CallForm):
    """A call is the last message of an answer, so there is one at most."""

    @property
    def marks(self) -> tuple[str, ...]:
        return MARKS

    def reader(self, functions: Functions, made_id: CallId) -> HarmonyReader:
        return HarmonyReader(functions, made_id)

    def rules(self, functions: Functions, spelling: Spelling, *, one_call: bool, is_compact: bool) -> str:
        head = spelling.of(f" {CONSTRAIN}json{MESSAGE}")
        bodies = [
            f"{literal(name)} {head} {lark_of_schema(arguments_schema(schema), is_compact=is_compact)}"
            for name, schema in functions.items()
        ]
        return f'calls: "commentary to=functions." call\n{alternatives("call", bodies)}'

    def free(self, functions: Functions, spelling: Spelling, *, one_call: bool) -> str:
        channel, message = spelling.of(CHANNEL), spelling.of(MESSAGE)
        again = spelling.of(f"{END}{START}assistant")
        rules = self.rules(functions, spelling, one_call=one_call, is_compact=False)
        if spelling.is_token(END):
            before = f"BODY {again}"
        else:
            before = "ended"
            rules += f"\nended[lazy]: /(?s:.*){quoted(f'{END}{START}assistant')}/"
        return "\n".join(
            (
                f"start: ({channel} HEADER {message} {before})* {channel} (calls | HEADER {message} BODY)",
                r"HEADER: /[^<]*/ & ~/[^<]*to=functions[^<]*/",
                f"BODY: {REST}",
                rules,
            )
        )


HARMONY = HarmonyCalls(CHANNEL)
