"""Kernels of a card in Triton's interpreter, each tensor of a launch between two pages that can't be read or written.

`python guarded.py KIND SEED CASES` runs launches of one kind on random odd shapes, each twice: with tensors that end
where the page behind them begins, and with tensors that begin where the page before them ends. One that strays ends the
process by a signal. It prints what it launches before it does, and at the end how many launches there were.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # Triton looks at it when it is imported

import ctypes
import mmap
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from card_experts import EXPERTS, HIDDEN, layer_of
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from bench.gpu.cases import Shape, make_case
from bench.gpu.matrices import random_matrix, random_nf4
from tightrope.kernels.forms.columns import to_columns
from tightrope.kernels.forms.layout import AttentionSpec
from tightrope.kernels.forms.low_rank import NONE, AdapterRows, LowRank, make_low_rank
from tightrope.kernels.triton import experts, low_rank, ops, pointwise, quantized

PROT_NONE = 0
CPU = torch.device("cpu")
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Guard:
    """Puts the tensors of each launch where nothing may be touched beside them."""

    def __init__(self) -> None:
        self.at_end = True  # whether tensors end at a page that can't be touched, or begin behind one
        self.num_launches = 0

    def install(self) -> None:
        run = InterpretedFunction.run

        def guarded_run(kernel: object, *args: object, **kwargs: object) -> None:
            moved = [self._moved(arg) for arg in args]
            run(kernel, *(arg for arg, _ in moved), **kwargs)
            for _, put_back in moved:
                put_back()
            self.num_launches += 1

        InterpretedFunction.run = guarded_run

    def moved(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor, with nothing beside it."""
        return self._moved(tensor)[0]

    def _moved(self, arg: Any) -> tuple[Any, Callable[[], object]]:  # noqa: ANN401 - whatever a kernel takes
        if not isinstance(arg, Tensor):
            return arg, lambda: None
        # what lies between the rows of a view is its neighbours', and moves along
        span = 1 + sum((size - 1) * stride for size, stride in zip(arg.shape, arg.stride(), strict=True))
        span = span if arg.numel() else 0
        memory = self._between_pages(span * arg.element_size())
        flat = memory.view(arg.dtype)
        theirs = arg.as_strided((span,), (1,), arg.storage_offset())
        flat.copy_(theirs)
        return flat.as_strided(arg.shape, arg.stride(), flat.storage_offset()), lambda: theirs.copy_(flat)

    def _between_pages(self, num_bytes: int) -> Tensor:
        """So many bytes, uint8, of a mapping of their own."""
        page = mmap.PAGESIZE
        size = -(-num_bytes // page) * page
        mapped = mmap.mmap(-1, size + 2 * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        for begin in (base, base + page + size):
            if libc.mprotect(begin, page, PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")
        begin = page + (size - num_bytes if self.at_end else 0)
        return torch.frombuffer(mapped, dtype=torch.uint8)[begin : begin + num_bytes]  # it keeps the mapping


GUARD = Guard()


def attention(rng: random.Random) -> tuple[str, Callable[[], object]]:
    """A step over one layer: what it stores, turns and attends to."""
    dtype = rng.choice(["q8", "q4", "f16"])
    head_dim = rng.choice([32, 48, 64, 80, 96, 112, 128, 160])
    rotated = rng.choice([0, head_dim, head_dim // 2 // 4 * 4])
    lengths = tuple(
        (n, n + rng.randrange(70)) for n in (rng.choice([1, 1, 2, 5, 17, 33]) for _ in range(rng.randint(1, 3)))
    )
    spec = AttentionSpec(0.1, window=rng.choice([None, 1, 16, 30]), softcap=rng.choice([None, 5.0]))
    activations = rng.choice([torch.float32, torch.float16])
    shape = Shape(lengths, rng.randint(1, 3), rng.choice([1, 2, 3, 5, 7, 8]), head_dim, dtype, rotated, spec)
    case = make_case(shape, CPU, activations)

    def run() -> None:
        ops.store_kv(case.cache, case.keys, case.values, case.step.slots)
        if case.table is not None:
            ops.rotate(case.queries, case.step, case.table)
        ops.attention(case.queries, case.cache, case.step, case.table, spec)

    return f"attention {shape} {activations}", run


def small(rng: random.Random) -> tuple[str, Callable[[], object]]:
    """Norms and gates of odd widths."""
    rows, width = rng.randint(1, 9), rng.randint(1, 1500)
    x, weight = torch.randn(rows, 2 * width).to(rng.choice([torch.float32, torch.float16])), torch.rand(2 * width)
    activation = rng.choice(["silu", "gelu", "gelu_tanh"])

    def run() -> None:
        ops.rms_norm(x, weight, 1e-6)
        pointwise.gated(x, activation)

    return f"small {rows} x {width} {activation}", run


def products(rng: random.Random) -> tuple[str, Callable[[], object]]:
    """A quantized matrix of any kind times one row, and several, and all of it or a part expanded."""
    outputs, groups = rng.choice([1, 16, 33, 48, 100, 264, 300]), rng.randint(1, 3)
    is_coded = rng.random() < 0.5
    size = rng.choice([32, 64] if is_coded else [32, 40, 64, 128])
    bits = [rng.choice([2, 3, 4, 5, 6, 8]) for _ in range(groups)]
    if rng.random() < 0.2:
        matrix = to_columns(random_nf4(64 * groups, outputs, 64))
    else:
        has_zeros, is_permuted = not is_coded and rng.random() < 0.5, rng.random() < 0.6
        matrix = to_columns(
            random_matrix(
                [size] * groups, bits, outputs, is_coded=is_coded, has_zeros=has_zeros, is_permuted=is_permuted
            )
        )
    rows = [1, rng.randint(2, 40)]
    xs = [torch.randn(count, matrix.num_inputs).to(rng.choice([torch.float32, torch.float16])) for count in rows]
    bias = rng.choice([None, torch.randn(outputs)])
    first = rng.randrange(0, outputs, 16)

    def run() -> None:
        for x in xs:
            quantized.quantized_linear(x, [matrix], bias)
        quantized.expand(matrix, torch.float32, first)

    return f"product {rows} x {matrix.num_inputs} x {outputs} bits {bits} coded {is_coded}", run


def mixture(rng: random.Random) -> tuple[str, Callable[[], object]]:
    """Experts, by plain weights and by each format."""
    kind, tokens, each = (
        rng.choice(["plain", "gptq", "exl2", "nf4"]),
        rng.choice([1, 2, 7, 40]),
        rng.randint(1, EXPERTS),
    )
    layer, _, _ = layer_of(kind)
    x, shares = torch.randn(tokens, HIDDEN), torch.rand(tokens, each)
    picked = torch.rand(tokens, EXPERTS).topk(each).indices
    return f"experts {kind} {tokens} tokens {each} each", lambda: experts.experts(x, layer, picked, shares)


def adapters(rng: random.Random) -> tuple[str, Callable[[], object]]:
    """Low-rank additions to some rows of a linear whose outputs are a part of what they are written to."""
    rows, inputs, outputs = rng.randint(1, 40), rng.randint(1, 300), rng.randint(1, 600)
    rank, first = rng.randint(1, 40), rng.randint(0, 20)
    pieces = [(first, torch.randn(rank, inputs), torch.randn(outputs, rank), 0.5)]
    made = make_low_rank(pieces, rng.choice([torch.float32, torch.float16]))
    slots = torch.tensor([rng.choice([NONE, 0, 3, 5]) for _ in range(rows)], dtype=torch.int32)
    present = tuple(sorted(set(slots.tolist()) - {NONE}))
    x, out = torch.randn(rows, inputs), torch.randn(rows, first + outputs + rng.randint(0, 9))
    own = AdapterRows(slots, torch.rand(rows), present)

    def run() -> None:  # a kernel finds these matrices by a table of addresses, so they are moved here
        parts = tuple(replace(part, down=GUARD.moved(part.down), up=GUARD.moved(part.up)) for part in made.parts)
        low_rank.add_low_rank(out, x, {0: LowRank(parts), 3: LowRank(parts)}, own)

    return f"adapters {rows} x {inputs} x {outputs} rank {rank}", run


def stray(rng: random.Random) -> tuple[str, Callable[[], object]]:
    """A weight that is one number short, which a kernel can't know: to show that it would be seen."""
    x, weight = torch.randn(2, 64), torch.rand(63)
    return "stray", lambda: ops.rms_norm(x, weight, 1e-6)


KINDS = {make.__name__: make for make in (attention, small, products, mixture, adapters, stray)}


def main(kind: str, seed: int, num_cases: int) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    rng = random.Random(seed)
    GUARD.install()
    for _ in range(num_cases):
        name, run = KINDS[kind](rng)
        for GUARD.at_end in (True, False):
            print(name, "tensors end" if GUARD.at_end else "tensors begin", "at a guard page", flush=True)
            run()
    print(f"launches={GUARD.num_launches}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
