"""The items of a conversation as the messages of a chat.

What the model has said in one go comes as several items: thoughts, a text, calls. They are one message of the assistant
again, since that is what chat templates know.
"""

from collections.abc import Sequence
from typing import Any

from tightrope.engine.errors import InvalidRequest
from tightrope.server.chats.custom_tools import arguments_of
from tightrope.server.chats.messages import TEXT_TYPES
from tightrope.server.chats.requests import ContentPart, Message
from tightrope.server.chats.sealed_thoughts import unsealed
from tightrope.server.dialects.responses.requests import InputItem
from tightrope.server.fields.names import Bent

NOT_STORED = (
    "no answer is stored by this server, so that the whole conversation has to come with each request; "
    "clients do so with store: false"
)


class _Chat:
    """Messages that grow item by item."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.bent: list[Bent] = []
        self._said: dict[str, Any] = {}  # What the assistant is saying.
        self._names: dict[str, str] = {}  # Of called functions, by the ids of calls.

    def add(self, item: InputItem, place: str) -> None:
        match item.type:
            case "message":
                self._message(item, place)
            case "function_call":
                self._call(item, place, item.arguments or "{}")
            case "custom_tool_call":
                self._call(item, place, arguments_of(_required(item.input, f"{place}.input")))
            case "function_call_output" | "custom_tool_call_output":
                self._output(item, place)
            case "reasoning":
                self._reasoning(item, place)
            case "item_reference":
                raise InvalidRequest(f"{place}: {NOT_STORED}", place)
            case other:
                known = "message, reasoning, function_call and custom_tool_call, their _output"
                raise InvalidRequest(f"{place}: there are items of type {known}, not {other!r:.40}", place)

    def end(self) -> list[dict[str, Any]]:
        self._close()
        return self.made

    def _close(self) -> None:
        if self._said:
            self.made.append({"role": "assistant", **self._said})
        self._said = {}

    def _say(self, key: str, text: str | list[dict[str, str]]) -> None:
        """Add a text to the assistant's message; to a new one, if that of before has it or more already.

        Between calls and their outputs there can't be another message.
        """
        if "tool_calls" not in self._said and ("content" in self._said or key in self._said):
            self._close()
        if key in self._said:
            text = "\n\n".join(filter(None, (_plain(self._said[key]), _plain(text))))
        self._said[key] = text

    def _message(self, item: InputItem, place: str) -> None:
        if item.role is None:
            raise InvalidRequest(f"{place}.role: field required", f"{place}.role")
        content = self._content(item.content, f"{place}.content")
        if item.role == "assistant":
            self._say("content", content)
        else:
            self._close()
            self.made.append({"role": item.role, "content": content})

    def _call(self, item: InputItem, place: str, arguments: str | dict[str, Any]) -> None:
        name, call_id = _required(item.name, f"{place}.name"), _required(item.call_id, f"{place}.call_id")
        self._names[call_id] = name
        function = {"name": name, "arguments": arguments}
        calls = self._said.setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": function})

    def _output(self, item: InputItem, place: str) -> None:
        self._close()
        call_id = _required(item.call_id, f"{place}.call_id")
        if isinstance(item.output, str) and item.output != item.given["output"]:
            self.bent.append((f"{place}.output", "taken as its JSON text"))
        made = {"role": "tool", "tool_call_id": call_id, "content": self._content(item.output, f"{place}.output")}
        if (name := item.name or self._names.get(call_id)) is not None:
            made["name"] = name
        self.made.append(made)

    def _reasoning(self, item: InputItem, place: str) -> None:
        thought = _plain(self._content(item.content, f"{place}.content", "reasoning_text"))
        if not thought and item.encrypted_content:
            found = unsealed(item.encrypted_content)
            if found is None:
                self.bent.append((f"{place}.encrypted_content", "left out: another server has encrypted it"))
            thought = found or ""
        if not thought:
            thought = "\n\n".join(piece.text for piece in item.summary or ())
        if thought:
            self._say("reasoning_content", thought)

    def _content(
        self, content: str | Sequence[ContentPart] | None, place: str, *types: str
    ) -> str | list[dict[str, str]]:
        """A text, or parts of text; types: of further parts that are text. Raises InvalidRequest for others."""
        if content is None or isinstance(content, str):
            return content or ""
        parts = [_text(part, f"{place}[{index}]", types) for index, part in enumerate(content)]
        return parts[0] if len(parts) == 1 else [{"type": "text", "text": text} for text in parts]


def _plain(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _text(part: ContentPart, place: str, types: Sequence[str]) -> str:
    if part.type == "refusal":
        return part.refusal or part.text or ""
    if part.type not in TEXT_TYPES and part.type not in types:
        raise InvalidRequest(f"{place}: this model takes text alone, no part of type {part.type[:40]!r}", place)
    return _required(part.text, f"{place}.text")


def _required(value: str | None, place: str) -> str:
    if value is None:
        raise InvalidRequest(f"{place}: field required", place)
    return value


def chat_of(instructions: str | None, given: str | Sequence[InputItem]) -> tuple[list[Message], list[Bent]]:
    """The messages, and what of the items was taken for what it plainly means. Raises InvalidRequest."""
    chat = _Chat()
    if instructions:
        chat.made.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        chat.made.append({"role": "user", "content": given})
    else:
        for place, item in enumerate(given):
            chat.add(item, f"input[{place}]")
    made = chat.end()
    if len(made) <= bool(instructions):
        raise InvalidRequest("input: must not be empty", "input")
    return [Message.model_validate(message) for message in made], chat.bent
