"""Attention of llama.cpp's steps by our own kernel: the same sums, in a fraction of the time.

llama.cpp shows a callback each node of a graph before it computes them, and ggml has nodes that call functions of
a program's own. So where a node is attention that kernels/cpu/cells.h computes, it becomes such a call, by ggml's
threads and at the place that the node has in the graph.
"""

import ctypes
import logging
from typing import Any

from llama_cpp import llama_cpp as ll

from tightrope.backends.gguf.ggml import ADDRESS, Tensors
from tightrope.kernels.cpu import native, structs

log = logging.getLogger("tightrope.gguf")

_SAMPLE_BYTES = 1 << 20
_ANYTHING = 0x5EED  # An address that nobody reads.


class OwnAttention:
    """What the graphs of one context are shown to, for as long as the context lives."""

    def __init__(self, kernels: ctypes.CDLL, attender: int) -> None:
        """See `open_own_attention`."""
        self._kernels, self._attender = kernels, ctypes.c_void_p(attender)

    def take_part(self, params: Any) -> None:  # noqa: ANN401 - an untyped structure
        """Have a context that is made with these llama_context_params use it."""
        params.cb_eval = type(params.cb_eval)(_address(self._kernels.tightrope_take_attention))
        params.cb_eval_user_data = self._attender

    def close(self) -> None:
        """Free it. The context must be freed before."""
        self._kernels.tightrope_free_attender(self._attender)


def open_own_attention(*, has_windows: bool) -> OwnAttention | None:
    """has_windows: some layers of the model look back a number of tokens only.

    None, and a line in the log, where this processor has no kernel, or ggml's tensors are laid out in another way.
    """
    try:
        builds = native.usable()
        kernels = native.open_build(builds[0]) if builds else None
    except native.UnusableBuild as error:
        log.info("llama.cpp's own attention is used: %s", error)
        return None
    if kernels is None or builds[0] == "portable":
        log.info("llama.cpp's own attention is used: there is no kernel of ours for this processor")
        return None
    attender = new_attender(kernels, has_windows)
    if attender is None:
        log.info("llama.cpp's own attention is used: this version's ggml_tensor is laid out in another way")
        return None
    return OwnAttention(kernels, attender)


def new_attender(kernels: ctypes.CDLL, has_windows: bool) -> int | None:
    """It is shown ggml::Samples of kernels/cpu/ggml.h; None where these are laid out in another way."""
    work = _address(kernels.tightrope_attend)
    shapes = (ll.GGML_TYPE_F32, 64, 5, 6), (ll.GGML_TYPE_F16, 64, 32, 3), (ll.GGML_TYPE_F16, 96, 32, 3)
    with Tensors(_SAMPLE_BYTES, have_data=True) as tensors:
        sources = [tensors.new(*shape) for shape in (*shapes, (ll.GGML_TYPE_F16, 32, 5, 1))]
        samples = structs.Samples(
            sources=(ADDRESS * len(sources))(*sources),
            data=(ADDRESS * len(sources))(*map(tensors.data, sources)),
            attention=tensors.attention(sources, 0.5, 0.25, 0.125),
            custom=tensors.custom((2, 3, 4, 5), sources, work, _ANYTHING),
            work=work,
            what=_ANYTHING,
        )
        kernels.tightrope_new_attender.restype = ADDRESS
        attender: int | None = kernels.tightrope_new_attender(ctypes.byref(samples), int(has_windows))
        return attender


def _address(function: Any) -> int:  # noqa: ANN401 - a function of a library
    return ctypes.cast(function, ADDRESS).value or 0
