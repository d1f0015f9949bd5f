"""What adapters cost in a decode step, and what a step of a mixture saves by running only the experts that were picked.

    python -m bench.adapters [--threads N] [--lock FILE]

Models of random weights: layers of TinyLlama-1.1B's shape, and one of Mixtral-8x7B's at half its width. A step without
adapters and one in which every sequence uses one, or a step of 2 experts a token and one of all 8, take turns; ratios
are of medians. Writes bench/results/adapters.json.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import report
from bench.gpu.cases import make_step, make_table, noisy_cache
from bench.gpu.random_weights import Sizes, gptq_entries, plain_entries, random_model
from bench.load import exclusive
from bench.stats import spread
from tightrope.backends.files.safetensors import TensorEntry
from tightrope.backends.hf.load.model import LoadedModel
from tightrope.backends.hf.modules.linear import Linear
from tightrope.backends.threads import compute_threads
from tightrope.kernels import dispatch
from tightrope.kernels.forms.layout import CacheFormat
from tightrope.kernels.forms.low_rank import AdapterRows, make_low_rank

RANK, NUM_ADAPTERS = 32, 4
CONTEXT = 256  # tokens that each sequence has cached
MOST_COST, MOST_SHARE = 0.15, 0.4  # the bars
CPU = torch.device("cpu")
LLAMA: Sizes = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
# a layer of Mixtral-8x7B at half its width, and as much of its head as is a layer's share
MIXTRAL: Sizes = {
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 500,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
FORMS: dict[str, Callable[[Sizes], list[TensorEntry]]] = {"bf16": plain_entries, "4 bits": gptq_entries}
Row = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=0, help="0 is one per physical core")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--lock", type=Path, help="lock file to hold while measuring")
    args = parser.parse_args()
    threads = compute_threads(args.threads)
    torch.set_num_threads(1)  # as the server has it in steps of few tokens
    dispatch.set_threads(threads)
    adapters: list[Row] = []
    experts: list[Row] = []
    for form, entries in FORMS.items():
        adapters += adapter_costs(form, entries(LLAMA), args.rounds, args.lock)
        experts.append(expert_share(form, entries(MIXTRAL), args.rounds, args.lock))
    results = {"kernels": dispatch.describe(), "threads": threads, "adapters": adapters, "experts": experts}
    print(report.write("adapters", {**results, "sizes": {"adapters": LLAMA, "experts": MIXTRAL}, "rank": RANK}))


def adapter_costs(form: str, entries: Sequence[TensorEntry], rounds: int, lock: Path | None) -> list[Row]:
    """One stream with one adapter, and eight with four."""
    model, _ = random_model(LLAMA, entries, CPU, print)
    adapt(model.tree)
    rows: list[Row] = []
    for streams, count in ((1, 1), (8, NUM_ADAPTERS)):
        slots = torch.arange(streams, dtype=torch.int32) % count
        adapted = AdapterRows(slots, torch.ones(streams), tuple(range(count)))
        step = decode_step(model, streams)
        with exclusive(lock):
            plain, more = taking_turns((partial(step, None), partial(step, adapted)), rounds)
        cost = more["median"] / plain["median"] - 1
        rows.append(
            {"base": form, "streams": streams, "adapters": count, "plain_ms": plain, "adapted_ms": more}
            | {"cost": round(cost, 4), "bar": MOST_COST, "met": cost <= MOST_COST}
        )
        print(f"{form}, {streams} streams, {count} adapters of rank {RANK}: {cost:+.1%} of {plain['median']:.1f} ms")
    return rows


def expert_share(form: str, entries: Sequence[TensorEntry], rounds: int, lock: Path | None) -> Row:
    """One stream, 2 experts of 8 against all."""
    model, _ = random_model(MIXTRAL, entries, CPU, print)
    routers = [module for module in model.tree.modules() if "top_k" in vars(module)]
    assert routers
    step = decode_step(model, 1)

    def picking(count: int) -> None:
        for router in routers:
            router.top_k = count  # type: ignore[assignment]  # a module's own number
        step(None)

    with exclusive(lock):
        some, all_of_them = taking_turns((partial(picking, 2), partial(picking, 8)), rounds)
    share = some["median"] / all_of_them["median"]
    print(f"{form}: a step of 2 experts takes {share:.2f} of one of 8, {all_of_them['median']:.1f} ms")
    return {"form": form, "two_ms": some, "all_ms": all_of_them, "share": round(share, 4), "bar": MOST_SHARE} | {
        "met": share <= MOST_SHARE
    }


def adapt(tree: nn.Module) -> None:
    """Adapters of noise on all linears but the head, in slots 0 .. NUM_ADAPTERS."""
    for module in tree.modules():
        if isinstance(module, Linear) and not module.is_head:
            for slot in range(NUM_ADAPTERS):
                first, pieces = 0, []
                for _, outputs in module.rows:
                    a, b = torch.randn(RANK, module.num_inputs) / module.num_inputs, torch.randn(outputs, RANK) / RANK
                    pieces.append((first, a, b, 1.0))
                    first += outputs
                module.adapters.put(slot, make_low_rank(pieces, torch.float16))


def decode_step(model: LoadedModel, streams: int) -> Callable[[AdapterRows | None], Tensor]:
    """A step of one token for each stream."""
    torch.manual_seed(0)
    step, num_pages = make_step(((1, CONTEXT),) * streams, CPU)
    layer = model.layers[0]
    format = CacheFormat("q8", layer.num_kv_heads, layer.head_dim)
    caches = [noisy_cache(format, num_pages, CPU) for _ in model.layers]
    tables = {"default": make_table(layer.head_dim, CONTEXT, streams, CPU)}
    token_ids, rows = torch.arange(streams), torch.arange(streams)
    return lambda adapters: model.forward(caches, token_ids, step, tables, rows, adapters)


def taking_turns(works: Sequence[Callable[[], object]], rounds: int) -> list[dict[str, float]]:
    """Milliseconds of each, by median, least and most; the first round doesn't count."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + 1):
        for work, found in zip(works, times, strict=True):
            begin = time.perf_counter()
            work()
            found.append(1e3 * (time.perf_counter() - begin))
    return [spread([round(value, 3) for value in found[1:]]) for found in times]


if __name__ == "__main__":
    main()
