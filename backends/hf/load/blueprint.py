"""A model before its weights are read: the module tree, and which tensor goes where, checked as far as headers tell."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tightrope.backends.devices.choice import has_bfloat16
from tightrope.backends.errors import BackendError
from tightrope.backends.files.hf_config import ModelShape
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.files.tensor_names import FileNames
from tightrope.backends.hf.adapters.file_tables import Tables
from tightrope.backends.hf.adapters.rows import Adapters
from tightrope.backends.hf.load import patterns
from tightrope.backends.hf.load.assembly import Assembly, assemble
from tightrope.backends.hf.load.loader import apart, dtype_of, tie
from tightrope.backends.hf.load.matching import LeftOver, check_all, choose, notes_on
from tightrope.backends.hf.load.skeleton import build_skeleton
from tightrope.backends.hf.load.specialise import specialise
from tightrope.backends.hf.load.stages import LayOut, Stages
from tightrope.backends.hf.load.trace import trace_model
from tightrope.backends.hf.load.weights import Weight
from tightrope.backends.hf.modules.embedding import Embedding
from tightrope.backends.hf.modules.layer import Stack
from tightrope.backends.hf.modules.linear import Linear
from tightrope.backends.hf.modules.rotary import fix_rotary
from tightrope.backends.hf.modules.step import CurrentStep, LayerInfo
from tightrope.backends.hf.modules.whole import WholeModel
from tightrope.backends.quant.find import (
    Quantization,
    describe_format,
    find_quantization,
    note_on_plain,
    stated_and_not_found,
    weight_bytes,
)
from tightrope.backends.quant.packings import check_packing
from tightrope.backends.rope.scaling import RopeSpec
from tightrope.backends.settings import Dtype
from tightrope.backends.tensor_parallel import ALONE, Share, local_shape
from tightrope.kernels import dispatch

DTYPES_BY_NAME = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class StagePart:
    """What is loaded onto the device of one stage; `current` is the step as its modules have it."""

    current: CurrentStep
    num_layers: int
    weights: tuple[Weight, ...]
    assemblies: tuple[Assembly, ...]


@dataclass(frozen=True, slots=True)
class Blueprint:
    """Everything that loading needs; `tree` has our modules in place, and no weights yet.

    Weights, their bytes and `layers` are those of `share`, a rank's of the model, and so are the sizes in `local`.
    `parts` are the stages of a model that lies on several devices, else one.
    """

    shape: ModelShape
    checkpoint: Checkpoint
    tree: PreTrainedModel
    stages: Stages
    parts: tuple[StagePart, ...]
    layers: tuple[LayerInfo, ...]
    whole: WholeModel | None  # The tree, where it is of our modules from end to end.
    kept: tuple[str, ...]  # Classes of transformers that attend, or stack layers, in their own way.
    names: FileNames
    quantization: Quantization | None
    left: LeftOver
    has_plain_head: bool
    tied: tuple[str, str] | None  # Names of head and embedding, one weight if the files' are equal.
    adapters: Adapters  # None is loaded yet.
    notes: tuple[str, ...]
    share: Share

    @property
    def local(self) -> ModelShape:
        """The sizes of what this rank computes; see local_shape."""
        return local_shape(self.shape, self.share, attends_by_heads=self.attends_by_heads)

    @property
    def attends_by_heads(self) -> bool:
        """Whether ranks share out the heads of some layers, and not each attends all."""
        return any(layer.all_kv_heads for layer in self.layers)

    @property
    def device(self) -> torch.device:
        """That of the first layers."""
        return self.parts[0].current.device

    @property
    def activation_dtype(self) -> torch.dtype:
        """That of hidden states there."""
        return self.parts[0].current.dtype

    @property
    def weights(self) -> tuple[Weight, ...]:
        return tuple(weight for part in self.parts for weight in part.weights)

    @property
    def assemblies(self) -> tuple[Assembly, ...]:
        return tuple(assembly for part in self.parts for assembly in part.assemblies)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights once loaded."""
        if self.share != ALONE:
            return sum(self.block_sizes) + sum(self.other_sizes) + self.host_bytes
        tensors = self.checkpoint.tensors
        size = weight_bytes(self.checkpoint, self.quantization, is_tied=self.shape.tie_embeddings)
        return size - sum(tensors[name].num_bytes for name in self.left.names)

    @property
    def block_sizes(self) -> list[int]:
        """Bytes of each tensor that loading puts onto a card, in one block."""
        return [size for part in self.parts for size in self.block_sizes_of(part)]

    def block_sizes_of(self, part: StagePart) -> list[int]:
        """The same for one stage."""
        head = None if self.tied is None else self.tied[0]  # It is one tensor with the embedding.
        kept = [w for w in part.weights if not w.stays_on_host and w.sources[0][0].name != head]
        linears = [] if self.is_exllama else [a for a in part.assemblies if not a.are_experts]
        return [*map(self._num_bytes, kept), *_sizes(linears)]

    @property
    def other_sizes(self) -> list[int]:
        """Those of tensors outside of the block: of experts, and what exllamav2 has taken over."""
        return [size for part in self.parts for size in self.other_sizes_of(part)]

    def other_sizes_of(self, part: StagePart) -> list[int]:
        """The same for one stage."""
        return _sizes(a for a in part.assemblies if a.are_experts or self.is_exllama)

    def file_bytes_of(self, part: StagePart) -> int:
        """Bytes of a stage's tensors in the files, which are about what they take in the machine's memory."""
        names = {one.name for weight in part.weights for one in choose(weight, self.checkpoint, self.names)}
        names |= {name for assembly in part.assemblies for source in assembly.sources for name in source.tensors}
        return sum(self.checkpoint.tensors[name].num_bytes for name in names)

    @property
    def is_exllama(self) -> bool:
        """Whether exllamav2's kernels run the linears, or most of them."""
        kind = None if self.quantization is None else self.quantization.format.name
        return kind in ("EXL2", "GPTQ") and dispatch.has_exllama()

    @property
    def host_bytes(self) -> int:
        """Bytes of the weights that stay in the machine's own memory beside a card."""
        return sum(self._num_bytes(weight) for weight in self.weights if weight.stays_on_host)

    def _num_bytes(self, weight: Weight) -> int:
        parts = choose(weight, self.checkpoint, self.names)
        return prod(weight.shape) * dtype_of(weight, parts, self.checkpoint).itemsize

    @property
    def format(self) -> str:
        return describe_format(self.shape.dtype, self.quantization)


def _sizes(assemblies: Iterable[Assembly]) -> list[int]:
    return [size for assembly in assemblies for source in assembly.sources for size in source.num_bytes]


def draw(
    folder: Path, shape: ModelShape, checkpoint: Checkpoint, rope: Mapping[str, RopeSpec] | None = None,
    device: torch.device | str = "cpu", asked: Dtype = "auto", quantization: Quantization | None = None,
    share: Share = ALONE, lay_out: LayOut | None = None,
) -> Blueprint:  # fmt: skip
    """The blueprint of the model that `folder`/config.json describes. Some milliseconds a layer; reads no weights.

    `rope` are the resolved rotations by the keys of a step's tables; without them the model's own are used, and the
    keys are its layer types if these rotate differently, else "default". `asked`: see activation_dtype. quantization:
    that of other files than a folder's, which is looked for. share: the rank whose part of the model it is. lay_out:
    where the layers go; None is all to `device`. Raises BackendError for a model that can't be served, and for tensors
    that are missing, that don't fit it, or of a format that isn't read.
    """
    placement = [(torch.device(device), shape.num_layers)] if lay_out is None else lay_out(shape.num_layers)
    currents = [CurrentStep(where, activation_dtype(asked, shape.dtype, where)) for where, _ in placement]
    model = build_skeleton(folder, shape, rope)
    head, table = (_name_of(model, part) for part in (model.get_output_embeddings(), model.get_input_embeddings()))
    seen = trace_model(model)
    is_plain = patterns.is_scored_plainly(model, seen)
    stages = Stages(model, seen, currents, [count for _, count in placement])
    specialised = specialise(model, seen, _rope_keys(model, rope), stages, share)
    stages.connect(model)
    whole, base = None, model.base_model
    if isinstance(ours := model.get_submodule(head), Linear):
        ours.is_head = True
        if is_plain and isinstance(base, Stack):
            whole = WholeModel(base, ours)
    if rope is not None:
        fix_rotary(model, rope)
    names = FileNames(
        checkpoint.tensors.keys(), model.base_model_prefix, model._keys_to_ignore_on_load_unexpected or ()
    )
    check_packing(checkpoint, [name for name in checkpoint.tensors if not names.may_be_left(name)], shape.raw)
    quantization = quantization or find_quantization(folder, shape.raw, checkpoint)
    ends = (head, table) if shape.tie_embeddings else None
    found = [
        assemble(wants, quantization, names, current.device, ends if len(currents) == 1 else None)
        for current, wants in zip(currents, stages.share(specialised.wants), strict=True)
    ]
    # A quantized head stands for itself, whatever config.json says: EXL2 stores one for tied models, too.
    has_plain_head = any(weight.sources[0][0].name == f"{head}.weight" for weight in found[-1][0])
    tied = (f"{head}.weight", f"{table}.weight") if shape.tie_embeddings and has_plain_head else None
    shares = [weights for weights, _ in found]
    if tied is not None and len(currents) > 1:  # Either end has its own.
        shares[0], shares[-1] = apart(shares[0], shares[-1], *tied)
        tied = None
    if tied is not None:
        shares[0] = tie(shares[0], *tied, names)
    elif currents[0].device.type != "cpu":
        shares[0] = table_on_host(shares[0], embedding_of(model, table))
    parts = tuple(
        StagePart(current, count, tuple(weights), tuple(assemblies))
        for current, (_, count), weights, (_, assemblies) in zip(currents, placement, shares, found, strict=True)
    )
    try:
        left = check_all(
            [weight for part in parts for weight in part.weights],
            [assembly for part in parts for assembly in part.assemblies],
            checkpoint,
            names,
        )
    except BackendError as error:
        stated = stated_and_not_found(folder, shape.raw) if quantization is None else None
        raise stated or error from None
    plain = note_on_plain(folder, shape.raw) if quantization is None else None
    return Blueprint(
        shape=shape,
        checkpoint=checkpoint,
        tree=model,
        stages=stages,
        parts=parts,
        layers=specialised.layers,
        whole=whole,
        kept=specialised.kept,
        names=names,
        quantization=quantization,
        left=left,
        has_plain_head=has_plain_head,
        tied=tied,
        adapters=_adapters(model, stages, (table, head), shape, partial(_read, checkpoint, names, ends)),
        notes=(
            *(f"{name} runs as transformers has it" for name in specialised.kept),
            *notes_on(left, checkpoint),
            *([] if plain is None else [plain]),
        ),
        share=share,
    )


def activation_dtype(asked: Dtype, stored: str, device: torch.device) -> torch.dtype:
    """What hidden states are held in; `stored` is the dtype that config.json tells.

    On a CPU it is float32, whatever is asked for. Elsewhere "auto" is the stored one if it has sixteen bits, and
    bfloat16 in the place of float32: products of 32 bits would run without a card's matrix units. An old card that has
    no bfloat16 takes float16. Raises BackendError where the former is asked for.
    """
    if device.type == "cpu":
        return torch.float32
    wanted = asked if asked != "auto" else "bfloat16" if stored == "float32" else stored
    if wanted == "bfloat16" and not has_bfloat16(device):
        if asked == "bfloat16":
            raise BackendError("--dtype bfloat16: the card has none; take float16")
        return torch.float16
    return DTYPES_BY_NAME[wanted]


def table_on_host(weights: list[Weight], embedding: Embedding | None) -> list[Weight]:
    """The same with the embedding's table in the machine's own memory: a step needs but few rows of it on the card."""
    if embedding is None:
        return weights
    embedding.is_on_host = True
    name = f"{embedding.name}.weight"
    return [replace(w, stays_on_host=True) if w.sources[0][0].name == name else w for w in weights]


def embedding_of(model: nn.Module, name: str) -> Embedding | None:
    """The embedding of that name, where it is ours."""
    return next((m for m in model.modules() if isinstance(m, Embedding) and m.name == name), None)


def _adapters(
    model: nn.Module, stages: Stages, names: tuple[str, str], shape: ModelShape, read: Callable[[str], Tensor]
) -> Adapters:
    """The room for adapters; names: of embedding and head. read: see Tables."""
    embedding = embedding_of(model, names[0])
    head = next((m for m in model.modules() if isinstance(m, Linear) and m.is_head), None)
    tables = Tables(embedding, head, names, shape.tie_embeddings, shape.vocab_size, shape.hidden_size, read)
    return Adapters(model, stages.of, tables)


def _read(checkpoint: Checkpoint, names: FileNames, tied: tuple[str, str] | None, name: str) -> Tensor:
    """A tensor of the files, or that of a table which is tied to it."""
    kind = name.rpartition(".")[2]
    found = names.find([name]) or next(filter(None, (names.find([f"{table}.{kind}"]) for table in tied or ())))
    return checkpoint.read(found[0])


def _name_of(model: nn.Module, part: nn.Module) -> str:
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[part]


def _rope_keys(model: PreTrainedModel, rope: Mapping[str, RopeSpec] | None) -> Collection[str]:
    if rope is not None:
        return rope.keys()
    parameters = model.config.get_text_config().to_dict().get("rope_parameters") or {}
    return [key for key, value in parameters.items() if isinstance(value, dict)] or ["default"]
