"""How the ranks of a CPU share its memory: all have room for as many tokens."""

from collections.abc import Sequence
from dataclasses import replace

from tightrope.backends.hf.host_workspace import HostWorkspace
from tightrope.backends.memory import spare_bytes
from tightrope.backends.settings import ModelSettings
from tightrope.backends.tensor_parallel import Share


def host_rooms(
    settings: ModelSettings, first: HostWorkspace, weights: Sequence[int], tokens: Sequence[int], free_bytes: int
) -> list[int]:
    """What each rank may use up of the machine's memory, of which `free_bytes` are free.

    first: the first rank's workspace. weights: bytes of each rank's, with its adapters; tokens: those of a token in
    each rank's cache. What is kept for chats beside the cache is the first one's, on top of its own.
    """
    count, step = len(weights), settings.step_tokens_on("cpu")
    works = [replace(first, share=Share(rank, count)).num_bytes(step, 0) for rank in range(count)]
    reserve = settings.cache.host_reserve_bytes
    left = spare_bytes(sum(weights) + sum(works) + reserve, free_bytes)
    rooms = [
        max(0, weight + work + left * token // sum(tokens))
        for weight, work, token in zip(weights, works, tokens, strict=True)
    ]
    return [rooms[0] + reserve, *rooms[1:]]
