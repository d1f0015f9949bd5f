"""What a card expands for a moment, and how large it is: slices of quantized matrices, one sequence's keys and values.

Prompts gain by it: a slice fills the card with one large product, and keys are converted once instead of once for each
tile of queries. Whoever plans memory asks here.
"""

from tightrope.kernels.forms.layout import AttentionSpec

SLICE_BYTES = 128 << 20  # A slice is a whole matrix, or at least about as large: smaller products leave a card idle.
SLICE_OUTPUTS = 128  # Slices are multiples of so many outputs.
MOST_HEAD_DIM = 256  # Flash attention takes no larger heads.
EXPANDED_ITEM_BYTES = 2  # Keys and values are expanded to float16.


def slice_outputs(num_inputs: int, num_outputs: int, itemsize: int) -> int:
    """How many outputs of a quantized matrix are expanded at a time, to numbers of `itemsize` bytes.

    All slices but the last have so many. They are as even as multiples of SLICE_OUTPUTS can be.
    """
    num_slices = max(1, num_inputs * num_outputs * itemsize // SLICE_BYTES)
    even = -(-num_outputs // num_slices)
    return min(num_outputs, -(-even // SLICE_OUTPUTS) * SLICE_OUTPUTS)


def slice_bytes(num_inputs: int, num_outputs: int, itemsize: int) -> int:
    """Bytes of the largest slice of a quantized matrix: of all of it, or up to twice SLICE_BYTES and SLICE_OUTPUTS."""
    return num_inputs * slice_outputs(num_inputs, num_outputs, itemsize) * itemsize


def expands_cache(spec: AttentionSpec, head_dim: int) -> bool:
    """Whether prompts of a layer read an expanded cache; others read it page by page, as decoding does."""
    return spec.window is None and spec.softcap is None and head_dim <= MOST_HEAD_DIM


def expanded_cache_bytes(num_tokens: int, num_kv_heads: int, head_dim: int) -> int:
    """Bytes of a sequence's keys and values in one layer, expanded; all layers use the same memory for it."""
    return 2 * num_tokens * num_kv_heads * head_dim * EXPANDED_ITEM_BYTES
