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

# What auto tries, best first, and why it is taken. With our own attention all are about as fast. With ggml's on a CPU
# quantized ones take up to three times as long for a prompt: bench/results/gguf_kv_cache.json has the times. Without
# flash attention each stream pays for the cells of all others, and the scores of a step need memory that is short here.
AUTO = (
    (CACHE_TYPES["f16"], "nothing is rounded, and it fits"),
    (
        CacheType("q8 keys, f16 values", ll.GGML_TYPE_Q8_0, ll.GGML_TYPE_F16, True),
        "f16 does not fit; this takes 3/4 of its room",
    ),
    (CACHE_TYPES["q8"], "nothing larger fits; it takes half the room of f16"),
)

# The same with layers on a card. ggml's usual build for CUDA has kernels for keys and values of one type only: of two,
# attention is computed by the CPU, and nothing says so (llama.cpp's issues 24485 and 27109: 8 to 45 times slower).
AUTO_ON_CARDS = (
    (CACHE_TYPES["f16"], "nothing is rounded, and it fits"),
    (CACHE_TYPES["q8"], "f16 does not fit; it takes half its room"),
)
