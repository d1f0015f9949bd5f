"""Turns of content blocks as the messages of a chat."""

from collections.abc import Sequence
from typing import Any

from tightrope.engine.errors import InvalidRequest
from tightrope.server.chats.requests import Message
from tightrope.server.chats.sealed_thoughts import unsealed
from tightrope.server.dialects.anthropic.bodies import ContentBlock, TextBlock, Turn
from tightrope.server.fields.names import Bent

FAILED = "Error: "  # It stands before the result of a tool that has failed.
_BILLING = "x-anthropic-billing-header:"  # Claude Code puts this first; it is new each time, and no word to a model.

Json = dict[str, Any]
Content = str | list[Json]  # One text, or parts of text.


class _Chat:
    """Messages that grow turn by turn."""

    def __init__(self) -> None:
        self.made: list[Json] = []
        self.bent: list[Bent] = []
        self._names: dict[str, str] = {}  # Of called functions, by the ids of calls.

    def system(self, blocks: Sequence[TextBlock]) -> None:
        texts = [_text(block, f"system[{index}]") for index, block in enumerate(blocks)]
        if texts and texts[0].startswith(_BILLING):
            texts = texts[1:]
            self.bent.append(("system[0]", "left out: it is a client's word to its own server"))
        if texts:
            self.made.append({"role": "system", "content": _content(texts)})

    def add(self, turn: Turn, place: str) -> None:
        if turn.role == "assistant":
            self._assistant(turn.content, place)
            return
        texts: list[str] = []
        for index, block in enumerate(turn.content):
            if turn.role == "user" and block.type == "tool_result":
                self._said(turn.role, texts)
                texts = []
                self._result(block, f"{place}.content[{index}]")
            elif block.type == "document":
                texts.append(_document(block, f"{place}.content[{index}]"))
            else:
                texts.append(_text(block, f"{place}.content[{index}]"))
        self._said(turn.role, texts, is_whole=not any(block.type == "tool_result" for block in turn.content))

    def _said(self, role: str, texts: Sequence[str], *, is_whole: bool = False) -> None:
        if texts or is_whole:
            self.made.append({"role": role, "content": _content(texts)})

    def _result(self, block: ContentBlock, place: str) -> None:
        texts = [_text(piece, f"{place}.content[{index}]") for index, piece in enumerate(block.content or ())]
        if block.is_error:
            texts = [FAILED + "".join(texts[:1]), *texts[1:]]
            self.bent.append((f"{place}.is_error", f"{FAILED!r} stands in front"))
        call_id = _required(block.tool_use_id, f"{place}.tool_use_id")
        made: Json = {"role": "tool", "tool_call_id": call_id, "content": _content(texts)}
        if (name := self._names.get(call_id)) is not None:
            made["name"] = name
        self.made.append(made)

    def _assistant(self, blocks: Sequence[ContentBlock], place: str) -> None:
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[Json] = []
        for index, block in enumerate(blocks):
            here = f"{place}.content[{index}]"
            if block.type == "thinking":
                thoughts.append(block.thinking or unsealed(block.signature or "") or "")
            elif block.type == "redacted_thinking":
                self.bent.append((here, "left out: another server has encrypted it"))
            elif block.type == "tool_use":
                calls.append(self._call(block, here))
            else:
                texts.append(_text(block, here))
        made: Json = {"role": "assistant", "content": _content(texts)}
        if thought := "\n\n".join(filter(None, thoughts)):
            made["reasoning_content"] = thought
        if calls:
            made["tool_calls"] = calls
        self.made.append(made)

    def _call(self, block: ContentBlock, place: str) -> Json:
        call_id, name = _required(block.id, f"{place}.id"), _required(block.name, f"{place}.name")
        self._names[call_id] = name
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": block.input or {}}}


def _text(block: TextBlock, place: str) -> str:
    if block.type != "text":
        raise InvalidRequest(f"{place}: this model takes text alone, no block of type {block.type[:40]!r}", place)
    return _required(block.text, f"{place}.text")


def _document(block: ContentBlock, place: str) -> str:
    """What a document of text says, behind its title. Raises InvalidRequest for one that is no text."""
    source = block.source or {}
    kind, told = source.get("type"), source.get("data")
    if kind == "content":
        pieces = source.get("content")
        pieces = pieces if isinstance(pieces, list) else [pieces]
        texts = [piece.get("text") if isinstance(piece, dict) else piece for piece in pieces]
        known = [text for text in texts if isinstance(text, str)]
        told = "\n".join(known) if len(known) == len(texts) else None
    if kind not in ("text", "content") or not isinstance(told, str):
        raise InvalidRequest(f"{place}: this model takes text alone, no document whose source is {kind!r:.40}", place)
    return "\n\n".join(filter(None, (block.title, block.context, told)))


def _required(value: str | None, place: str) -> str:
    if value is None:
        raise InvalidRequest(f"{place}: field required", place)
    return value


def _content(texts: Sequence[str]) -> Content:
    if len(texts) > 1:
        return [{"type": "text", "text": text} for text in texts]
    return "".join(texts)


def chat_of(system: Sequence[TextBlock], turns: Sequence[Turn]) -> tuple[list[Message], list[Bent]]:
    """The messages, and what of the turns was taken for what it plainly means. Raises InvalidRequest."""
    chat = _Chat()
    chat.system(system)
    for place, turn in enumerate(turns):
        chat.add(turn, f"messages[{place}]")
    return [Message.model_validate(message) for message in chat.made], chat.bent


def goes_on(turns: Sequence[Turn]) -> bool:
    """Whether the answer is to go on with a text that the client has begun for the assistant."""
    last = turns[-1]
    kinds = {block.type for block in last.content}
    return last.role == "assistant" and "text" in kinds and "tool_use" not in kinds
