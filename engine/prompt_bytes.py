"""How long a text may be to be worth tokenizing, told by its bytes: a token stands for so many of them at most."""

from tightrope.backends.protocol import Tokenizer
from tightrope.engine.errors import ContextLengthExceeded, InvalidRequest
from tightrope.engine.types import GenerateRequest, Prompt, Span, TextPrompt

# Where a tokenizer may leave text out, so that no number of bytes is a number of tokens: what people may write for each
# token of the window, and for a short window in all.
BYTES_PER_TOKEN = 64
LEAST_BYTES = 1 << 20


def prompt_bytes(prompt: Prompt) -> int:
    """How long a prompt is, about: ASCII, which most of most prompts is, has one byte a character."""
    return sum(len(span.text) for span in prompt.spans) if isinstance(prompt, TextPrompt) else len(prompt.token_ids)


def request_bytes(request: GenerateRequest) -> int:
    """How long the texts of a request are, about."""
    others = [] if request.guidance is None else [request.guidance.text]
    others += [] if request.grammar is None else [request.grammar.text]
    return prompt_bytes(request.prompt) + sum(map(len, others))


def last_bytes(prompt: TextPrompt, tokenizer: Tokenizer, num_tokens: int) -> tuple[TextPrompt, bool]:
    """The end of a prompt in which its last tokens lie, and whether anything was cut off."""
    room = _most_bytes(tokenizer, num_tokens)
    kept: list[Span] = []
    for span in reversed(prompt.spans):
        raw, start = _utf8(span.text), 0
        if len(raw) > room:
            start = len(raw)
            while room > 0 and start > 0:
                before, start = start, max(0, start - room)
                room -= _num_counted(raw[start:before], tokenizer)
        else:
            room -= _num_counted(raw, tokenizer)
        if start:
            text = raw[start:].decode("utf-8", "ignore")  # A character that was cut goes.
            kept.append(Span(text, span.parse_special))
            return TextPrompt(tuple(reversed(kept)), prompt.add_bos), True
        kept.append(span)
    return prompt, False


def check_bytes(prompt: TextPrompt, tokenizer: Tokenizer, max_model_len: int, new_tokens: int, param: str) -> None:
    """Raises ContextLengthExceeded for a text that can't fit the window, whatever tokens it becomes, or InvalidRequest
    where that can't be told, for one that is longer than anybody's.
    """
    most = _most_bytes(tokenizer, max_model_len)
    if prompt_bytes(prompt) <= most // 4:  # A character has four bytes at most.
        return
    num_bytes = sum(_num_counted(_utf8(span.text), tokenizer) for span in prompt.spans)
    if num_bytes <= most:
        return
    longest = tokenizer.max_token_bytes
    if longest is None:
        raise InvalidRequest(
            f"{param} has {num_bytes} bytes; with this model's tokenizer and its window of {max_model_len} tokens it "
            f"may have {most}",
            param,
        )
    raise ContextLengthExceeded(-(-num_bytes // longest), new_tokens, max_model_len, param, is_least=True)


def _most_bytes(tokenizer: Tokenizer, num_tokens: int) -> int:
    longest = tokenizer.max_token_bytes
    return max(LEAST_BYTES, num_tokens * BYTES_PER_TOKEN) if longest is None else num_tokens * longest


def _num_counted(raw: bytes, tokenizer: Tokenizer) -> int:
    return len(raw.translate(None, tokenizer.lost_bytes)) if tokenizer.lost_bytes else len(raw)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")
