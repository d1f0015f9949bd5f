"""A loaded model: weights in their modules, without a cache."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tightrope.backends.hf.adapters.rows import Adapters
from tightrope.backends.hf.load.arena import Arena, arena_bytes
from tightrope.backends.hf.load.blueprint import Blueprint
from tightrope.backends.hf.load.loader import load_weights, share
from tightrope.backends.hf.modules.carry import launching_on
from tightrope.backends.hf.modules.embedding import Embedding
from tightrope.backends.hf.modules.experts import Experts
from tightrope.backends.hf.modules.linear import Linear
from tightrope.backends.hf.modules.matrices import read_by, runs_exllama, widths_of
from tightrope.backends.hf.modules.step import CurrentStep, LayerInfo, StepOn
from tightrope.backends.hf.modules.whole import WholeModel
from tightrope.backends.tensor_parallel import Share
from tightrope.kernels import dispatch
from tightrope.kernels.forms.layer import StackedExperts
from tightrope.kernels.forms.layout import LayerCache, RopeTable, StepLayout
from tightrope.kernels.forms.low_rank import AdapterRows


class LoadedModel:
    """A causal language model over a cache that each step brings along. One step at a time.

    `tree` is its module tree, `layers` are its attention layers in order, `activation_dtype` is that of hidden states
    (float32 on a CPU), and `notes` say what of transformers' own code runs. Where layers lie on several devices, the
    one after the other, `device` and `activation_dtype` are those of the first, and `currents` has a step for each.
    `share` is the rank's that it is, which gathers by `current`, as its modules know a step.
    """

    def __init__(
        self, model: PreTrainedModel, stages: Sequence[tuple[CurrentStep, int]], layers: tuple[LayerInfo, ...],
        notes: tuple[str, ...], adapters: Adapters, share: Share, whole: WholeModel | None,
    ) -> None:  # fmt: skip
        """stages: the step as the modules on each device have it, and how many of the layers these are.

        whole: the tree, where it is of our modules from end to end.
        """
        self._whole = whole
        self.tree, self.layers, self.notes, self.share = model, layers, notes, share
        self.currents = tuple(current for current, _ in stages)
        self.current = self.currents[0]
        self.device, self.activation_dtype = self.current.device, self.current.dtype
        devices = [current.device for current in self.currents]
        self._card = next((device for device in devices if device.type == "cuda"), self.device)
        self.layer_devices = tuple(current.device for current, count in stages for _ in range(count))
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.adapters = adapters
        self._host_table = next((m for m in model.modules() if isinstance(m, Embedding) and m.is_on_host), None)

    @property
    def picks_experts_on_card(self) -> bool:
        """Whether no step waits to learn which experts were picked; asked of mixtures alone."""
        found = [module for module in self.tree.modules() if isinstance(module, Experts)]
        return bool(found) and all(isinstance(module.whole, StackedExperts) for module in found)

    def embedded(self, token_ids: Tensor) -> Tensor | None:
        """The embedding's rows [T, hidden] for token_ids [T], moved to the device, in the file's dtype.

        None where the whole table is there already. Token ids on a card are read from it, which is to be waited for.
        """
        table = self._host_table
        if table is None:
            return None
        assert isinstance(table.weight, Tensor)
        return table.gathered(token_ids.to(table.weight.device)).to(self.device)

    @torch.inference_mode()
    def forward(
        self, caches: Sequence[LayerCache], token_ids: Tensor, step: StepLayout, tables: Mapping[str, RopeTable],
        rows: Tensor, adapters: AdapterRows | None = None, embedded: Tensor | None = None, later: Sequence[StepOn] = (),
    ) -> Tensor:  # fmt: skip
        """Logits [len(rows), V] float32 of the given rows [int64] of token_ids [T] int64.

        V is larger where an adapter of the step knows more tokens. Stores the step's keys and values into `caches`, one
        for each of `layers`. `tables` has one for each `rope` of these; `adapters` says which of the token_ids use
        which, and `embedded` is what `embedded` gives for them. All is on the model's device. Where layers lie on
        several, `later` is the same step for each of the others, and `rows` is on the last.
        """
        embedded = self.embedded(token_ids) if embedded is None else embedded
        steps = StepOn(step, tables, adapters), *later
        for current, own in zip(self.currents, steps, strict=True):
            current.begin(caches, own)
        self.currents[0].embedded = embedded
        head_adapters = None if (last := steps[-1].adapters) is None else last.at(rows)
        self.currents[-1].head_adapters = head_adapters
        with launching_on(self._card):
            if self._whole is not None:
                logits = self._whole.run(token_ids, rows).float()
            else:
                positions = step.positions.unsqueeze(0)
                asked = {"position_ids": positions, "use_cache": False, "logits_to_keep": rows}
                logits = self.tree(input_ids=token_ids.unsqueeze(0), **asked).logits[0].float()
        return logits if head_adapters is None else self.adapters.ruled_out(logits, head_adapters)


def _share_kernels(tree: nn.Module) -> None:
    """Have one kernel read all quantized matrices of a card, whatever widths they have.

    Compiling takes seconds for each width. Sets of widths differ from matrix to matrix in an EXL2 model, and a kernel
    for each would be compiled for minutes; a launch for each width would leave most of the card idle at its end.
    """
    linears = [module for module in tree.modules() if isinstance(module, Linear)]
    mixtures = [module for module in tree.modules() if isinstance(module, Experts)]
    of_experts = [weight for module in mixtures for weight in (*module.gate_up, *module.down)]
    widths = widths_of([*(linear.weight for linear in linears), *of_experts])
    for linear in linears:
        linear.weight = read_by(linear.weight, widths)
    for module in mixtures:
        module.gate_up, module.down = (
            weights if isinstance(weights, Tensor) else [read_by(weight, widths) for weight in weights]
            for weights in (module.gate_up, module.down)
        )


def build(
    blueprint: Blueprint, progress: Callable[[float], None] = lambda share: None, num_threads: int = 1
) -> LoadedModel:
    """Fill the model, once. Raises BackendError for weights that can't be. num_threads: of a CPU."""
    model, checkpoint, names = blueprint.tree, blueprint.checkpoint, blueprint.names
    notes = list(blueprint.notes)
    quantization = blueprint.quantization
    weights = [list(part.weights) for part in blueprint.parts]
    if blueprint.tied is not None:
        weights[0], note = share(weights[0], *blueprint.tied, checkpoint, names)
        notes += [] if note is None else [note]
    sizes = [blueprint.file_bytes_of(part) for part in blueprint.parts]
    for number, part in enumerate(blueprint.parts):
        done, size = sum(sizes[:number]), sizes[number]
        device = part.current.device
        block = blueprint.block_sizes_of(part)
        arena = None if device.type == "cpu" else Arena(arena_bytes(block), device)
        at_a_time = num_threads if device.type == "cpu" else 1
        told = partial(_tell, progress, done / sum(sizes), size / sum(sizes))
        load_weights(weights[number], part.assemblies, checkpoint, names, device, told, arena, at_a_time)
    devices = dict.fromkeys(part.current.device for part in blueprint.parts)
    if quantization is not None:
        linears = [module for module in model.modules() if isinstance(module, Linear)]
        is_exllama = any(runs_exllama(linear.weight) for linear in linears)
        kernels = " and ".join(dict.fromkeys(dispatch.describe(one, is_exllama=is_exllama) for one in devices))
        notes.append(f"weights: {quantization.describe()}, run by {kernels} kernels")
    _share_kernels(model)
    for module in model.modules():
        if isinstance(module, Experts):
            module.settle()
        for name, buffer in module.named_buffers(recurse=False):
            where = module.current if isinstance(module, Embedding) else blueprint.stages.of_module(module)
            module._buffers[name] = buffer.to(where.device)
    stages = [(part.current, part.num_layers) for part in blueprint.parts]
    return LoadedModel(
        model, stages, blueprint.layers, tuple(notes), blueprint.adapters, blueprint.share, blueprint.whole
    )


def _tell(progress: Callable[[float], None], done: float, size: float, share: float) -> None:
    progress(done + size * share)
