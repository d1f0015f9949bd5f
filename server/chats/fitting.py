"""Chats that are longer than the window: their oldest messages are left out, where a client asks for that."""

from collections.abc import Awaitable, Callable, Sequence

from tightrope.engine.types import TextPrompt
from tightrope.server.chats.rendering import RenderedChat
from tightrope.server.chats.requests import Message
from tightrope.server.prompts.content import text_of
from tightrope.server.state import AppState

Render = Callable[[Sequence[Message]], Awaitable[RenderedChat]]


def room_for_prompt(front: AppState, max_tokens: int | None) -> int:
    """Tokens that a prompt may have; an answer gets what it asks for, up to half of the window; else an eighth."""
    window, most = front.info().max_model_len, front.served().limits.max_input_tokens
    room = window - max(1, min(window // 8 if max_tokens is None else max_tokens, window // 2))
    return min(room, most) if most else room


async def render_fitting(
    front: AppState, messages: Sequence[Message], render: Render, room: int, adapter: str | None
) -> tuple[RenderedChat, int]:
    """The chat without as many of its oldest messages as makes it fit `room` tokens, and how many these were.

    The system messages at its beginning stay, and what stays behind them begins with a turn of the user. A last turn
    that is too long by itself stays as it is. Raises what `render` raises.
    """
    head = next((i for i, message in enumerate(messages) if message.role not in ("system", "developer")), len(messages))
    starts = [i for i, message in enumerate(messages) if i > head and message.role == "user"]
    sizes = [len(text_of(message.given)) for message in messages]
    start = head
    while True:
        chat = await render([*messages[:head], *messages[start:]])
        num_tokens = len(await front.engine.tokenize(TextPrompt(chat.prompt.spans), adapter))
        starts = [i for i in starts if i > start]
        if num_tokens <= room or not starts:
            return chat, start - head
        may_stay = (sum(sizes[:head]) + sum(sizes[start:])) * room // num_tokens - sum(sizes[:head])
        start = next((i for i in starts if sum(sizes[i:]) <= may_stay), starts[-1])
