"""What a step of the torch engine takes on a card beside weights and cache.

The tensors of a card's step are those that Layer, Stack and the kernels hold at a time, in the order in which they were
made; tests/backends/test_card_workspace.py holds them to what a whole model's step allocates.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tightrope.backends.allocator import held_bytes
from tightrope.backends.files.hf_config import ModelShape
from tightrope.backends.hf.run.graphs import recordings
from tightrope.backends.memory import prompt_rows
from tightrope.backends.settings import ModelSettings
from tightrope.kernels import dispatch
from tightrope.kernels.forms.columns import MOST_ROWS, most_shares
from tightrope.kernels.forms.expanded import expanded_cache_bytes, slice_bytes
from tightrope.kernels.forms.layout import PAGE, CacheDtype, CacheFormat

CALIBRATION_TOKENS = 512  # backends/hf/run/calibrate.py runs so many at load, in an f16 cache.
# A recording holds a node for each launch. What the driver keeps for one isn't documented: this is an upper estimate.
MOST_LAUNCHES = 32  # Of a layer in a decode step.
NODE_BYTES = 16 << 10


def token_bytes(shape: ModelShape, dtype: CacheDtype) -> int:
    """Bytes of a token's keys and values in all layers."""
    return shape.num_layers * CacheFormat(dtype, shape.num_kv_heads, shape.head_dim).bytes_per_token


def logits_rows(settings: ModelSettings, shape: ModelShape, step_tokens: int) -> int:
    """Most rows of logits of a step: a prompt whose logprobs are wanted yields one for each token, others one each."""
    return prompt_rows(shape.vocab_size, step_tokens) + settings.max_num_seqs


@dataclass(frozen=True, slots=True)
class CardWorkspace:
    """On a card. `itemsize` is that of activations in bytes, 4 for float32.

    is_quantized, is_head_quantized: whether linears, and the head, are multiplied from codes; is_whole: by kernels of
    exllamav2, which expand whole matrices; is_joined: gate and up are one matrix; num_runs: of neighbouring groups of
    one width. has_adapters: whether steps may add low-rank products. is_kept: layers are of transformers' own classes,
    whose norms go through float32. has_head: logits are computed there, too, of the wanted rows alone from the last
    norm on if `is_ours`, as in a WholeModel. is_recorded: decode steps are.
    """

    settings: ModelSettings
    shape: ModelShape
    itemsize: int
    is_quantized: bool
    is_head_quantized: bool
    is_whole: bool
    is_joined: bool
    num_runs: int
    has_adapters: bool
    is_kept: bool
    is_ours: bool
    has_head: bool = True
    is_recorded: bool = True

    def num_bytes(self, tokens: int, window: int) -> int:
        """For steps of up to `tokens`, in sequences of up to `window`."""
        lasting = [self.scratch_bytes(window), self.rotary_bytes(window)]
        return sum(held_bytes([size]) for size in lasting) + self._largest(tokens) + self.graph_bytes(window)

    def load_bytes(self, tokens: int) -> int:
        """While keys are calibrated, before there is a cache."""
        calibrating = CALIBRATION_TOKENS * token_bytes(self.shape, "f16")
        return held_bytes([calibrating]) + self._largest(min(tokens, CALIBRATION_TOKENS))

    def _largest(self, tokens: int) -> int:
        """Of all steps: those of fewer tokens are multiplied in ways that may take more."""
        counts = {tokens, min(tokens, MOST_ROWS), min(tokens, dispatch.MOST_STACKED)}
        return max(map(self.step_bytes, counts))

    def scratch_bytes(self, window: int) -> int:
        """Where prompts expand a sequence's keys and values; see expands_cache for the layers that do."""
        shape = self.shape
        has_some = self.itemsize < 4 and None in shape.windows
        return expanded_cache_bytes(window, shape.num_kv_heads, shape.head_dim) if has_some else 0

    def rotary_bytes(self, window: int) -> int:
        """Angles in float32, of as many sets of frequencies as sequences of their own lengths may need."""
        return 4 * self.settings.max_num_seqs * -(-window // PAGE) * self.shape.head_dim

    def graph_bytes(self, window: int) -> int:
        """All recordings of decode steps: their nodes, and one pool for what such a step makes and gives out."""
        if not self.is_recorded:
            return 0
        sizes = recordings(self.settings.max_num_seqs, window)
        count = len(sizes) * (2 if self.has_adapters else 1)
        nodes = count * self.shape.num_layers * MOST_LAUNCHES * NODE_BYTES
        largest = max(size for size, _ in sizes)
        results = [4 * size * self.shape.vocab_size for size, _ in sizes]
        return nodes + held_bytes(results) + self.step_bytes(largest, rows=largest)

    def step_bytes(self, tokens: int, rows: int | None = None) -> int:
        """The most that a step of so many tokens takes from the card at a time. rows: whose logits are wanted."""
        rows = logits_rows(self.settings, self.shape, tokens) if rows is None else rows
        small = 8 * tokens  # Positions, and whatever else has but a number for each token.
        return max(held_bytes([small, *moment]) for moment in self._moments(tokens, min(rows, tokens)))

    def _moments(self, tokens: int, rows: int) -> Iterator[list[int]]:
        """Bytes of each tensor that is live at the moments at which most of them are."""
        shape = self.shape
        row = tokens * self.itemsize
        hidden = row * shape.hidden_size
        heads = shape.num_heads * shape.head_dim
        qkv = heads + 2 * shape.num_kv_heads * shape.head_dim
        stream = [hidden, hidden]  # The embedding's rows, and the layer's input.
        if self.is_kept:
            stream += [4 * tokens * shape.hidden_size] * 3
        attending = [*stream, hidden, row * qkv]
        yield [*attending, *self._product(tokens, shape.hidden_size, qkv, self.is_quantized)]
        yield [*attending, *self._attention(tokens)]
        out = self._product(tokens, heads, shape.hidden_size, self.is_quantized)
        yield [*attending, row * heads, row * heads, hidden, *out]
        stream += [hidden, hidden, hidden]  # What attention gave, its sum with the input, and that normed.
        yield from self._mlp(stream, tokens) if not shape.num_experts else self._experts(stream, tokens)
        if not self.has_head:
            return
        wanted, logits = rows * self.itemsize * shape.hidden_size, rows * self.itemsize * shape.vocab_size
        head = self._product(rows, shape.hidden_size, shape.vocab_size, self.is_head_quantized)
        normed = [] if self.is_ours else [hidden]
        yield [hidden, *normed, wanted, logits, *head]
        yield [hidden, logits, *([rows * 4 * shape.vocab_size] if self.itemsize < 4 else [])]

    def _mlp(self, stream: list[int], tokens: int) -> Iterator[list[int]]:
        hidden, ffn = self.shape.hidden_size, self.shape.intermediate_size
        row, outputs = tokens * self.itemsize, ffn * (2 if self.is_joined else 1)
        yield [*stream, 2 * row * ffn, *self._product(tokens, hidden, outputs, self.is_quantized)]
        yield [*stream, 2 * row * ffn, row * ffn]
        yield [*stream, row * ffn, row * hidden, *self._product(tokens, ffn, hidden, self.is_quantized)]

    def _experts(self, stream: list[int], tokens: int) -> Iterator[list[int]]:
        """All experts at once for as many tokens as the kernel takes; for more they take turns.

        Plain experts run one by one then, in the worst case one of them for all tokens.
        """
        shape = self.shape
        few = min(tokens, dispatch.MOST_STACKED)
        hidden, ffn = shape.hidden_size, shape.expert_size
        places, item = few * shape.experts_per_token, self.itemsize
        outputs = ffn * (2 if self.is_joined else 1)
        sizes = ((hidden, outputs), (ffn, hidden)) if self.is_quantized else ()
        shares = [most_shares(*size, self.num_runs) for size in sizes] or [0, 0]
        if tokens > few:
            stream = [*stream, (tokens - few) * hidden * item]
        yield [*stream, 2 * places * ffn * item, 4 * shares[0] * places * outputs]
        yield [*stream, 2 * places * ffn * item, places * ffn * item]
        yield [*stream, places * ffn * item, places * hidden * item, 4 * shares[1] * places * hidden]
        if tokens > few and (self.has_adapters or not self.is_quantized):
            yield from self._mlp([*stream, tokens * hidden * item], tokens)

    def _product(self, tokens: int, inputs: int, outputs: int, is_quantized: bool) -> list[int]:
        """Beside input and result."""
        added: list[int] = []
        if self.has_adapters:  # Rows with adapters are multiplied in float32.
            added = [4 * tokens * inputs, 4 * tokens * outputs, self.itemsize * tokens * outputs]
        if not is_quantized:
            return added
        if self.is_whole:
            return [*added, self.itemsize * tokens * outputs, 2 * inputs * outputs]
        if tokens > MOST_ROWS:
            return [*added, slice_bytes(inputs, outputs, self.itemsize)]
        return [*added, 4 * most_shares(inputs, outputs, self.num_runs) * tokens * outputs]

    def _attention(self, tokens: int) -> list[int]:
        """Queries, rotated and as flash attention takes them; what it gives, and a float32 a head; the result."""
        heads = self.shape.num_heads
        queries = tokens * self.itemsize * heads * self.shape.head_dim
        return [queries] * 4 + [4 * tokens * heads]
