"""Decode of a synthetic Mixtral of 8x7B's shape at 4 bits, against the time in which the picked experts can be read.

The model is the server's own, over random GPTQ tensors that are made on the device, recorded as the server records it.
"""

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench.gpu.cases import make_step, make_table, noisy_cache
from bench.gpu.correctness import Check
from bench.gpu.model import SMALL
from bench.gpu.random_weights import Sizes, gptq_entries, random_model
from bench.gpu.timing import seconds
from tightrope.backends.hf.load.model import LoadedModel
from tightrope.backends.hf.modules.experts import Experts
from tightrope.backends.hf.run import graphs
from tightrope.backends.hf.run.graphs import DecodeGraphs
from tightrope.backends.quant.find import find_quantization
from tightrope.kernels.forms.layout import CacheFormat

BAR = 0.6  # share of the roofline that decode of one sequence must reach
MOST_SHARE = 0.4  # of a step of all experts that one of those picked may take
AGREE = 1e-2  # largest difference of logits between all experts at once and one by one, of the largest logit
BATCHES = (1, 8)
CONTEXT = 2048  # tokens of each sequence
MIXTURE = {"num_local_experts": 8, "num_experts_per_tok": 2}
FULL: Sizes = MIXTURE | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}


def measure(
    device: torch.device, bandwidth: float, is_smoke: bool, show: Callable[[str], None]
) -> list[dict[str, object]]:
    """One row for each batch: time of a step, of one of all experts, the bytes that it reads and its share."""
    sizes = SMALL | MIXTURE if is_smoke else FULL
    model, weights = random_model(sizes, gptq_entries(sizes), device, show)
    quantization = find_quantization(weights.folder, {}, weights)
    assert quantization is not None
    table = weights.tensors["model.embed_tokens.weight"].num_bytes  # of which a step reads a row
    expert = sum(
        quantization.format.memory_bytes(quantization.packed(f"model.layers.0.block_sparse_moe.experts.0.{name}"))
        for name in ("w1", "w2", "w3")
    )
    others = quantization.memory_bytes - table - len(model.layers) * sizes["num_local_experts"] * expert
    rows: list[dict[str, object]] = []
    for num_seqs in (1, 2) if is_smoke else BATCHES:
        context = 40 if is_smoke else CONTEXT
        whole, step = (
            _seconds(model, num_seqs, context, sizes[field]) for field in ("num_local_experts", "num_experts_per_tok")
        )
        num_picked = _num_picked(model, num_seqs, context)
        num_bytes = others + num_picked * expert
        share = num_bytes / step / bandwidth
        is_one = num_seqs == 1
        rows.append(
            {
                "sequences": num_seqs,
                "experts_read": num_picked,
                "step_bytes": num_bytes,
                "step_ms": step * 1e3,
                "all_experts_ms": whole * 1e3,
                "of_all_experts": step / whole,
                "share": share,
                "bar": BAR if is_one else None,
                "holds": not is_one or (share >= BAR and step / whole <= MOST_SHARE),
            }
        )
        show(
            f"mixture: {num_seqs} sequences, {step * 1e3:.2f} ms, {share:.0%} of the roofline, {step / whole:.2f} of a "
            "step of all experts"
        )
    return rows


def check(device: torch.device, is_smoke: bool, show: Callable[[str], None]) -> list[Check]:
    """One row: all experts at once give the logits that they give one by one."""
    sizes = (SMALL if is_smoke else {**FULL, "num_hidden_layers": 2}) | MIXTURE
    model, _ = random_model(sizes, gptq_entries(sizes), device, show)
    with torch.inference_mode():
        at_once = _step(model, 5, 40)()
        for module in _mixtures(model.tree):
            module.whole = None
        with patch.object(graphs, "CudaCapture", lambda: lambda run: run):  # nor can it wait for the host
            wanted = _step(model, 5, 40)()
    error = ((at_once - wanted).abs().max() / wanted.abs().max()).item()
    case = f"{sizes['num_local_experts']} x {sizes['hidden_size']} x {sizes['intermediate_size']}"
    return [{"kernel": "experts", "case": case, "error": error, "bound": AGREE, "holds": error <= AGREE}]


def _mixtures(tree: nn.Module) -> list[Experts]:
    return [module for module in tree.modules() if isinstance(module, Experts)]


def _step(model: LoadedModel, num_seqs: int, context: int) -> Callable[[], Tensor]:
    """A step of one token a sequence."""
    torch.manual_seed(0)
    layer, device = model.layers[0], model.device
    step, num_pages = make_step(((1, context),) * num_seqs, device)
    format = CacheFormat("q8", layer.num_kv_heads, layer.head_dim)
    over = partial(model.forward, [noisy_cache(format, num_pages, device) for _ in model.layers])
    tables = {"default": make_table(layer.head_dim, context, num_seqs, device)}
    token_ids, rows = torch.arange(num_seqs, device=device), torch.arange(num_seqs, device=device)
    forward = over if device.type != "cuda" else DecodeGraphs(over, num_seqs, context, device).forward
    return partial(forward, token_ids, step, tables, rows)


def _num_picked(model: LoadedModel, num_seqs: int, context: int) -> int:
    """How many experts the tokens of such a step pick, in all layers together."""
    picked: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        picked.append(len(inputs[1].unique()))

    hooks = [module.register_forward_pre_hook(count) for module in _mixtures(model.tree)]
    with patch.object(graphs, "CudaCapture", lambda: lambda run: run):  # what is recorded can't be looked at
        _step(model, num_seqs, context)()
    for hook in hooks:
        hook.remove()
    return sum(picked)


def _seconds(model: LoadedModel, num_seqs: int, context: int, num_experts: int) -> float:
    """Time of a step in which each token picks so many experts."""
    for router in (module for module in model.tree.modules() if "top_k" in vars(module)):
        router.top_k = num_experts  # type: ignore[assignment]  # a module's own number
    return seconds(_step(model, num_seqs, context), model.device, 20 if model.device.type == "cuda" else 1)
