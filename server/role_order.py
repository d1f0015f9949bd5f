"""Other orders of a chat's roles, for templates that refuse the one that a client sends.

Role-play clients open with several system messages and the character's greeting, and write system notes in between;
many templates take nothing but system, user, assistant, user and so on.
"""

from collections.abc import Iterator
from typing import Any

Message = dict[str, Any]

SEPARATOR = "\n\n"  # between texts that become one


def regular_orders(messages: list[Message]) -> Iterator[list[Message]]:
    """The same chat in stricter orders, the most faithful first; none if its order is regular already.

    First: one system message at the start, later ones as the user's, neighbours of one role joined, and an empty turn
    of the user before an assistant's opening. Then: the system text at the top of the user's first turn. A chat in
    regular order stays what it is, so a template without a system role still refuses it.
    """
    joined = _alternating(messages)
    if joined == messages:
        return
    yield joined
    if len(joined) > 1 and joined[0]["role"] == "system":
        system, user = joined[0], joined[1]
        yield [user | {"content": SEPARATOR.join(filter(None, (system["content"], user["content"])))}, *joined[2:]]


def _alternating(messages: list[Message]) -> list[Message]:
    made: list[Message] = []
    for message in messages:
        if message["role"] == "system" and any(m["role"] != "system" for m in made):
            message = message | {"role": "user"}
        if message["role"] == "assistant" and all(m["role"] == "system" for m in made):
            made.append({"role": "user", "content": ""})
        if made and _can_join(made[-1], message):
            made[-1] = made[-1] | {"content": f"{made[-1]['content']}{SEPARATOR}{message['content']}"}
        else:
            made.append(message)
    return made


def _can_join(one: Message, other: Message) -> bool:
    """Whether they differ in their text alone; tool calls and their results stay messages of their own."""
    is_plain = one["role"] != "tool" and one.keys() == other.keys()
    return is_plain and all(one[key] == other[key] for key in one if key != "content")
