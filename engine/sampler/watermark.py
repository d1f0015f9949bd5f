"""The watermark of Text Generation Inference: after each token, half of the vocabulary is a little likelier.

Which half, the token before tells, so that who knows the rule can count how many tokens of a text are of their halves.
Source: Kirchenbauer et al. 2023, "A Watermark for Large Language Models", arXiv 2301.10226, with the hash and the
permutation of TGI 3.3.7 (server/text_generation_server/utils/watermark.py), which are torch's on a CPU; a text that is
marked here is found by what finds TGI's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

HASH_KEY = 15_485_863  # It is the millionth prime.


def green_ids(previous: int, vocab_size: int, gamma: float) -> Tensor:
    """[gamma * V] int64, on the CPU: the ids that are likelier behind the token `previous`."""
    generator = torch.Generator()
    generator.manual_seed(HASH_KEY * previous)
    return torch.randperm(vocab_size, generator=generator)[: int(vocab_size * gamma)]


class Watermark:
    """What one sequence's logits gain, whose last token it follows."""

    def __init__(self, gamma: float, delta: float, prompt_token_ids: Sequence[int], vocab_size: int) -> None:
        """gamma: the share of the vocabulary that is likelier; delta: by how much, added to its logits."""
        self._gamma, self._delta, self._vocab_size = gamma, delta, vocab_size
        self._token_ids = list(prompt_token_ids[-1:])
        self._num_first = len(self._token_ids)

    def append(self, token_id: int) -> None:
        """A token was generated."""
        self._token_ids.append(token_id)

    def truncate(self, num_output: int) -> None:
        """Forget the output after its first `num_output` tokens."""
        del self._token_ids[self._num_first + num_output :]

    def add_to(self, row: Tensor) -> None:
        """Add to a row of logits [V] float32, before anything else does."""
        if self._token_ids:
            green = green_ids(self._token_ids[-1], self._vocab_size, self._gamma)
            row[green.to(row.device)] += self._delta
