"""Decode of a synthetic Mixtral of 8x7B's shape at 4 bits, against the time in which the picked experts can be read.

The model is the server's own, over random GPTQ tensors that are made on the device, recorded as the server records it.
It has a quarter of the layers, which are all alike.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.gpu.random_weights import SMALL, RandomWeights, Sizes, gptq_entries, random_model
from bench.gpu.run import Row, Run, tried
from bench.gpu.steps import model_step, noisy_caches
from bench.gpu.timing import seconds
from tightrope.backends.hf.load.model import LoadedModel
from tightrope.backends.hf.modules.experts import Experts
from tightrope.backends.quant.find import find_quantization

BAR = 0.6  # share of the roofline that decode of one sequence must reach
MOST_SHARE = 0.4  # of a step of all experts that one of those picked may take
BATCHES = (1, 8)
CONTEXT = 2048  # tokens of each sequence
MIXTURE = {"num_local_experts": 8, "num_experts_per_tok": 2}
FULL: Sizes = MIXTURE | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}


def rows(run: Run) -> Iterator[Row]:
    """One row for each batch: time of a step, of one of all experts, the bytes that it reads and its share."""
    sizes = {**SMALL, **MIXTURE} if run.is_smoke else FULL
    model, weights = random_model(sizes, gptq_entries(sizes), run.device, print)
    for num_seqs in (1, 2) if run.is_smoke else BATCHES:
        yield tried({"sequences": num_seqs}, partial(_measure, run, model, weights, sizes, num_seqs))


def _measure(run: Run, model: LoadedModel, weights: RandomWeights, sizes: Sizes, num_seqs: int) -> Row:
    whole = _seconds(run, model, num_seqs, sizes["num_local_experts"])
    time = _seconds(run, model, num_seqs, sizes["num_experts_per_tok"])
    picked = _num_picked(run, model, num_seqs)
    num_bytes = _step_bytes(weights, sizes, picked)
    judged = run.judged(num_bytes, time, BAR if num_seqs == 1 else None)
    is_few = run.is_smoke or num_seqs > 1 or time / whole <= MOST_SHARE
    return {
        "experts_read": picked,
        "step_bytes": num_bytes,
        "step_ms": time * 1e3,
        "all_experts_ms": whole * 1e3,
        "of_all_experts": time / whole,
        **judged,
        "holds": bool(judged["holds"]) and is_few,
    }


def _step_bytes(weights: RandomWeights, sizes: Sizes, num_picked: int) -> int:
    """What a step reads whose layers read so many experts in all."""
    quantization = find_quantization(weights.folder, {}, weights)
    assert quantization is not None
    parts = [quantization.packed(f"model.layers.0.block_sparse_moe.experts.0.{name}") for name in ("w1", "w2", "w3")]
    expert = sum(sum(quantization.format.tensor_bytes(part)) for part in parts)
    table = weights.tensors["model.embed_tokens.weight"].num_bytes  # of which a step reads a row
    all_experts = sizes["num_hidden_layers"] * sizes["num_local_experts"]
    return quantization.memory_bytes - table + (num_picked - all_experts) * expert


def _seconds(run: Run, model: LoadedModel, num_seqs: int, num_experts: int) -> float:
    """Time of a step in which each token picks so many experts."""
    for router in (module for module in model.tree.modules() if "top_k" in vars(module)):
        router.top_k = num_experts  # type: ignore[assignment]  # a module's own number
    lengths = ((1, _context(run)),) * num_seqs
    with torch.inference_mode():
        step = model_step(model, noisy_caches(model, num_seqs * _context(run)), lengths, is_recorded=True)
        return seconds(step, run.device, run.repeats)


def _num_picked(run: Run, model: LoadedModel, num_seqs: int) -> int:
    """How many experts the tokens of such a step pick, in all layers together; what is recorded can't be looked at."""
    picked: list[int] = []

    def count(module: object, inputs: tuple[Tensor, ...]) -> None:
        picked.append(len(inputs[1].unique()))

    hooks = [m.register_forward_pre_hook(count) for m in model.tree.modules() if isinstance(m, Experts)]
    with torch.inference_mode():
        model_step(model, noisy_caches(model, num_seqs * _context(run)), ((1, _context(run)),) * num_seqs)()
    for hook in hooks:
        hook.remove()
    return sum(picked)


def _context(run: Run) -> int:
    return 48 if run.is_smoke else CONTEXT
