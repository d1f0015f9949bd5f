"""Prompts that are run as they are: text, in which special tokens are parsed, or token ids."""

from collections.abc import Sequence

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.types import Prompt, Span, TextPrompt, TokenPrompt
from tightrope.server.served import Served

MOST_TOKEN_IDS = 1 << 24  # No vocabulary has so many.


def raw_prompt(given: str | Sequence[int], served: Served, adapter: str | None, *, add_bos: bool) -> Prompt:
    """The prompt for the engine. Raises InvalidRequest for an empty one and for unknown ids.

    An adapter may know more tokens than the model; which, the engine tells.
    """
    if not given:
        raise InvalidRequest("prompt must not be empty", "prompt")
    if isinstance(given, str):
        return TextPrompt((Span(given),), add_bos)
    end = served.info.vocab_size if adapter is None else MOST_TOKEN_IDS
    for token_id in given:
        if not 0 <= token_id < end:
            raise InvalidRequest(f"prompt: {token_id} is no token id below {end}", "prompt")
    return TokenPrompt(tuple(given))
