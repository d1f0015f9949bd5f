"""Other orders of a chat's roles, for templates that refuse the one that a client sends.

Role-play clients open with several system messages and the character's greeting, write system notes in between, and
send two turns of one side in a row; many templates take nothing but system, user, assistant, user and so on, some not
even the system. Nothing is left out: what a template doesn't take by itself becomes part of the turn beside it.
"""

from collections.abc import Iterator

from tightrope.server.prompts.content import Message, text_of

SEPARATOR = "\n\n"  # It stands between texts that become one.


def regular_orders(messages: list[Message]) -> Iterator[list[Message]]:
    """The chat as it came, and then in stricter orders, the most faithful first.

    First: one system message at the start, later ones as part of the user's turn beside them, the greetings before the
    first turn of the user joined, and an empty turn of the user before them. Then: the system text at the top of the
    user's first turn. Then both with the turns of one side in a row joined.
    """
    opened = _joined(messages, every_turn=False)
    merged = _joined(messages, every_turn=True)
    told: list[list[Message]] = []
    for order in (messages, opened, _without_system(opened), merged, _without_system(merged)):
        if order not in told:
            told.append(order)
            yield order


def _without_system(messages: list[Message]) -> list[Message]:
    """The same with the system text at the top of the user's first turn, which it is by itself if there is none."""
    if messages[0]["role"] != "system":
        return messages
    system = messages[0] | {"role": "user"}
    if len(messages) > 1 and messages[1]["role"] == "user":
        return [_join(system, messages[1]), *messages[2:]]
    return [system, *messages[1:]]


def _joined(messages: list[Message], *, every_turn: bool) -> list[Message]:
    made: list[Message] = []
    is_opening = True  # It holds until a turn of the user has come.
    is_turn = False  # It tells whether the last one made holds a turn, and no system messages alone.
    for message in messages:
        is_note = message["role"] == "system"
        if is_note and any(m["role"] != "system" for m in made):
            message = message | {"role": "user"}
        if message["role"] == "assistant" and all(m["role"] == "system" for m in made):
            made.append({"role": "user", "content": ""})
        is_added = every_turn or is_note or not is_turn or (is_opening and message["role"] == "assistant")
        is_opening &= message["role"] != "user" or is_note
        if is_added and made and _can_join(made[-1], message):
            made[-1] = _join(made[-1], message)
            is_turn |= not is_note
        else:
            made.append(message)
            is_turn = not is_note
    return made


def _can_join(one: Message, other: Message) -> bool:
    """Whether they are of one side, and nothing comes out of order: a result answers the calls before it."""
    return one["role"] == other["role"] != "tool" and not one.get("tool_calls")


def _join(one: Message, other: Message) -> Message:
    """Both as one; what else they say of themselves stays where they don't differ, as two names do."""
    made = {key: value for key, value in {**one, **other}.items() if one.get(key, value) == other.get(key, value)}
    return made | {"role": one["role"], "content": SEPARATOR.join(filter(None, (text_of(one), text_of(other))))}
