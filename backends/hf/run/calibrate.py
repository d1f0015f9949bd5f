"""What each key channel is divided by before its 8-bit or 4-bit codes: its largest magnitude over a fixed text.

Before rotation the channels with large keys are always the same ones, and would spoil the scale of the 31 others that
share it. Divided so, all channels are of one size, and the attention kernels multiply the factor back in.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from tightrope.backends.hf.cache.pages import PagedKVCache
from tightrope.backends.hf.load.model import LoadedModel
from tightrope.backends.hf.run.steps import StepBuilder
from tightrope.backends.hf.runner import Runner
from tightrope.backends.hf.workspace import CALIBRATION_TOKENS
from tightrope.backends.protocol import Chunk, Tokenizer
from tightrope.kernels.forms.layout import PAGE, CacheFormat, LayerCache

RunnerOver = Callable[[Sequence[LayerCache]], Runner]

TEXT = """\
The ferry left at seven, when the harbour was still grey and the gulls sat in a row along the wall. Marta had brought \
two loaves, a jar of honey and the letter, which she had read so often that it came apart at the folds. "You will not \
find him there," the old pilot said, without turning round. "He went up the coast in the spring, to mend boats." She \
thanked him and stayed on deck all the same, because the cabin smelled of diesel and wet dogs.

Bread needs four things: flour, water, salt and time. For one loaf, mix 500 grams of flour with 350 grams of water and \
10 grams of salt, add a little of yesterday's dough, and fold it every half hour. After five hours it should have \
grown by about a half. Bake it in a closed pot at 240 degrees for thirty minutes, then open the lid and give it \
another fifteen. Why does the lid matter? The steam keeps the crust soft while the loaf rises; once the steam is gone, \
sugars brown and the crust turns crisp.

In the nineteenth century most towns kept a time of their own, which was read from the sun. Trains ended that. A \
timetable that crosses three counties can't have a different noon in each, and so, line by line and country by \
country, clocks were set to a common hour. Some people complained bitterly. A clergyman wrote that the railway had no \
right to move midday, and for twenty years one tower showed both times with two minute hands, one black, one gilded.

To find a word in a dictionary, nobody starts at the first page. We open the book near the middle, see whether we are \
too far, and throw away half of what is left. A list of a million names needs no more than twenty such steps, since \
two multiplied by itself twenty times is a little more than a million. The same idea finds a broken commit, a leak in \
a pipe, or the weight at which a rope snaps: try the middle, and keep the half in which the answer must lie.

"Is it far?" asked the boy. "Far enough," she said, "but the road is good, the moon is nearly full, and we have eaten. \
My grandmother walked it in the snow with a clock on her back." He thought about this for a while. "What did she want \
with a clock in the snow?" Marta laughed for the first time in a week, and told him.
"""


def key_factors(
    runner_over: RunnerOver, model: LoadedModel, tokenizer: Tokenizer, steps: StepBuilder, step_tokens: int
) -> list[Tensor]:
    """Each layer's key factors [Hkv, D] float32, ones where it caches rotated keys: the text is run once.

    runner_over: makes a runner of the model over caches. steps: the model's rotation. step_tokens: tokens to run at a
    time.
    """
    layers = model.layers
    token_ids = tokenizer.encode(TEXT, parse_special=False, is_start=True)
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        token_ids = [tokenizer.bos_id, *token_ids]
    token_ids = token_ids[: min(CALIBRATION_TOKENS, steps.window)]
    num_pages = -(-len(token_ids) // PAGE)  # None for a vocabulary without these letters.
    formats = [CacheFormat("f16", layer.num_kv_heads, layer.head_dim) for layer in layers]
    caches = [
        LayerCache.allocate(format, num_pages, device)
        for format, device in zip(formats, model.layer_devices, strict=True)
    ]
    runner = runner_over(caches)
    if token_ids:
        _run(runner, token_ids, PagedKVCache(num_pages), steps, step_tokens)
    return runner.found_factors()


def _run(runner: Runner, token_ids: Sequence[int], kv: PagedKVCache, steps: StepBuilder, step_tokens: int) -> None:
    """Store the keys and values of all tokens; no logits are computed."""
    kv.open(0, token_ids, "")
    kv.reserve(0, len(token_ids))
    for start in range(0, len(token_ids), step_tokens):
        part = token_ids[start : start + step_tokens]
        runner.run(steps.build([Chunk(0, part, start, "none")], kv))
        kv.commit(0, start, part)
