"""The graphics cards that layers can be put on, asked of ggml through its own functions for devices."""

import ctypes
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llama_cpp import llama_cpp as ll

from tightrope.backends.devices.host import Host
from tightrope.backends.errors import BackendError
from tightrope.backends.files.gguf.tensor_types import TENSOR_TYPES
from tightrope.backends.gguf.cache_types import CacheType
from tightrope.backends.gguf.ggml import Tensors, tensor_bytes
from tightrope.backends.gguf.shape import ModelShape
from tightrope.backends.memory import CardMemory
from tightrope.backends.settings import ModelSettings, written

_FOR_CPU, _REINSTALL = "this llama-cpp-python was built for the CPU", "reinstall it with CMAKE_ARGS=-DGGML_CUDA=on"
_WITHOUT_CARDS = {"CPU", "BLAS"}  # ggml's libraries for these know no cards.
_GPU, _INTEGRATED = 1, 2  # They are ggml_backend_dev_type's.
# Matrices of these types are no part of ggml's ggml_cuda_should_use_mmq.
_UNPACKED = frozenset({"IQ1_M", "TQ1_0", "TQ2_0"})
_NUMBERS = frozenset({"F32", "F16", "BF16"})
# Cards whose matrix units know no whole numbers (Volta), or that add no products of bytes (P100) leave all to cuBLAS.
_BY_CUBLAS = re.compile(r"\b(G?V100|TITAN V|P100)(?![0-9A-RT-Z])")
_ROWS, _CELLS = 64, 256  # Attention is asked about with so many queries and keys, which all kernels can divide.


class _Props(ctypes.Structure):
    """ggml_backend_dev_props of ggml-backend.h, with room for what later versions add."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("later", ctypes.c_uint8 * 256),
    )


@dataclass(frozen=True, slots=True)
class Card:
    """A device with memory of its own, or with a part of the host's."""

    name: str  # ggml calls it so, such as CUDA0.
    memory: CardMemory
    description: str = ""
    shares_host: bool = False  # What is put there is taken from the host's memory.
    pointer: int | None = None  # It is ggml's; None for a card that is planned for and isn't here.

    def __str__(self) -> str:
        return f"{self.name} ({self.description})" if self.description else self.name

    def multiplies(self, type_name: str) -> bool:
        """Whether it multiplies a prompt with weights of a type as they are.

        Else llama.cpp unpacks the whole matrix to 16 bits for cuBLAS, in memory that its buffers don't show.
        """
        if not self.name.startswith("CUDA") or type_name in _NUMBERS:
            return True
        return type_name not in _UNPACKED and _BY_CUBLAS.search(self.description) is None

    @property
    def splits_rows(self) -> bool:
        """Whether its library of ggml has buffers that several cards share by rows of matrices."""
        if self.pointer is None:
            return self.name.startswith("CUDA")
        library: Any = ll._lib
        library.ggml_backend_dev_backend_reg.restype = ctypes.c_void_p
        library.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
        kind = ctypes.c_void_p(library.ggml_backend_dev_backend_reg(ctypes.c_void_p(self.pointer)))
        return bool(library.ggml_backend_reg_get_proc_address(kind, b"ggml_backend_split_buffer_type"))

    def attends(self, shape: ModelShape, kind: CacheType) -> bool:
        """Whether it has a kernel for the attention of a model, over keys and values stored so.

        Where it has none, llama.cpp computes attention on the CPU, and copies the cache there in every step.
        """
        if self.pointer is None:
            return kind.key_type == kind.value_type  # CUDA's usual build has kernels for these.
        return has_attention(self.pointer, shape, kind)


def cards_for(settings: ModelSettings) -> tuple[Card, ...]:
    """The cards that `settings` put layers on: none, or those of --device that are here. Raises BackendError."""
    device, layers = settings.device, settings.gpu_layers
    if layers == 0 and device.startswith("cuda"):
        raise BackendError(f"--device {device}: of a GGUF file --gpu-layers says how many layers go there; -1 is all")
    if layers != 0 and device == "cpu":
        raise BackendError(f"--device cpu and --gpu-layers {layers} contradict each other; give only one of them")
    if layers == 0:
        return ()
    found = list(_devices())
    # As llama.cpp has it: a card that two of its libraries see is one, and integrated ones are for want of others.
    cards = list({device_id or card.name: card for device_id, card in reversed(found) if not card.shares_host}.values())
    chosen = cards[::-1] or [card for _, card in found[:1]]
    if not chosen:
        raise BackendError(f"gpu_layers is {layers}, but {_why_none()}")
    name, _, number = device.upper().partition(":")
    meant = [card for card in chosen if device == "auto" or re.fullmatch(name + (number or r"\d+"), card.name)]
    if not meant:
        raise BackendError(f"--device {device}: llama.cpp sees {', '.join(map(str, chosen))}")
    return chosen_of(meant, settings)


def chosen_of(cards: Sequence[Card], settings: ModelSettings) -> tuple[Card, ...]:
    """Those that --split-mode and --tensor-split leave of the cards that there are. Raises BackendError."""
    count, shares = len(cards), settings.tensor_split
    if len(shares) > count:
        there = "1 card" if count == 1 else f"{count} cards"
        raise BackendError(
            f"--tensor-split {written(shares)}: a number for each of {len(shares)} cards, and there "
            f"{_are(count)} {there}; give {count} at most"
        )
    if settings.split_mode == "row" and count > 1:
        for card in cards:
            if not card.splits_rows:
                raise BackendError(
                    f"--split-mode row: llama.cpp can't split rows on {card}; take layer, or leave it out"
                )
    return tuple(cards[:1] if settings.split_mode == "none" else cards)


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def unused(settings: ModelSettings, host: Host) -> str:
    """What a person is told where there is a card and nothing is put on it; else nothing."""
    if settings.gpu_layers or settings.device != "auto" or not host.has_card:
        return ""
    what = "--gpu-layers -1 puts all layers on it" if _kinds() else f"{_FOR_CPU}; {_REINSTALL}"
    return f"there is an NVIDIA card: {what}"


def describe() -> str:
    """What llama.cpp was built for, and the cards that it finds."""
    if not (kinds := _kinds()):
        return "built for the CPU"
    return f"built for {' and '.join(kinds)}, finds {', '.join(str(card) for _, card in _devices()) or 'no card'}"


def _why_none() -> str:
    if not (kinds := _kinds()):
        return f"{_FOR_CPU}; use 0, or {_REINSTALL}"
    return f"llama.cpp's {' and '.join(kinds)} sees no graphics card; use 0, or see whether its driver does"


def _kinds() -> list[str]:
    """ggml's libraries for cards."""
    library: Any = ll._lib  # Llama_cpp wraps none of ggml's functions.
    library.ggml_backend_reg_count.restype = ctypes.c_size_t
    library.ggml_backend_reg_get.restype = ctypes.c_void_p
    library.ggml_backend_reg_name.restype = ctypes.c_char_p
    pointers = (library.ggml_backend_reg_get(ctypes.c_size_t(i)) for i in range(library.ggml_backend_reg_count()))
    names = {library.ggml_backend_reg_name(ctypes.c_void_p(pointer)).decode() for pointer in pointers}
    return sorted(names - _WITHOUT_CARDS)


def _devices() -> Iterator[tuple[str | None, Card]]:
    library: Any = ll._lib
    library.ggml_backend_dev_count.restype = ctypes.c_size_t
    library.ggml_backend_dev_get.restype = ctypes.c_void_p
    for number in range(library.ggml_backend_dev_count()):
        pointer = library.ggml_backend_dev_get(ctypes.c_size_t(number))
        props = _Props()
        library.ggml_backend_dev_get_props(ctypes.c_void_p(pointer), ctypes.byref(props))
        if props.type in (_GPU, _INTEGRATED):
            yield (
                props.device_id.decode() if props.device_id else None,
                Card(
                    props.name.decode(),
                    CardMemory(props.memory_free, props.memory_total),
                    props.description.decode(errors="replace").strip(),
                    props.type == _INTEGRATED,
                    pointer,
                ),
            )


def has_attention(device: int, shape: ModelShape, kind: CacheType) -> bool:
    """Whether a ggml device computes flash attention for a model's heads with a cache of `kind`.

    It is asked as llama.cpp itself asks when it gives each operation of a step to a device: with tensors of the right
    types and shapes, for which no memory is taken.
    """
    library: Any = ll._lib
    kv_heads = max(shape.kv_heads)
    if kv_heads == 0:
        return True
    if shape.key_dim % TENSOR_TYPES[kind.key_type].values or shape.value_dim % TENSOR_TYPES[kind.value_type].values:
        return False
    library.ggml_backend_dev_supports_op.restype = ctypes.c_bool
    with Tensors(tensor_bytes(8), have_data=False) as tensors:
        sources = (
            tensors.new(ll.GGML_TYPE_F32, shape.key_dim, _ROWS, shape.num_heads),
            tensors.new(kind.key_type, shape.key_dim, _CELLS, kv_heads),
            tensors.new(kind.value_type, shape.value_dim, _CELLS, kv_heads),
            tensors.new(ll.GGML_TYPE_F16, _CELLS, _ROWS, 1),
        )
        attention = tensors.attention(sources, scale=1.0, max_bias=0.0, softcap=0.0)
        return bool(library.ggml_backend_dev_supports_op(ctypes.c_void_p(device), ctypes.c_void_p(attention)))
