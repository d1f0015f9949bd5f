"""Whole models on the meta device, as a card would hold them: sizes of real ones, and no number of their weights.

Everything is the server's own, from the headers to the module tree, but for what a file's contents say of a quantized
matrix, and for the launch of a kernel, which is counted and doesn't run.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.jit import JITFunction

from bench.gpu.cases import make_step, make_table
from bench.gpu.matrices import GROUP_ROWS, exl2_bits
from bench.gpu.random_weights import FILE, Sizes, exl2_entries, gptq_entries, plain_entries
from tightrope.backends.files.hf_config import read_config
from tightrope.backends.files.safetensors import Checkpoint, Shard, TensorEntry
from tightrope.backends.hf.load.blueprint import Blueprint, draw
from tightrope.backends.hf.load.model import LoadedModel, build
from tightrope.backends.quant.awq import Awq
from tightrope.backends.quant.exl2 import Exl2
from tightrope.backends.quant.format import Packed
from tightrope.backends.quant.gptq import Gptq
from tightrope.backends.quant.nf4 import Nf4
from tightrope.backends.tensor_parallel import ALONE, Share
from tightrope.kernels import dispatch
from tightrope.kernels.forms.expanded import expanded_cache_bytes
from tightrope.kernels.forms.layout import CacheFormat, LayerCache, RopeTable, StepLayout
from tightrope.kernels.forms.quantized import TILE, Nf4Matrix, QuantizedMatrix, arrange
from tightrope.kernels.triton import attention, expanded, ops

META = torch.device("meta")
PROCESSORS = 82  # An RTX 3090's.
DENSE: Sizes = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
MIXTURE: Sizes = {**DENSE, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2}
BLOCKSIZE = 64  # of nf4
_STATE = "weight.quant_state.bitsandbytes__nf4"
_SHAPES: dict[str, tuple[int, int]] = {}  # [N, K] of matrices of nf4, by the names of their states
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I16": torch.int16, "I32": torch.int32}

empty = partial(torch.empty, device=META)


class Headers(Checkpoint):
    """A checkpoint of sizes alone. The little JSON beside a matrix of nf4 is there, as headers are."""

    __slots__ = ()

    def whole(self, name: str) -> Tensor:
        entry = self.tensors[name]
        if name.endswith(_STATE):
            return torch.frombuffer(bytearray(_state(*_SHAPES[name])), dtype=torch.uint8)
        return empty(entry.shape, dtype=_DTYPES.get(entry.dtype, torch.uint8))

    def release(self, shard: Shard) -> None:
        """Nothing is mapped."""

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """There is nothing to check."""


def awq_entries(sizes: Sizes) -> list[TensorEntry]:
    """AWQ of 4 bits, whose head is plain."""
    return [part for entry in plain_entries(sizes) for part in _packed(entry, _awq)]


def nf4_entries(sizes: Sizes) -> list[TensorEntry]:
    """bitsandbytes' nf4, whose head is plain."""
    return [part for entry in plain_entries(sizes) for part in _packed(entry, _nf4)]


def _packed(entry: TensorEntry, parts: Callable[[str, int, int], list[TensorEntry]]) -> list[TensorEntry]:
    if not entry.name.endswith("_proj.weight"):
        return [entry]
    return parts(entry.name.removesuffix(".weight"), *entry.shape)


def _awq(module: str, outputs: int, inputs: int) -> list[TensorEntry]:
    groups = inputs // GROUP_ROWS
    return [
        _entry(f"{module}.qweight", "I32", 4, (inputs, outputs // 8)),
        _entry(f"{module}.qzeros", "I32", 4, (groups, outputs // 8)),
        _entry(f"{module}.scales", "F16", 2, (groups, outputs)),
    ]


def _nf4(module: str, outputs: int, inputs: int) -> list[TensorEntry]:
    _SHAPES[f"{module}.{_STATE}"] = outputs, inputs
    return [
        _entry(f"{module}.weight", "U8", 1, (outputs * inputs // 2, 1)),
        _entry(f"{module}.weight.absmax", "F32", 4, (outputs * inputs // BLOCKSIZE,)),
        _entry(f"{module}.weight.quant_map", "F32", 4, (16,)),
        _entry(f"{module}.{_STATE}", "U8", 1, (len(_state(outputs, inputs)),)),
    ]


def _state(outputs: int, inputs: int) -> bytes:
    return json.dumps({"shape": [outputs, inputs], "blocksize": BLOCKSIZE}).encode()


def _entry(name: str, dtype: str, width: int, shape: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(name, dtype, shape, FILE, 0, width * prod(shape))


def _build_gptq(format: Gptq, packed: Packed, num_inputs: int, num_outputs: int) -> QuantizedMatrix:
    return _integers(num_inputs, num_outputs, [4] * (num_inputs // GROUP_ROWS))


def _build_awq(format: Awq, packed: Packed, num_inputs: int, num_outputs: int) -> QuantizedMatrix:
    matrix = _integers(num_inputs, num_outputs, [4] * (num_inputs // GROUP_ROWS))
    assert matrix.scales is not None
    return replace(matrix, zeros=empty(matrix.scales.shape, dtype=torch.int16))


def _build_exl2(format: Exl2, packed: Packed, num_inputs: int, num_outputs: int) -> QuantizedMatrix:
    matrix = _integers(num_inputs, num_outputs, exl2_bits(num_inputs), is_permuted=True)
    assert matrix.scales is not None
    codes, largest = empty(matrix.scales.shape, dtype=torch.uint8), empty(num_inputs // GROUP_ROWS)
    return replace(matrix, scales=None, scale_codes=codes, group_max=largest)


def _build_nf4(format: Nf4, packed: Packed, num_inputs: int, num_outputs: int) -> Nf4Matrix:
    tiles = -(-num_outputs // TILE)
    codes = empty(tiles, num_inputs // 8, TILE, dtype=torch.int32)
    return Nf4Matrix(num_inputs, num_outputs, BLOCKSIZE, empty(16), codes, empty(tiles, num_inputs // BLOCKSIZE, TILE))


def _integers(num_inputs: int, num_outputs: int, bits: Sequence[int], *, is_permuted: bool = False) -> QuantizedMatrix:
    order = torch.arange(num_inputs, dtype=torch.int32)
    rows = arrange(order.flip(0) if is_permuted else order, [GROUP_ROWS] * len(bits), bits)
    tiles = -(-num_outputs // TILE)
    return QuantizedMatrix(
        num_inputs,
        num_outputs,
        rows.source,
        rows.group_starts,
        rows.group_bits,
        empty(tiles, sum(bits) * GROUP_ROWS * TILE // 8, dtype=torch.uint8),
        scales=empty(tiles, len(bits), TILE, dtype=torch.float16),
    )


@dataclass(frozen=True)
class Kind:
    """A form of weights, and the sizes of a model that has it."""

    sizes: Sizes
    entries: Callable[[Sizes], list[TensorEntry]]


KINDS: Mapping[str, Kind] = {
    "bf16": Kind(DENSE, plain_entries),
    "GPTQ": Kind(DENSE, gptq_entries),
    "EXL2": Kind(DENSE, exl2_entries),
    "AWQ": Kind(DENSE, awq_entries),
    "nf4": Kind(DENSE, nf4_entries),
    "Mixtral-GPTQ": Kind(MIXTURE, gptq_entries),
}


def _flash(query: Tensor, key: Tensor, value: Tensor, **given: object) -> Tensor:
    """The kernel that a card's torch takes; the meta device would take the plain one, with all scores at a time."""
    attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return attended


@dataclass
class Launches:
    """How many kernels of ours were launched, by name; none of them ran."""

    by_name: dict[str, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(self.by_name.values())

    def note(self, kernel: Any, *args: object, **kwargs: object) -> None:  # noqa: ANN401  Triton has no types
        name = kernel.fn.__name__
        self.by_name[name] = self.by_name.get(name, 0) + 1


@contextmanager
def pretending() -> Iterator[Launches]:
    """Meanwhile the meta device is a card: matrices take the forms for one, and its kernels' launches are counted."""
    launches = Launches()
    with pytest.MonkeyPatch.context() as patch:
        for format, make in ((Gptq, _build_gptq), (Awq, _build_awq), (Exl2, _build_exl2), (Nf4, _build_nf4)):
            patch.setattr(format, "build", make)
        patch.setattr(dispatch, "reads_columns", lambda device: True)
        patch.setattr(dispatch, "_kernels_for", lambda x: ops)
        patch.setattr(expanded, "causal_lower_right", lambda *lengths: None)  # No mode lets such a tensor be made.
        patch.setattr(F, "scaled_dot_product_attention", _flash)
        patch.setattr(attention, "num_processors", lambda device: PROCESSORS)
        patch.setattr(JITFunction, "run", lambda kernel, *args, **kwargs: launches.note(kernel, *args, **kwargs))
        yield launches


@cache
def meta_model(name: str, num_layers: int, share: Share = ALONE) -> tuple[LoadedModel, Blueprint]:
    """The model of a kind, as a rank has it, and what it was drawn from; to be made and used while pretending."""
    kind = KINDS[name]
    sizes = {**kind.sizes, "num_hidden_layers": num_layers}
    entries = {entry.name: entry for entry in kind.entries(sizes)}
    family = "Mixtral" if "num_local_experts" in sizes else "Llama"
    config = {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "dtype": "bfloat16" if next(iter(entries.values())).dtype == "BF16" else "float16",
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        **sizes,
    }
    with TemporaryDirectory() as path:
        folder = Path(path)
        (folder / "config.json").write_text(json.dumps(config))
        headers = Headers(folder, entries, (Shard(FILE, tuple(entries)),))
        blueprint = draw(folder, read_config(folder), headers, device=META, share=share)
        return build(blueprint), blueprint


@dataclass(frozen=True)
class MetaStep:
    """A step of `lengths`: tokens in it, and cached with them, of each sequence."""

    token_ids: Tensor
    layout: StepLayout
    tables: Mapping[str, RopeTable]
    caches: list[LayerCache]

    @classmethod
    def of(cls, model: LoadedModel, lengths: Sequence[tuple[int, int]]) -> "MetaStep":
        layer = model.layers[0]
        layout, num_pages = make_step(tuple(lengths), torch.device("cpu"))
        table = make_table(layer.head_dim, layout.max_context_len, len(lengths), META)
        size = expanded_cache_bytes(layout.max_context_len, layer.num_kv_heads, layer.head_dim)
        format = CacheFormat("q8", layer.num_kv_heads, layer.head_dim)
        return cls(
            empty(len(layout.slots), dtype=torch.int64),
            replace(layout.to(META), scratch=empty(size, dtype=torch.uint8)),
            {"default": table},
            [LayerCache.allocate(format, num_pages, META) for _ in model.layers],
        )

    def run(self, model: LoadedModel, num_rows: int) -> Tensor:
        """Logits of the last rows."""
        rows = empty(num_rows, dtype=torch.int64)
        return model.forward(self.caches, self.token_ids, self.layout, self.tables, rows)
