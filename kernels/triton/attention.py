"""Paged attention on CUDA, the launches.

Prompts go to torch's flash attention over an expanded cache: see expanded. Decode has a kernel of our own; short
chunks, windows and soft caps another. Their programs take one key head with all query heads that share it, a tile of
queries (one query in decode), and a stretch of the context. In decode there are as many stretches as fill the
card, and a second kernel merges them. Every count that shapes a launch is known on the host, so nothing waits for the
card and a launch can be captured in a graph: what a sequence doesn't need returns at once.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightrope.kernels.forms.layout import GROUP, AttentionSpec, LayerCache, RopeTable, StepLayout
from tightrope.kernels.triton.attend import attend, merge
from tightrope.kernels.triton.cached import BITS, padded, words
from tightrope.kernels.triton.decode import decode
from tightrope.kernels.triton.expanded import FEWEST_QUERIES, attend_expanded, prompts_of

PROGRAMS_PER_SM = 4  # In decode some load while others compute.
SHORTEST_STRETCH = 128  # It is in tokens.
MAX_SPLITS = 128  # A context is cut into so many stretches at most.
MERGED = 16  # So many stretches are merged at a time.


def attention(
    queries: Tensor, cache: LayerCache, step: StepLayout, table: RopeTable | None, spec: AttentionSpec
) -> Tensor:
    """kernels.reference.attention: queries [T, H, D] of float16, bfloat16 or float32; the result has their dtype."""
    queries = queries.contiguous()
    outputs = torch.empty_like(queries)
    num_seqs = len(step.context_lens)
    if not len(queries) or not num_seqs:
        return outputs
    prompts = prompts_of(queries, step, spec)
    longest = step.max_query_len
    if prompts:  # Of their rows the tiles that others need as well are computed twice; what stays is written last.
        longest = max((count for count, _ in step.lengths if count < FEWEST_QUERIES), default=0)
    if longest > 1:
        _launch(queries, outputs, cache, step, table, spec, longest, is_decode=False)
    if num_seqs > max(1, len(prompts)) or step.max_query_len == 1:  # Beside one prompt there is nobody who decodes.
        _launch(queries, outputs, cache, step, table, spec, 1, is_decode=True)
    for prompt in prompts:
        attend_expanded(queries, outputs, prompt, cache, step, table, spec)
    return outputs


def _launch(
    queries: Tensor,
    outputs: Tensor,
    cache: LayerCache,
    step: StepLayout,
    table: RopeTable | None,
    spec: AttentionSpec,
    most_queries: int,
    *,
    is_decode: bool,
) -> None:
    """most_queries: of a sequence in the step; of longer ones the first that its tiles hold are computed."""
    num_heads, head_dim = queries.shape[1:]
    num_kv_heads, num_seqs = cache.format.num_kv_heads, len(step.context_lens)
    group = num_heads // num_kv_heads
    group_padded = max(8 if is_decode else 1, triton.next_power_of_2(group))
    half = table.places.shape[-1] if table is not None else 0
    dim_padded = padded(head_dim)
    partials = stats = None
    num_splits = 1
    num_rows, block_tokens = tile_size(dim_padded, queries.dtype, is_decode)
    block_queries = max(1, num_rows // group_padded)
    if is_decode:
        num_splits = count_splits(num_seqs * num_kv_heads, step.max_context_len, num_processors(queries.device))
        num_parts = num_splits
        if num_splits > 1:
            shape = (num_seqs, num_heads, num_splits)
            partials = queries.new_empty(*shape, head_dim, dtype=torch.float32)
            stats = queries.new_empty(*shape, 2, dtype=torch.float32)
    else:
        num_parts = -(-most_queries // block_queries)
    kernel = decode if is_decode else attend
    own = {} if is_decode else {"BLOCK_QUERIES": block_queries}
    kernel[num_parts, num_kv_heads, num_seqs](
        queries,
        outputs,
        partials,
        stats,
        words(cache.key_codes),
        cache.key_scales,
        words(cache.value_codes),
        cache.value_scales,
        cache.key_factor,
        step.query_starts,
        step.context_lens,
        step.block_tables,
        step.block_tables.stride(0),
        None if table is None else table.pages,
        None if table is None else table.places,
        None if table is None else table.set_of,
        0 if table is None else table.pages.shape[1],
        spec.scale,
        spec.softcap or 0.0,
        spec.window or 0,
        num_splits,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_PADDED=group_padded,
        BLOCK_TOKENS=block_tokens,
        HEAD_DIM=head_dim,
        DIM_PADDED=dim_padded,
        HALF=half,
        HALF_PADDED=padded(half),
        HALF_IS_WHOLE=half % GROUP == 0,
        REST=head_dim - 2 * half,
        REST_PADDED=padded(head_dim - 2 * half),
        REST_IS_WHOLE=2 * half % GROUP == 0,
        BITS=BITS[cache.format.dtype],
        HAS_WINDOW=spec.window is not None,
        HAS_SOFTCAP=spec.softcap is not None,
        DTYPE=tl.float32 if queries.dtype == torch.float32 else tl.float16,
        **own,
        num_warps=4 if is_decode else 8,
        enable_fp_fusion=True,
    )
    if num_splits > 1:
        merge[num_seqs, num_heads](
            outputs,
            partials,
            stats,
            step.query_starts,
            num_splits,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            DIM_PADDED=dim_padded,
            MOST_SPLITS=MAX_SPLITS,
            SPLITS=MERGED,
            enable_fp_fusion=True,
        )


def tile_size(dim_padded: int, dtype: torch.dtype, is_decode: bool) -> tuple[int, int]:
    """Rows of queries and keys of a tile: the largest that spill no registers and fit 99 KiB of shared memory.

    An RTX 3090 and a 4090 have no more; by what the compiler says for sm_86 and sm_90. Products have 16 rows or more.
    """
    is_long = dim_padded > 128
    if dtype == torch.float32:
        rows, tokens = (16 if is_decode or is_long else 32), (16 if is_decode and is_long else 32)
    else:
        rows, tokens = (16 if is_decode else 32 if is_long else 64), (64 if is_decode and not is_long else 32)
    return rows, tokens if dim_padded <= 256 else 16


def count_splits(num_rows: int, max_context_len: int, num_processors: int) -> int:
    """Stretches of the longest context in decode, where `num_rows` key heads of sequences are to be read.

    As many as keep every processor busy, but few short ones: to merge them costs time as well.
    """
    wanted = -(-PROGRAMS_PER_SM * num_processors // max(num_rows, 1))
    return max(1, min(wanted, -(-max_context_len // SHORTEST_STRETCH), MAX_SPLITS))


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a card, also of one that isn't there; Triton's interpreter, on a CPU, gets a few to split."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 128 if device.type == "meta" else 4
