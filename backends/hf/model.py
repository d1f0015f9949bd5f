"""A loaded model: token ids and a step's layout in, logits out."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tightrope.backends.hf.adapters import Adapters
from tightrope.backends.hf.assembly import assemble
from tightrope.backends.hf.attention import CurrentStep, LayerInfo
from tightrope.backends.hf.checkpoint import Checkpoint
from tightrope.backends.hf.config import ModelShape
from tightrope.backends.hf.loader import load_weights, share
from tightrope.backends.hf.names import FileNames
from tightrope.backends.hf.organs import Experts, Linear
from tightrope.backends.hf.quantised import find_quantization
from tightrope.backends.hf.rehearsal import rehearse
from tightrope.backends.hf.rotary import fix_rotary
from tightrope.backends.hf.skeleton import build_skeleton
from tightrope.backends.hf.transplant import transplant
from tightrope.backends.rope import RopeSpec
from tightrope.kernels import dispatch
from tightrope.kernels.layer import StackedExperts
from tightrope.kernels.layout import LayerCache, RopeTable, StepLayout
from tightrope.kernels.low_rank import AdapterRows

DTYPES_BY_NAME = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

__all__ = ["LayerInfo", "LoadedModel", "load_model"]


class LoadedModel:
    """A causal language model over our cache. One step at a time.

    `tree` is its module tree, `layers` are its attention layers in order, `activation_dtype` is that of hidden states
    (float32 on a CPU), and `notes` say what of transformers' own code runs.
    """

    def __init__(
        self, model: PreTrainedModel, current: CurrentStep, layers: tuple[LayerInfo, ...], notes: tuple[str, ...],
        device: torch.device, activation_dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.tree, self._current = model, current
        self.layers, self.notes, self.device, self.activation_dtype = layers, notes, device, activation_dtype
        self.vocab_size: int = model.config.get_text_config().vocab_size
        # on a CPU sixteen bits for what is read in each step; what is added is small
        low_rank_dtype = torch.float16 if device.type == "cpu" else activation_dtype
        self.adapters = Adapters(model, device, low_rank_dtype)

    @property
    def picks_experts_on_card(self) -> bool:
        """Whether no step waits to learn which experts were picked; asked of mixtures alone."""
        found = [organ for organ in self.tree.modules() if isinstance(organ, Experts)]
        return bool(found) and all(isinstance(organ.whole, StackedExperts) for organ in found)

    def attach(self, caches: Sequence[LayerCache]) -> None:
        """Use these caches, one a layer, from now on."""
        assert len(caches) == len(self.layers)
        self._current.caches = tuple(caches)

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, step: StepLayout, tables: Mapping[str, RopeTable], rows: Tensor,
        adapters: AdapterRows | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [len(rows), V] float32 of the given rows [int64] of token_ids [T] int64.

        Stores the step's keys and values. `tables` has one for each `rope` of `layers`; `adapters` says which of the
        token_ids use which.
        """
        self._current.layout, self._current.tables = step, tables
        self._current.adapters = adapters
        self._current.head_adapters = None if adapters is None else adapters.at(rows)
        output = self.tree(
            input_ids=token_ids.unsqueeze(0),
            position_ids=step.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=rows,
        )
        logits: Tensor = output.logits
        return logits[0].float()


def load_model(
    folder: Path,
    shape: ModelShape,
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    rope: Mapping[str, RopeSpec] | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> LoadedModel:
    """Build and fill the model that `folder`/config.json describes.

    `rope` are the resolved rotations by the keys of a step's tables; without them the model's own are used, and the
    keys are its layer types if these rotate differently, else "default". Raises BackendError for a model that can't be
    served, and for weights that don't fit it.
    """
    device = torch.device(device)
    dtype = torch.float32 if device.type == "cpu" else DTYPES_BY_NAME[shape.dtype]
    model = build_skeleton(folder, shape, rope)
    head, table = (_name_of(model, part) for part in (model.get_output_embeddings(), model.get_input_embeddings()))
    current = CurrentStep()
    planted = transplant(model, rehearse(model), _rope_keys(model, rope), current, dtype)
    if isinstance(organ := model.get_submodule(head), Linear):
        organ.is_head = True
    if rope is not None:
        fix_rotary(model, rope)
    notes = [f"{name} runs as transformers has it" for name in planted.kept]
    names = FileNames(
        checkpoint.tensors.keys(), model.base_model_prefix, model._keys_to_ignore_on_load_unexpected or ()
    )
    quantization = find_quantization(folder, shape.raw, checkpoint)
    if quantization is not None:
        kernels = dispatch.describe(device, is_exl2=quantization.format.name == "EXL2")
        notes.append(f"weights: {quantization.describe()}, run by {kernels} kernels")
    weights, assemblies = assemble(planted.wants, quantization, names, device)
    # a quantised head stands for itself, whatever config.json says: EXL2 stores one for tied models, too
    has_plain_head = any(weight.sources[0][0].name == f"{head}.weight" for weight in weights)
    if shape.tie_embeddings and has_plain_head:
        weights, note = share(weights, f"{head}.weight", f"{table}.weight", checkpoint, names)
        notes += [] if note is None else [note]
    load_weights(weights, assemblies, checkpoint, names, device, progress)
    for module in model.modules():
        if isinstance(module, Experts):
            module.settle()
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return LoadedModel(model, current, planted.layers, tuple(notes), device, dtype)


def _name_of(model: nn.Module, part: nn.Module) -> str:
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[part]


def _rope_keys(model: PreTrainedModel, rope: Mapping[str, RopeSpec] | None) -> Collection[str]:
    if rope is not None:
        return rope.keys()
    parameters = model.config.get_text_config().to_dict().get("rope_parameters") or {}
    return [key for key, value in parameters.items() if isinstance(value, dict)] or ["default"]
