"""What a step of the torch engine takes on a CPU beside weights and cache.

The tensors of a step are those that Layer, Stack and the C++ kernels hold at a time, in the order in which they were
made; `python -m bench.ranks` and tests/backends/test_rank_memory.py hold them to what processes take.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tightrope.backends.files.hf_config import ModelShape
from tightrope.backends.hf.widths import Widths
from tightrope.backends.hf.workspace import CALIBRATION_TOKENS, logits_rows, token_bytes
from tightrope.backends.settings import ModelSettings
from tightrope.backends.tensor_parallel import ALONE, Share, local_shape
from tightrope.kernels import dispatch
from tightrope.kernels.forms.ranks import shared_bytes
from tightrope.kernels.reference import TILE_ROWS, attention_bytes

FIXED_BYTES = 10 << 20  # Of small things: libraries' once they run, Python's of modules, rotary tables.
SAMPLED = 3  # So often the sampler's steps copy the row that a sequence draws from.


@dataclass(frozen=True, slots=True)
class HostWorkspace:
    """With activations in float32. share: of the rank whose step it is.

    attends_by_heads: see local_shape. is_kept: layers are of transformers' own classes, which hold more at a time.
    has_head: logits are computed there, too, of the wanted rows alone from the last norm on if `is_ours`.
    """

    settings: ModelSettings
    shape: ModelShape
    share: Share = ALONE
    attends_by_heads: bool = True
    is_kept: bool = False
    is_ours: bool = True
    has_head: bool = True

    @property
    def widths(self) -> Widths:
        return Widths.of(self.shape, self.share, attends_by_heads=self.attends_by_heads)

    def num_bytes(self, tokens: int, window: int) -> int:
        """A bound for steps of up to `tokens`, whatever the window."""
        widths = self.widths
        shared = shared_bytes(self.share.count) if self.share.count > 1 else 0
        tensors = max(self._in_head(widths, tokens), *self._in_layers(widths, tokens))
        return 4 * tensors + self._by_kernels(widths, tokens) + shared + FIXED_BYTES

    def load_bytes(self, tokens: int) -> int:
        """While keys are calibrated, before there is a cache."""
        own = local_shape(self.shape, self.share, attends_by_heads=self.attends_by_heads)
        calibrating = CALIBRATION_TOKENS * token_bytes(own, "f16")
        return calibrating + self.num_bytes(min(tokens, CALIBRATION_TOKENS), 0)

    def _in_layers(self, widths: Widths, tokens: int) -> Iterator[int]:
        """Floats in all tensors that are live at the moments at which most of them are, up to the last layer."""
        hidden = self.shape.hidden_size
        if widths.logits.is_split:  # Each rank gives a row of the table for each token.
            yield tokens * (widths.num_ranks + 2) * hidden
        stream = 2 * hidden  # The embedding's rows, and the layer's input.
        out = widths.out.whole + (widths.out.own if widths.out.is_split else 0)
        attended = 2 * widths.attended.own + (widths.attended.whole if widths.attended.is_split else 0)
        kept = 3 * (hidden + widths.qkv) if self.is_kept else 0  # Copies of heads, of their rotation and of norms.
        yield tokens * (stream + hidden + widths.qkv + attended + out + kept)
        stream += 3 * hidden  # What attention gave, its sum with the input, and that normed.
        middle = widths.middle.own + (widths.middle.whole if widths.middle.is_split else 0)
        yield tokens * (stream + kept + max(3 * widths.middle.own, middle + out))
        if self.shape.num_experts:
            picks = self.shape.experts_per_token * (widths.expert.own + widths.expert.whole)
            yield tokens * (stream + kept + picks + out)

    def _in_head(self, widths: Widths, tokens: int) -> int:
        """The same where logits are computed."""
        if not self.has_head:
            return 0
        hidden, vocab = self.shape.hidden_size, widths.logits
        rows = logits_rows(self.settings, self.shape, tokens)
        logits = vocab.whole + (vocab.own if vocab.is_split else 0)
        sampled = 0 if self.share.rank else SAMPLED * self.settings.max_num_seqs * vocab.whole
        normed = 0 if self.is_ours else tokens * hidden
        return normed + rows * (hidden + logits) + sampled

    def _by_kernels(self, widths: Widths, tokens: int) -> int:
        """Bytes that kernels take beside their results, and keep for the next step."""
        shape, inputs = self.shape, max(self.shape.hidden_size, widths.attended.whole, widths.middle.whole)
        taken = 0
        if shape.num_experts:  # An expert's rows, in the worst case all; see cpu/experts.h.
            taken += 4 * tokens * (shape.hidden_size + 3 * widths.expert.own + widths.out.own)
        if not dispatch.has_native() or shape.head_dim > dispatch.MOST_DIMS:
            taken += attention_bytes(tokens, widths.heads, shape.num_kv_heads, shape.head_dim)
        if not dispatch.has_native():  # Rows of a weight are expanded to float32 so many at a time.
            return taken + 4 * TILE_ROWS * inputs
        few = min(tokens, dispatch.MOST_LAYER_TOKENS)
        layer = 2 * shape.hidden_size + widths.qkv + 3 * widths.middle.own + 2 * widths.attended.own + inputs
        return taken + 4 * few * layer
