"""How well a model predicts a text: perplexity by context length, and what another cache changes in it."""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tightrope.backends.errors import BackendError
from tightrope.backends.protocol import Backend, CacheVariants, Chunk, Tokenizer
from tightrope.kernels.forms.layout import CacheDtype

LANES = 8  # So many single layers are compared in one run; each has a whole f16 cache.
ROWS = 64  # So many are exponentiated at a time, so that what is made of them stays in the processor's caches.

Progress = Callable[[int], None]  # It is told how many more tokens have been run.


@dataclass(slots=True)
class Score:
    """Sums over the tokens predicted so far, in nats.

    `nll` is of the text's own tokens. `divergence` is sum over tokens of KL(base || this), of the distributions of the
    next token; 0 for the base itself.
    """

    num_tokens: int = 0
    nll: float = 0.0
    divergence: float = 0.0

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood. Raises BackendError when the model gave no numbers."""
        if not math.isfinite(self.nll):
            raise BackendError("the model's logits are not finite, so the text has no perplexity")
        return math.exp(min(self.nll / self.num_tokens, 700.0))  # E^709 is the largest float.

    @property
    def mean_divergence(self) -> float:
        return self.divergence / self.num_tokens


def cut_windows(token_ids: Sequence[int], context: int, bos_id: int | None, max_tokens: int = 0) -> list[list[int]]:
    """Windows of `context` tokens each, that follow one another in a text without overlap; the rest is left out.

    With a `bos_id` each begins with it, followed by context - 1 tokens of the text. `max_tokens` bounds the tokens of
    all windows together, but for one window; fewer windows are then spread evenly over the text. 0: the whole text.
    """
    head = [] if bos_id is None else [bos_id]
    size = context - len(head)
    num_fitting = len(token_ids) // size
    num_windows = min(num_fitting, max(1, max_tokens // context)) if max_tokens else num_fitting
    starts = [index * num_fitting // num_windows * size for index in range(num_windows)]
    return [head + list(token_ids[start : start + size]) for start in starts]


def window_bos(tokenizer: Tokenizer) -> int | None:
    """The token that opens a window, as it opens a prompt; None where prompts have none."""
    return tokenizer.bos_id if tokenizer.adds_bos else None


def measure(backend: Backend, windows: Sequence[Sequence[int]], progress: Progress) -> Score:
    """The score of windows of equal length, each predicted from its second token on.

    perplexity = exp(mean negative log-likelihood of all predicted tokens of all windows); a token is predicted from the
    tokens before it in its window alone. Raises BackendError when the model can't run.
    """
    return compare(backend, (), windows, progress)[0]


def compare(
    base: Backend, others: Sequence[Backend], windows: Sequence[Sequence[int]], progress: Progress
) -> list[Score]:
    """Run the windows on all backends in lockstep; the scores of `base` and of the others, with divergence from it.

    The backends differ in their caches alone. Nothing is stored: a step's logits are compared and dropped.
    """
    backends = (base, *others)
    size = min(_step_tokens(backend) for backend in backends)
    abreast = max(1, min(size // len(windows[0]), *(backend.capabilities.max_num_seqs for backend in backends)))
    groups = [windows[start : start + abreast] for start in range(0, len(windows), abreast)]
    lanes = [_steps(backend, groups, size) for backend in backends]
    scores = [Score() for _ in backends]
    try:
        for logits, targets in lanes[0]:
            base_rows = [_Rows.of(part) for part in torch.split(logits, ROWS)]
            _add(scores[0], base_rows, base_rows, targets)
            progress(len(targets))
            for score, lane in zip(scores[1:], lanes[1:], strict=True):
                logits, _ = next(lane)
                _add(score, (_Rows.of(part) for part in torch.split(logits, ROWS)), base_rows, targets)
                progress(len(targets))
    finally:
        for lane in lanes:
            lane.close()  # This ends its sequences.
    return scores


def compare_layers(
    base: Backend, variants: CacheVariants, kind: CacheDtype, windows: Sequence[Sequence[int]], progress: Progress
) -> list[Score]:
    """The scores of `base`, with all layers in f16, and of each layer cached as `kind` while the others are in f16."""
    scores: list[Score] = []
    num_layers = variants.num_layers
    for start in range(0, num_layers, LANES):
        layers = range(start, min(start + LANES, num_layers))
        mixed = [[kind if i == layer else "f16" for i in range(num_layers)] for layer in layers]
        first, *others = compare(base, [variants.variant(dtypes) for dtypes in mixed], windows, progress)
        scores += others if scores else [first, *others]
    return scores


def layer_runs(num_layers: int) -> int:
    """How many times `compare_layers` runs the windows."""
    return num_layers + -(-num_layers // LANES)


def _step_tokens(backend: Backend) -> int:
    return min(backend.capabilities.max_step_tokens, backend.capabilities.max_prompt_rows)


def _steps(
    backend: Backend, groups: Sequence[Sequence[Sequence[int]]], size: int
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Run groups of windows side by side, in steps of at most `size` tokens.

    Yields each step's logits [n, V] and the tokens [n] that follow, for all positions of the step that are followed by
    one; the logits hold until the next step.
    """
    for group in groups:
        context = len(group[0])
        width = min(context, size)  # It is that of a step, in each window.
        try:
            _open(backend, group)
            for start in range(0, context, width):
                chunks = [Chunk(i, window[start : start + width], start, "all") for i, window in enumerate(group)]
                logits = backend.forward(chunks)
                targets = torch.tensor([window[start + 1 : start + 1 + width] for window in group])
                if start + width >= context:  # Nothing follows a window's last token.
                    logits = logits.view(len(group), -1, logits.shape[1])[:, :-1].flatten(0, 1)
                # It comes before the commit: backends that share books run the same step now.
                yield logits, targets.flatten()
                for chunk in chunks:
                    backend.kv.commit(chunk.seq_id, chunk.start, chunk.token_ids)
        finally:
            for seq_id in range(len(group)):
                backend.kv.close(seq_id, keep=False)


def _open(backend: Backend, group: Sequence[Sequence[int]]) -> None:
    for seq_id, window in enumerate(group):
        backend.kv.open(seq_id, window, "perplexity", reuse="nothing")
    for seq_id, window in enumerate(group):
        if not backend.kv.reserve(seq_id, len(window)):
            cells = backend.kv.usage().capacity
            raise BackendError(f"the cache holds {cells} tokens; windows of {len(window)} need more")


@dataclass(frozen=True, slots=True)
class _Rows:
    """Log-probabilities as `shifted` [n, V] float32, at most 0, less `log_total` [n] float64.

    Kept apart because the total's rounding to float32 would be an error that a whole row has in common, as large as the
    divergences that are to be told apart.
    """

    shifted: Tensor
    log_total: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> "_Rows":
        # E^-1e4 is 0, and unlike -inf it subtracts.
        shifted = (logits - logits.amax(-1, keepdim=True)).clamp_(min=-1e4)
        return cls(shifted, shifted.exp().sum(-1).double().log())


def _add(score: Score, rows: Iterable[_Rows], base_rows: Iterable[_Rows], targets: Tensor) -> None:
    """Add a step's rows, whose base rows and next tokens [n] are given."""
    for part, base, tokens in zip(rows, base_rows, torch.split(targets, ROWS), strict=True):
        chosen = part.shifted.gather(-1, tokens.to(part.shifted.device).unsqueeze(-1)).squeeze(-1)
        score.num_tokens += len(tokens)
        score.nll += float((part.log_total - chosen).sum())
        if part is not base:
            score.divergence += float(_divergence(base, part).sum())


def _divergence(base: _Rows, other: _Rows) -> Tensor:
    """KL(base || other) [n] float64."""
    offset = base.log_total - other.log_total
    near = offset.float()  # It is taken off before the sum, so that its terms are no larger than what differs.
    probabilities = (base.shifted - base.log_total.float().unsqueeze(-1)).exp_()
    log_ratios = (base.shifted - other.shifted).sub_(near.unsqueeze(-1))
    return probabilities.mul_(log_ratios).sum(-1).double() + (near.double() - offset)
