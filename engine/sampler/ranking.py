"""The largest logits of each row, in order, without sorting a vocabulary.

Sorting 50,000 logits takes 2 ms; what truncation keeps is usually a handful. So the vocabulary is cut into blocks of
64, and one pass takes each block's maximum. The n-th largest maximum is the border: only blocks with a larger one are
looked into, and there only tokens above it are listed. At least n - 1 are, unless some tie with the border; and nothing
above the border is missed.

Whole rows are read on the device where the logits are. The lists are small, and live in numpy on the host, where a step
over them costs a microsecond.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 64  # tokens; the fastest of 32, 64 and 128 at one row and at eight

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Ranking:
    """The largest logits of each row: descending, equals by id."""

    logits: Floats  # [B, N]; -inf where nothing is listed
    token_ids: Ids  # [B, N]
    border: Floats  # [B, 1]: no token that isn't listed has a larger logit; -inf: all are listed
    top: Floats  # [B, 1]: the largest; not finite in a row from which nothing can be drawn


class Blocks:
    """A batch of logits cut into blocks, and the largest logit of each."""

    def __init__(self, logits: Tensor) -> None:
        """logits [B, V] float32."""
        if logits.shape[1] % BLOCK:
            logits = F.pad(logits, (0, -logits.shape[1] % BLOCK), value=-torch.inf)
        self._blocks = logits.reshape(-1, BLOCK)  # [B * V / 64, 64]
        self.maxima: Floats = self._blocks.amax(-1).cpu().numpy().reshape(len(logits), -1)  # [B, V / 64]
        self.top: Floats = self.maxima.max(1, keepdims=True)  # [B, 1]; not finite where nothing can be drawn
        self.num = self.maxima.shape[1]  # of blocks in a row

    def argmax(self) -> Ids:
        """The token of the largest logit of each row, the lowest id among equals: [B]."""
        best = self.maxima.argmax(1)
        inside = self._read(best + np.arange(len(best)) * self.num)
        token_ids: Ids = best * BLOCK + inside.argmax(1)
        return token_ids

    def rank(self, rows: Ids, wanted: Sequence[int]) -> Ranking:
        """At least `wanted` of the largest logits of these rows, or fewer where equals at the border are left out.

        A row is listed whole where as many are wanted as it has blocks.
        """
        maxima = self.maxima[rows]
        size = self.num
        listed = np.partition(maxima, sorted({max(size - 1 - n, 0) for n in wanted}), axis=1)
        borders = [[listed[row, size - 1 - n] if n < size else -np.inf] for row, n in enumerate(wanted)]
        border = np.array(borders, np.float32)
        lines, chosen = np.divmod(np.flatnonzero(maxima > border), size)
        inside = self._read(rows[lines] * size + chosen)
        found = np.flatnonzero(inside > border[lines])
        block, place = np.divmod(found, BLOCK)
        lines, token_ids = lines[block], chosen[block] * BLOCK + place  # ascending, line by line
        counts = np.bincount(lines, minlength=len(rows))
        columns = np.arange(len(lines)) - (counts.cumsum() - counts)[lines]
        keys = np.full((len(rows), max(int(counts.max()), 1)), _NOTHING)
        keys[lines, columns] = _keys(inside.ravel()[found], token_ids)
        keys.sort(axis=1)
        return Ranking(_values(keys), keys & _ID_MASK, border, self.top[rows])

    def _read(self, places: Ids) -> Floats:
        """Whole blocks [..., 64], by their places in the batch."""
        inside: Floats = self._blocks.index_select(0, torch.from_numpy(places).to(self._blocks.device)).cpu().numpy()
        return inside


def vocabulary_weight(logits: Tensor, top: Floats, temperature: Doubles) -> Doubles:
    """Weight of each whole row, where the likeliest token weighs 1: the sum of exp((logit - top) / temperature).

    logits [B, V] float32; top, its largest of each row, temperature and the result [B, 1]. log_softmax is the fastest
    fused pass that torch has on a CPU.
    """
    if (temperature != 1).any():
        divisor = torch.from_numpy(temperature).to(logits.device, torch.float32)
        logits = (logits - torch.from_numpy(top).to(logits.device)).div_(divisor)
    share: Doubles = logits.log_softmax(-1).amax(-1, keepdim=True).double().cpu().numpy()
    return np.exp(-share)


def _keys(values: Floats, token_ids: Ids) -> Ids:
    """One integer a token that sorts larger values first, equals by id: the float's bits, turned, above the id."""
    bits = (values + np.float32(0)).view(np.int32)  # + 0 makes -0 equal to 0
    return (~_rising(bits)).astype(np.int64) << 32 | token_ids


def _values(keys: Ids) -> Floats:
    return _rising(~(keys >> 32).astype(np.int32)).view(np.float32)


def _rising(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """The bits of float32s as integers in the order of the floats; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


_ID_MASK = 0xFFFFFFFF
_NOTHING = _keys(np.array([-np.inf], np.float32), np.zeros(1, np.int64))[0]  # behind everything
