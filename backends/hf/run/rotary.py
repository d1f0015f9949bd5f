"""Rotary tables on a device, filled as sequences need them."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from tightrope.backends.rope.scaling import RopeSpec
from tightrope.kernels.forms.layout import PAGE, RopeTable


class RotarySets:
    """The rotary table of one kind of layer: a set of angles for each set of frequencies in use.

    Most kinds have one, made at once for the served window. Where frequencies depend on the length, sequences that
    agree share a set, and sets that a step doesn't use make place for those it needs.
    """

    def __init__(self, spec: RopeSpec, window: int, device: torch.device | str = "cpu") -> None:
        """window: positions that can be rotated, in tokens."""
        self._spec = spec
        self._num_pages = -(-window // PAGE)
        half = spec.rotary_dim // 2
        self._pages = torch.zeros(0, self._num_pages, 2, half, device=device)
        self._places = torch.zeros(0, PAGE, 2, half, device=device)
        self._query_scale = torch.zeros(0, device=device)
        self._sets: OrderedDict[Hashable, int] = OrderedDict()  # By frequencies; least recently used ones first.
        self._filled: list[int] = []  # How many pages of each set hold angles.
        self._static: dict[int, RopeTable] = {}  # By number of sequences, where all always agree.
        if not spec.depends_on_length:
            self.table([window])

    def table(self, lengths: Sequence[int]) -> RopeTable:
        """The table of a step whose sequences compute with the frequencies of these lengths [B], in tokens."""
        if len(lengths) in self._static:
            return self._static[len(lengths)]
        keys = [self._spec.key(length) for length in lengths]
        in_use = set(keys)
        for key, length in zip(keys, lengths, strict=True):
            self._fill(self._set_of(key, in_use, length), length)
        set_of = torch.tensor([self._sets[key] for key in keys], dtype=torch.int32)
        table = RopeTable(self._pages, self._places, set_of.to(self._pages.device), self._query_scale)
        if not self._spec.depends_on_length:
            self._static[len(lengths)] = table
        return table

    def _set_of(self, key: Hashable, in_use: set[Hashable], length: int) -> int:
        """The set of these frequencies: its own, one that isn't in use, or a new one."""
        if key not in self._sets:
            idle = next((other for other in self._sets if other not in in_use), None)
            number = self._grow() if idle is None else self._sets.pop(idle)
            self._begin(number, length)
            self._sets[key] = number
        self._sets.move_to_end(key)
        return self._sets[key]

    def _grow(self) -> int:
        """A new set. The tensors are made anew; tables of earlier steps keep theirs."""
        self._pages, self._places, self._query_scale = (
            torch.cat((tensor, tensor.new_zeros(1, *tensor.shape[1:])))
            for tensor in (self._pages, self._places, self._query_scale)
        )
        self._filled.append(0)
        return len(self._filled) - 1

    def _begin(self, number: int, length: int) -> None:
        self._filled[number] = 0
        self._places[number] = self._angles(length, torch.arange(PAGE))
        # Queries and keys had one factor each.
        self._query_scale[number] = self._spec.frequencies(length)[1] ** 2

    def _fill(self, number: int, length: int) -> None:
        """Have the angles of all pages of a sequence of this length."""
        begin, end = self._filled[number], -(-length // PAGE)
        if begin < end:
            self._pages[number, begin:end] = self._angles(length, torch.arange(begin, end) * PAGE)
            self._filled[number] = end

    def _angles(self, length: int, positions: Tensor) -> Tensor:
        """Cosines and sines [n, 2, R/2] float32 of positions [n], computed in float64."""
        inv_freq = torch.from_numpy(self._spec.frequencies(length)[0]).double()
        angles = positions.double().outer(inv_freq)
        return torch.stack((angles.cos(), angles.sin()), 1).float().to(self._pages.device)
