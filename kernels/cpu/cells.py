"""Attention over llama.cpp's cells (cpu/cells.h), which ggml's threads call: addresses to hand to it."""

import ctypes
from typing import Any  # ctypes keeps the type of its functions to itself.

from tightrope.kernels.cpu import structs
from tightrope.kernels.cpu.native import open_build
from tightrope.kernels.forms.cells import GgmlSamples

_ADDRESS = ctypes.c_void_p


class CellAttention:
    """What belongs to one context of llama.cpp, once its ggml is recognized."""

    def __init__(self, instruction_set: str) -> None:
        """Raises UnusableBuild."""
        self._library = open_build(instruction_set)
        self.work = _address(self._library.tightrope_attend)  # a ggml_custom_op_t
        self.callback = _address(self._library.tightrope_take_attention)  # a ggml_backend_sched_eval_callback
        self.attender: int | None = None  # the callback's user data

    def recognize(self, samples: GgmlSamples, *, has_windows: bool) -> bool:
        """Whether tensors are laid out as the kernel has them; without that the callback isn't to be used.

        samples: their node's function is `work`. has_windows: some layers of the model look back a number of tokens
        only.
        """
        shown = structs.Samples(
            sources=(_ADDRESS * 4)(*samples.sources),
            data=(_ADDRESS * 4)(*samples.data),
            attention=samples.attention,
            custom=samples.custom,
            work=self.work,
            what=samples.what,
        )
        new = self._library.tightrope_new_attender
        new.restype = _ADDRESS
        self.attender = new(ctypes.byref(shown), int(has_windows))
        return self.attender is not None

    def close(self) -> None:
        """Free it. The context must be freed before."""
        self._library.tightrope_free_attender(ctypes.c_void_p(self.attender))
        self.attender = None


def _address(function: Any) -> int:  # noqa: ANN401
    return ctypes.cast(function, _ADDRESS).value or 0
