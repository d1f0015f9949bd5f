"""Kernels compiled for a model before it is served: for which cards, and what came of it."""

from dataclasses import dataclass

# RTX 20; A100; RTX 30, RTX 40; H100 and H200; B200; RTX 50.
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
OLDEST_WITH_BFLOAT16 = 80


@dataclass(frozen=True, slots=True)
class Warmed:
    """What was done for cards of one architecture, 86 for sm_86. The rest of the kernels was there already."""

    architecture: int
    num_kernels: int
    num_compiled: int
    folder: str  # All of them are kept there.
