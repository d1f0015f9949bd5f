"""Headers of GGUF files of known models, with the sizes of their tensors and no tensors."""

from collections.abc import Iterable
from pathlib import Path

from tightrope.backends.files.gguf.header import DataFile, Header, TensorInfo, Value

GIB = 1 << 30


def tensors(sizes: Iterable[tuple[str, int]]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(name, (size,), "Q8_0", 0, size) for name, size in sizes)


def header(metadata: dict[str, Value], sizes: Iterable[tuple[str, int]]) -> Header:
    keys = {f"llama.{name}": value for name, value in metadata.items()}
    path = Path("m.gguf")
    return Header(path, {"general.architecture": "llama", **keys}, (DataFile(path, 0, tensors(sizes)),))


def yi_34b(*, is_tied: bool = False) -> Header:
    """Yi-34B-200K as Q4_K_M: 20.66 GB, of which a layer takes a sixtieth beside embedding and output."""
    embedding, output = 64_000 * 7168 // 256 * 144, 64_000 * 7168 // 256 * 210  # in Q4_K and Q6_K
    layer = (20_658_000_000 - embedding - output) // 60
    sizes = [("token_embd.weight", embedding), ("output_norm.weight", 4 * 7168)]
    for number in range(60):
        sizes += [(f"blk.{number}.ffn_down.weight", layer // 4), (f"blk.{number}.rest.weight", layer - layer // 4)]
    if not is_tied:
        sizes.append(("output.weight", output))
    return header(
        {
            "block_count": 60,
            "embedding_length": 7168,
            "context_length": 200_000,
            "feed_forward_length": 20_480,
            "attention.head_count": 56,
            "attention.head_count_kv": 8,
            "rope.freq_base": 5e6,
            "vocab_size": 64_000,
        },
        sizes,
    )


def mixtral_8x7b() -> Header:
    """Mixtral-8x7B as Q4_K: 4.5 bits a weight."""
    expert = 8 * 14_336 * 4096 * 9 // 16
    sizes = [("token_embd.weight", 32_000 * 4096 * 9 // 16), ("output.weight", 32_000 * 4096 * 9 // 16)]
    for number in range(32):
        sizes += [(f"blk.{number}.ffn_{part}_exps.weight", expert) for part in ("gate", "up", "down")]
        sizes += [(f"blk.{number}.attn.weight", 41_943_040 * 9 // 16), (f"blk.{number}.ffn_gate_inp.weight", 131_072)]
    return header(
        {
            "block_count": 32,
            "embedding_length": 4096,
            "context_length": 32_768,
            "feed_forward_length": 14_336,
            "attention.head_count": 32,
            "attention.head_count_kv": 8,
            "expert_count": 8,
            "expert_used_count": 2,
            "rope.freq_base": 1e6,
            "vocab_size": 32_000,
        },
        sizes,
    )
