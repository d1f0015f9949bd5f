"""Log probabilities as answers list them, in forms that several dialects share."""

from collections.abc import Sequence
from typing import Any

from tightrope.engine.types import Token

LOWEST = -9999.0  # JSON has no infinity.


def finite(logprob: float | None) -> float:
    """What JSON can hold; LOWEST for a token that can't come, or of which nothing is known."""
    return LOWEST if logprob is None or not logprob > LOWEST else logprob


def token_name(raw: bytes) -> str:
    """A token as text; a torn character as `bytes:\\xe2\\x80`, so that different tokens have different names."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def listed(tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """Each token with its alternatives, as OpenAI's chats and Ollama list them."""
    return [
        {
            "token": token_name(token.raw),
            "logprob": finite(token.logprob),
            "bytes": list(token.raw),
            "top_logprobs": [
                {"token": token_name(top.raw), "logprob": finite(top.logprob), "bytes": list(top.raw)}
                for top in token.top
            ],
        }
        for token in tokens
    ]
