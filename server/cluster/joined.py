"""What several replicas of one model are together."""

from collections.abc import Sequence

from msgspec.structs import astuple, replace

from tightrope.engine.types import ModelInfo, Stats


def is_same_model(one: ModelInfo, other: ModelInfo) -> bool:
    """Whether both write the same text; how much memory they have for it may differ."""

    def writes(info: ModelInfo) -> tuple[object, ...]:
        marks = (info.bos_token, info.eos_token, info.special_texts, info.end_texts, info.chat_template)
        return (info.model_id, info.architecture, info.format, info.vocab_size, info.cache_dtype, *marks)

    return writes(one) == writes(other)


def joined_info(infos: Sequence[ModelInfo]) -> ModelInfo:
    """That of at least one: the smallest window, and the places and cached tokens of all."""
    smallest = min(infos, key=lambda info: info.max_model_len)
    return replace(
        smallest,
        cache_tokens=sum(info.cache_tokens for info in infos),
        max_num_seqs=sum(info.max_num_seqs for info in infos),
    )


def joined_stats(every: Sequence[Stats]) -> Stats:
    """Their sum."""
    return Stats(*map(sum, zip(*map(astuple, every), strict=True)))
