"""Attention of llama.cpp's steps by our own kernel: the same sums, in a fraction of the time.

llama.cpp shows a callback each node of a graph before it computes them, and ggml has nodes that call functions of a
program's own. So where a node is attention that kernels/cpu/cells.h computes, it becomes such a call, by ggml's
threads and at the place that the node has in the graph.
"""

import logging
from typing import Any

from llama_cpp import llama_cpp as ll

from tightrope.backends.gguf.ggml import Tensors
from tightrope.kernels import dispatch
from tightrope.kernels.dispatch import CellAttention
from tightrope.kernels.forms.cells import GgmlSamples

log = logging.getLogger("tightrope.gguf")

_SAMPLE_BYTES = 1 << 20
_ANYTHING = 0x5EED  # An address that nobody reads.


def open_own_attention(*, has_windows: bool) -> CellAttention | None:
    """For one context; None, and a line in the log, where there is no kernel, or ggml lays tensors out in another way.

    has_windows: some layers of the model look back a number of tokens only.
    """
    attention = dispatch.cell_attention()
    if attention is None:
        log.info("llama.cpp's own attention is used: there is no kernel of ours for this processor")
        return None
    if not show_samples(attention, has_windows=has_windows):
        log.info("llama.cpp's own attention is used: this version's ggml_tensor is laid out in another way")
        return None
    return attention


def show_samples(attention: CellAttention, *, has_windows: bool) -> bool:
    """Whether it recognizes the tensors of llama_cpp's ggml."""
    shapes = (ll.GGML_TYPE_F32, 64, 5, 6), (ll.GGML_TYPE_F16, 64, 32, 3), (ll.GGML_TYPE_F16, 96, 32, 3)
    with Tensors(_SAMPLE_BYTES, have_data=True) as tensors:
        sources = [tensors.new(*shape) for shape in (*shapes, (ll.GGML_TYPE_F16, 32, 5, 1))]
        samples = GgmlSamples(
            sources=sources,
            data=[tensors.data(source) for source in sources],
            attention=tensors.attention(sources, 0.5, 0.25, 0.125),
            custom=tensors.custom((2, 3, 4, 5), sources, attention.work, _ANYTHING),
            what=_ANYTHING,
        )
        return attention.recognize(samples, has_windows=has_windows)


def show_graphs(params: Any, attention: CellAttention) -> None:  # noqa: ANN401 - an untyped structure
    """Have a context that is made with these llama_context_params use it."""
    params.cb_eval = type(params.cb_eval)(attention.callback)
    params.cb_eval_user_data = attention.attender
