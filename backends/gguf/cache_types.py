"""How keys and values may be stored, and which way is tried first."""

from dataclasses import dataclass

from llama_cpp import llama_cpp as ll


@dataclass(frozen=True, slots=True)
class CacheType:
    """How keys and values are stored, as GGUF type ids, and whether flash attention reads them."""

    name: str
    key_type: int
    value_type: int
    flash_attention: bool

    @property
    def is_quantized(self) -> bool:
        return self.key_type != ll.GGML_TYPE_F16


CACHE_TYPES = {
    "f16": CacheType("f16", ll.GGML_TYPE_F16, ll.GGML_TYPE_F16, True),
    "q8": CacheType("q8", ll.GGML_TYPE_Q8_0, ll.GGML_TYPE_Q8_0, True),
    "q4": CacheType("q4", ll.GGML_TYPE_Q4_0, ll.GGML_TYPE_Q4_0, True),
}

# What auto tries, best first, and why it is taken. ggml's flash attention on a CPU works in tiles only when keys and
# values are both f16; quantized ones are unpacked row by row for every query. bench/results/gguf_kv_cache.json has the
# times. Without flash attention 8-bit keys read a prompt as fast as f16, but each stream then pays for the cells of all
# others, and the scores of a step need memory that is short here.
AUTO = (
    (CACHE_TYPES["f16"], "the fastest on a CPU, and it fits"),
    (
        CacheType("q8 keys, f16 values", ll.GGML_TYPE_Q8_0, ll.GGML_TYPE_F16, True),
        "f16 does not fit; this takes 3/4 of its room, reads prompts a third slower and writes as fast",
    ),
    (CACHE_TYPES["q8"], "nothing larger fits; it takes half the room of f16 and twice its time for a prompt"),
)

# The same with layers on a card. ggml's usual build for CUDA has kernels for keys and values of one type only: of two,
# attention is computed by the CPU, and nothing says so (llama.cpp's issues 24485 and 27109: 8 to 45 times slower).
AUTO_ON_CARDS = (
    (CACHE_TYPES["f16"], "nothing is rounded, and it fits"),
    (CACHE_TYPES["q8"], "f16 does not fit; it takes half its room"),
)
