"""Whole models' steps on a card that isn't there: what they launch, and that nothing in them waits for the host.

On the meta device every read of a number raises, so a step that ends has read none.
"""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from checkout import ROOT
from live_bytes import LiveBytes
from meta_models import KINDS, META, MetaStep, meta_model, pretending
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tightrope.backends.hf.run.graphs import DecodeGraphs
from tightrope.backends.hf.workspace import MOST_LAUNCHES

WINDOW = 4096
CONTEXT = 600  # Tokens cached with a step's; attention reads them in several stretches.
STEPS = {
    "1 sequence": [(1, CONTEXT)],
    "4 sequences": [(1, CONTEXT)] * 4,
    "prompt of 40": [(40, CONTEXT)],
    "prompt of 2,048": [(2048, 2048)],
}
DECODES = [name for name in STEPS if "sequence" in name]
NOTHING = ("aten.empty", "aten.new_empty", "aten.detach")  # These launch no kernel, nor does a view.


class OnCard(TorchDispatchMode):
    """Counts torch's kernels by operator, and holds that every tensor is on the card."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        result: object = func(*args, **(kwargs or {}))
        away = [t for t in tree_leaves((args, kwargs or {}, result)) if isinstance(t, Tensor) and t.device != META]
        assert not away, f"{func} has a tensor of the host"
        if not func.is_view and not str(func).startswith(NOTHING):
            self.kernels[str(func)] += 1
        return result


def launches(kind: str, name: str, num_layers: int) -> int:
    """Kernels of ours and of torch that a step launches."""
    with pretending() as ours, torch.inference_mode():
        model, _ = meta_model(kind, num_layers)
        step = MetaStep.of(model, STEPS[name])
        with OnCard() as card:
            step.run(model, len(STEPS[name]))
    return ours.count + card.kernels.total()


def told() -> dict[str, dict[str, int]]:
    """The table of docs/plan.md: by kind, and by step."""
    page = (ROOT / "docs/plan.md").read_text("utf-8")
    head = "| weights | " + " | ".join(STEPS) + " |"
    rows = page[page.index(head) :].splitlines()[2 : 2 + len(KINDS)]
    cells = [re.split(r" *\| *", row.strip("| ")) for row in rows]
    return {kind: dict(zip(STEPS, map(int, numbers), strict=True)) for kind, *numbers in cells}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_nothing_from_the_card_and_launches_what_the_table_tells(kind: str, name: str):
    a_layer = launches(kind, name, 3) - launches(kind, name, 2)

    assert a_layer == told()[kind][name]
    assert name not in DECODES or a_layer <= MOST_LAUNCHES


@pytest.mark.parametrize("name", DECODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_step_leaves_nothing_allocated_but_its_result(kind: str, name: str):
    left: list[list[int]] = []

    def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        run()  # As before a recording: libraries set themselves up.
        with LiveBytes() as live, OnCard():
            result = run()
        left.append(live.live)
        return lambda: result

    with pretending(), torch.inference_mode():
        model, _ = meta_model(kind, 2)
        step = MetaStep.of(model, STEPS[name])
        forward = partial(model.forward, step.caches)
        graphs = DecodeGraphs(forward, len(STEPS[name]), WINDOW, META, capture)
        rows = torch.arange(len(STEPS[name]), device=META)
        logits = graphs.forward(step.token_ids, step.layout, step.tables, rows, embedded=model.embedded(step.token_ids))

    assert left == [[logits.nbytes]]
