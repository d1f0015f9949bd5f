"""Tensors of ggml's own, and operations on them that are asked about and never run; llama_cpp wraps none of this."""

import ctypes
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from llama_cpp import llama_cpp as ll

ADDRESS = ctypes.c_void_p
ALL_THREADS = -1  # ggml's GGML_N_TASKS_MAX.
_INT, _LONG, _FLOAT = ctypes.c_int, ctypes.c_int64, ctypes.c_float


class _InitParams(ctypes.Structure):
    """ggml_init_params of ggml.h."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ADDRESS), ("no_alloc", ctypes.c_bool))


def _function(name: str, *types: Any, result: Any = ADDRESS) -> Any:  # noqa: ANN401 - ctypes has no name for them
    """One of the library's, with types of its own: others may call it with theirs."""
    return ctypes.CFUNCTYPE(result, *types)((name, ll._lib))


class Tensors:
    """Some tensors, as addresses, until the `with` ends."""

    def __init__(self, num_bytes: int, *, have_data: bool) -> None:
        """have_data: memory for their numbers is taken from num_bytes, which is for all that ggml keeps of them."""
        self._new = _function("ggml_new_tensor_4d", ADDRESS, _INT, *[_LONG] * 4)
        self._attention = _function("ggml_flash_attn_ext", *[ADDRESS] * 5, *[_FLOAT] * 3)
        self._data = _function("ggml_get_data", ADDRESS)
        self._context = _function("ggml_init", _InitParams)(_InitParams(num_bytes, None, not have_data))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _function("ggml_free", ADDRESS, result=None)(self._context)

    def new(self, type_id: int, *sizes: int) -> int:
        """One of three dimensions, the innermost first."""
        made: int = self._new(self._context, type_id, *sizes, 1)
        return made

    def data(self, tensor: int) -> int:
        """Where its numbers lie."""
        address: int = self._data(tensor)
        return address

    def attention(self, sources: Sequence[int], scale: float, max_bias: float, softcap: float) -> int:
        """That of queries, over keys and values, under a mask. max_bias: ALiBi's."""
        made: int = self._attention(self._context, *sources, scale, max_bias, softcap)
        return made

    def custom(self, sizes: Sequence[int], sources: Sequence[int], work: int, what: int) -> int:
        """What the function at `work` makes of the sources with all threads: float32, of four dimensions."""
        custom = _function("ggml_custom_4d", ADDRESS, _INT, *[_LONG] * 4, ADDRESS, _INT, ADDRESS, _INT, ADDRESS)
        listed = (ADDRESS * len(sources))(*sources)
        made: int = custom(self._context, ll.GGML_TYPE_F32, *sizes, listed, len(sources), work, ALL_THREADS, what)
        return made


def tensor_bytes(count: int) -> int:
    """Memory for so many tensors without data."""
    return count * int(_function("ggml_tensor_overhead", result=ctypes.c_size_t)())
