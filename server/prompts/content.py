"""The content of a chat's messages: a text, or a list of parts of text, as the API has them."""

from collections.abc import Callable, Collection
from typing import Any

Message = dict[str, Any]  # A template sees role, content, and what else the request says.


def pieces(message: Message) -> list[str]:
    """The texts of a message, one for each part; none where it has no content."""
    content = message.get("content")
    if isinstance(content, list):
        return [part["text"] for part in content]
    return [] if content is None else [content]


def text_of(message: Message) -> str:
    """The content as one text."""
    return "\n".join(pieces(message))


def with_text(message: Message, change: Callable[[str], str]) -> Message:
    """The message with its text changed, of several parts the last one's."""
    content = message.get("content")
    if isinstance(content, list) and content:
        return message | {"content": [*content[:-1], content[-1] | {"text": change(content[-1]["text"])}]}
    return message | {"content": change(text_of(message))}


def in_shape(message: Message, shapes: Collection[str], *, joins_parts: bool = False) -> Message:
    """The message as it is if its content is of one of these shapes, "text" and "parts"; or else in the other one.

    joins_parts: several parts become one, or the text that they are together.
    """
    content = message.get("content")
    if joins_parts and isinstance(content, list) and len(content) > 1:
        content = text_of(message)
    if content is None or ("parts" if isinstance(content, list) else "text") in shapes:
        return message | {"content": content} if "content" in message else message
    text = text_of(message | {"content": content})
    return message | {"content": text if "text" in shapes else [{"type": "text", "text": text}]}
