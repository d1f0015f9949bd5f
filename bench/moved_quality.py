"""What moved tokens cost in quality, turn by turn of a chat that fills its window: beside a cold prefill."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench.story import story
from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.protocol import Backend, Chunk
from tightrope.backends.reuse import Reuse, Wanted
from tightrope.backends.settings import CacheSettings, KVCacheDtype, ModelSettings

NUM_PROBED = 64  # So many tokens at the end of each prompt are predicted: the latest message, which is computed anew.


@dataclass(frozen=True, slots=True)
class Row:
    """One turn. Divergences are of the next token's distribution from that of a cold prefill, in nats.

    `first_` is of a chat whose turn before was exact, as it is when healed; the others follow on moved tokens.
    """

    what: str
    num_tokens: int
    num_computed: int
    num_moved: int
    kld: float
    kld_p99: float
    perplexity: float  # of the probed tokens over that of the cold prefill
    first_kld: float
    first_kld_p99: float
    step_kld: float | None = None  # of a cold prefill in steps of half as many tokens


class Reader:
    """Runs prompts on one backend and returns the logits of their last tokens, [NUM_PROBED, V]."""

    def __init__(self, backend: Backend, step: int | None = None) -> None:
        """step: tokens of a step at most; None: as many as the backend runs."""
        self._backend, self._number = backend, 0
        self._step = step or backend.capabilities.max_step_tokens

    def read(self, tokens: Sequence[int], namespace: str, reuse: Wanted) -> tuple[Tensor, Reuse]:
        kv, self._number = self._backend.kv, self._number + 1
        found = kv.open(self._number, tokens, namespace, reuse=reuse)
        missing = found.missing(len(tokens))
        assert kv.reserve(self._number, sum(map(len, missing)))
        rows: list[Tensor] = []
        probed = len(tokens) - NUM_PROBED
        for chunk in self._chunks(tokens, missing, probed):
            logits = self._backend.forward([chunk])
            kv.commit(self._number, chunk.start, chunk.token_ids)
            if chunk.want_logits == "all":
                rows.append(logits.double().log_softmax(-1))
        kv.close(self._number, keep=True)
        return torch.cat(rows)[-NUM_PROBED:], found

    def _chunks(self, tokens: Sequence[int], missing: list[range], probed: int) -> Iterator[Chunk]:
        for places in missing:
            edges = sorted({*range(places.start, places.stop, self._step), max(places.start, min(probed, places.stop))})
            for start, stop in zip(edges, [*edges[1:], places.stop], strict=True):
                if start < stop:
                    yield Chunk(self._number, tokens[start:stop], start, "all" if start >= probed else "none")


def measure(
    model: Path, dtype: KVCacheDtype, window: int, num_turns: int, threads: int, num_compared: int = 0
) -> Iterator[dict[str, object]]:
    """The rows of all turns but the first, of a model's folder or of a GGUF file through llama.cpp.

    num_compared: so many of them are also read cold in smaller steps, whose sums are in another order.
    """
    host_mib = 0 if model.is_dir() else 2048  # llama.cpp looks at all cells that are in the cache.
    settings = ModelSettings(
        max_model_len=window,
        max_num_seqs=2,
        threads=threads,
        cache=CacheSettings(tokens=6 * window, dtype=dtype, host_mib=host_mib),
    )
    load: Callable[[Path, ModelSettings, Callable[[float], None]], Backend]
    load = HFBackend if model.is_dir() else GGUFBackend
    with closing(load(model, settings, lambda _: None)) as backend:
        reader, half = Reader(backend), Reader(backend, backend.capabilities.max_step_tokens // 2)

        def encode(text: str) -> list[int]:
            return backend.tokenizer.encode(text, parse_special=True, is_start=True)

        for number, turn in enumerate(story(window, num_turns, lambda text: len(encode(text)))):
            tokens = encode(turn.text)
            if turn.what == "a swipe":
                continue
            kept, found = reader.read(tokens, "kept", "moved")
            first, _ = reader.read(tokens, "healed", "moved")
            cold, _ = reader.read(tokens, "healed", "nothing")  # What it computes is what the next turn begins with.
            if number:
                row = _row(turn.what, tokens, found, kept, first, cold)
                if number <= num_compared:
                    again, _ = half.read(tokens, "in half steps", "nothing")
                    row = replace(row, step_kld=float(_divergence(cold, again).mean()))
                yield asdict(row)


def _divergence(cold: Tensor, rows: Tensor) -> Tensor:
    """Of each token's distribution [n, V], as logarithms, from that of a cold prefill, [n] in nats."""
    return (cold.exp() * (cold - rows)).sum(-1)


def _row(what: str, tokens: Sequence[int], found: Reuse, kept: Tensor, first: Tensor, cold: Tensor) -> Row:
    targets = torch.tensor(tokens[1 - NUM_PROBED :]).unsqueeze(-1)

    def loss(rows: Tensor) -> float:
        return -float(rows[:-1].gather(-1, targets).mean())

    of_kept, of_first = _divergence(cold, kept), _divergence(cold, first)
    return Row(
        what=what,
        num_tokens=len(tokens),
        num_computed=len(tokens) - found.num_tokens,
        num_moved=found.num_inexact,
        kld=float(of_kept.mean()),
        kld_p99=float(of_kept.quantile(0.99)),
        perplexity=float(torch.tensor(loss(kept) - loss(cold)).exp()),
        first_kld=float(of_first.mean()),
        first_kld_p99=float(of_first.quantile(0.99)),
    )
