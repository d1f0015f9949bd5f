"""What is decided before loading: window, cache type and capacity, and whether it all fits in memory."""

from dataclasses import dataclass

from llama_cpp import llama_cpp as ll

from tightrope.backends.gguf.header import Header
from tightrope.backends.gguf.native import MAX_SEQS, ContextOptions
from tightrope.backends.gguf.rope import RopePlan, plan_rope
from tightrope.backends.gguf.shape import ModelShape
from tightrope.backends.memory import GIB, MIN_DEFAULT_TOKENS, default_tokens, does_not_fit, spare_bytes
from tightrope.backends.settings import ModelSettings
from tightrope.backends.threads import compute_threads

CELL_GRAIN = 256  # Llama.cpp rounds the number of cells up to this.
KEPT_SLOTS = 48  # So many finished sequences may be kept at most, as llama.cpp's work a step grows with the slots.
MAX_OUTPUTS = 128  # One native call gives so many rows of logits, for which a buffer is allocated.


@dataclass(frozen=True, slots=True)
class CacheType:
    """How keys and values are stored, as GGUF type ids, and whether flash attention reads them."""

    name: str
    key_type: int
    value_type: int
    flash_attention: bool


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


@dataclass(frozen=True, slots=True)
class GGUFPlan:
    """Everything a load needs; sizes in tokens."""

    window: int
    num_cells: int
    swap_bytes: int  # Finished sequences may take so much memory beside the cache.
    cache_type: CacheType
    step_tokens: int
    max_outputs: int
    rope: RopePlan
    notes: tuple[str, ...]


def make_plan(settings: ModelSettings, header: Header, free_bytes: int, adapter_bytes: int = 0) -> GGUFPlan:
    """Decide what to allocate, given `free_bytes` of memory for weights, adapters, cache and workspace.

    Raises DoesNotFit, with the largest window that fits, when what is asked for doesn't.
    """
    shape = ModelShape.of(header)
    rope = plan_rope(settings.rope, shape)
    window = settings.max_model_len or rope.window
    notes = [rope.describe(window)]
    if window > rope.window:
        notes.append(f"window: {window} tokens, more than the {rope.window} that the model is made for")
    spare = spare_bytes(header.weight_bytes + adapter_bytes, free_bytes) - workspace_bytes(settings, shape)
    cache_type, reason = _choose_type(settings, shape, window, spare)
    num_cells = _choose_cells(settings, shape, window, cache_type, spare)
    cache_bytes = int(num_cells * token_bytes(shape, cache_type))
    swap_bytes = min(cache_bytes, max(0, spare - cache_bytes) // 2)
    notes.append(
        f"cache: {num_cells} tokens as {cache_type.name}, {cache_bytes / GIB:.2f} GiB; {reason}; "
        f"finished chats may take {swap_bytes / GIB:.2f} GiB beside it"
    )
    step_tokens = min(settings.step_tokens_on("cpu"), num_cells)
    return GGUFPlan(window, num_cells, swap_bytes, cache_type, step_tokens, _max_outputs(settings), rope, tuple(notes))


def _choose_type(settings: ModelSettings, shape: ModelShape, window: int, spare: int) -> tuple[CacheType, str]:
    asked = settings.cache.dtype
    if asked != "auto":
        return CACHE_TYPES[asked], "as asked"
    need = settings.cache.tokens or window
    for kind, reason in AUTO:
        if need * token_bytes(shape, kind) <= spare:
            return kind, reason
    return AUTO[-1]  # This is too large as well, and the refusal says how large.


def _choose_cells(settings: ModelSettings, shape: ModelShape, window: int, kind: CacheType, spare: int) -> int:
    fitting = fitting_tokens(shape, kind, spare)
    wanted = settings.cache.tokens or default_tokens(window, settings.max_num_seqs)
    least = settings.cache.tokens or window
    if least > fitting:
        smaller = [CACHE_TYPES[name] for name in ("q8", "q4")]
        names = [
            other.name
            for other in smaller
            if token_bytes(shape, other) < token_bytes(shape, kind) and fitting_tokens(shape, other, spare) >= least
        ]
        raise does_not_fit(least, kind.name, least * token_bytes(shape, kind), spare, names, fitting)
    return -(-min(wanted, fitting) // CELL_GRAIN) * CELL_GRAIN


def token_bytes(shape: ModelShape, kind: CacheType) -> float:
    """Bytes of a token's keys and values in all layers; 0 for a model without attention."""
    return shape.cache_bytes(kind.key_type, kind.value_type)


def fitting_tokens(shape: ModelShape, kind: CacheType, spare: int) -> int:
    """The most tokens of cache that `spare` bytes hold."""
    a_token = token_bytes(shape, kind)
    fitting = int(spare / a_token) if a_token else MIN_DEFAULT_TOKENS
    return max(0, fitting) // CELL_GRAIN * CELL_GRAIN


def _max_outputs(settings: ModelSettings) -> int:
    return max(settings.max_num_seqs, min(MAX_OUTPUTS, settings.step_tokens_on("cpu")))


def workspace_bytes(settings: ModelSettings, shape: ModelShape) -> int:
    """A generous guess at llama.cpp's compute and output buffers."""
    logits = 2 * 4 * _max_outputs(settings) * shape.vocab_size
    activations = 4 * settings.step_tokens_on("cpu") * shape.embedding * 32
    return logits + activations + (64 << 20)


def context_options(settings: ModelSettings, plan: GGUFPlan) -> ContextOptions:
    """What a plan's context is made with."""
    return ContextOptions(
        num_cells=plan.num_cells,
        max_seqs=min(MAX_SEQS, settings.max_num_seqs + KEPT_SLOTS),
        batch_tokens=plan.step_tokens,
        ubatch_tokens=plan.step_tokens,
        max_outputs=plan.max_outputs,
        threads=compute_threads(settings.threads),
        type_k=plan.cache_type.key_type,
        type_v=plan.cache_type.value_type,
        flash_attention=plan.cache_type.flash_attention,
        offload_cache=settings.gpu_layers != 0,
        rope_scaling_type=plan.rope.scaling_type,
        rope_freq_base=plan.rope.freq_base,
        rope_freq_scale=plan.rope.freq_scale,
        yarn_orig_ctx=plan.rope.yarn_orig_ctx,
        yarn_ext_factor=plan.rope.yarn_ext_factor,
    )


def least_options() -> ContextOptions:
    """The smallest context, for a model whose window doesn't fit."""
    kind = CACHE_TYPES["f16"]
    return ContextOptions(
        num_cells=CELL_GRAIN,
        max_seqs=1,
        batch_tokens=CELL_GRAIN,
        ubatch_tokens=CELL_GRAIN,
        max_outputs=1,
        threads=1,
        type_k=kind.key_type,
        type_v=kind.value_type,
        flash_attention=kind.flash_attention,
    )
