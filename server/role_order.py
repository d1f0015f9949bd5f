"""Other orders of a chat's roles, for templates that refuse the one that a client sends.

Role-play clients open with several system messages and the character's greeting, and write system notes in between;
many templates take nothing but system, user, assistant, user and so on. What is merged is what such clients add of
their own: turns that people and models have written stay turns, and two of a kind in a row are the template's to judge.
"""

from collections.abc import Iterator
from typing import Any

Message = dict[str, Any]

SEPARATOR = "\n\n"  # between texts that become one


def regular_orders(messages: list[Message]) -> Iterator[list[Message]]:
    """The same chat in stricter orders, the most faithful first; none if there is nothing to merge.

    First: one system message at the start, later ones as part of the user's turn beside them, the greetings before the
    first turn of the user joined, and an empty turn of the user before them. Then: the system text at the top of the
    user's first turn.
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
    is_opening = True  # no turn of the user has come
    is_turn = False  # whether the last one made holds a turn, and no system messages alone
    for message in messages:
        is_note = message["role"] == "system"
        if is_note and any(m["role"] != "system" for m in made):
            message = message | {"role": "user"}
        if message["role"] == "assistant" and all(m["role"] == "system" for m in made):
            made.append({"role": "user", "content": ""})
        is_added = is_note or not is_turn or (is_opening and message["role"] == "assistant")
        is_opening &= message["role"] != "user" or is_note
        if is_added and made and _can_join(made[-1], message):
            made[-1] = made[-1] | {"content": f"{made[-1]['content']}{SEPARATOR}{message['content']}"}
            is_turn |= not is_note
        else:
            made.append(message)
            is_turn = not is_note
    return made


def _can_join(one: Message, other: Message) -> bool:
    """Whether they differ in their text alone; tool calls and their results stay messages of their own."""
    is_plain = one["role"] != "tool" and one.keys() == other.keys()
    return is_plain and all(one[key] == other[key] for key in one if key != "content")
