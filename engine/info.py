"""What the front is told of a loaded model."""

from tightrope.backends.protocol import Backend
from tightrope.engine.types import ModelInfo

EMPTY_TEMPLATE = "chat template: the one in the model's files is empty, and counts as none"


def window(backend: Backend) -> int:
    """The longest sequence, in tokens, that can be served: of the model's window, what its cache holds."""
    return min(backend.card.max_model_len, backend.kv.usage().capacity)


def model_info(backend: Backend) -> ModelInfo:
    """The model as it is now: its tokenizer may still learn marks."""
    card, tokenizer = backend.card, backend.tokenizer
    is_empty = card.chat_template is not None and not card.chat_template.strip()

    def text_of(token_id: int) -> str:
        return tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    named_end = dict(card.named_tokens).get("eos_token")
    ends = tuple(map(text_of, sorted(tokenizer.eos_ids)))
    return ModelInfo(
        model_id=card.model_id,
        architecture=card.architecture,
        format=card.format,
        vocab_size=tokenizer.vocab_size,
        max_model_len=window(backend),
        trained_len=card.trained_len,
        cache_tokens=backend.kv.usage().capacity,
        cache_dtype=card.cache_dtype,
        max_num_seqs=backend.capabilities.max_num_seqs,
        bos_token=None if tokenizer.bos_id is None else text_of(tokenizer.bos_id),
        eos_token=named_end if isinstance(named_end, str) else next(iter(ends), None),
        special_texts=tuple(tokenizer.special_texts()),
        chat_template=None if is_empty else card.chat_template,
        chat_templates=card.chat_templates,
        notes=(*card.notes, EMPTY_TEMPLATE) if is_empty else card.notes,
        named_tokens=card.named_tokens,
        added_texts=tuple(tokenizer.added_texts()),
        end_texts=ends,
        memory=card.memory,
        fault=card.fault,
    )
