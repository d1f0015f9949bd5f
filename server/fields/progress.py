"""How far a prompt has been read, as llama.cpp's server tells it where a request has `return_progress`."""

from tightrope.engine.types import PromptRead


def prompt_progress(read: PromptRead) -> dict[str, int]:
    """Tokens in all, found cached, and read, the cached ones among them; milliseconds since reading began."""
    return {
        "total": read.num_tokens,
        "cache": read.num_cached,
        "processed": read.num_read,
        "time_ms": round(1e3 * read.seconds),
    }
