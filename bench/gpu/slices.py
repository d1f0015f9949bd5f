"""The slices of bench.gpu in their order: what a short time with a card should be spent on first stands first."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Slice:
    """`module` is one of bench.gpu whose `rows` yields what it measures.

    seconds: it is not begun with less of the budget left, and is ended after MOST_TIMES as many.
    """

    name: str
    module: str
    seconds: int
    about: str


MOST_TIMES = 3
SLICES = (
    Slice("store", "store", 20, "what is stored in the cache, to the bit"),
    Slice("kernels", "kernels", 90, "every kernel against the reference, at two shapes"),
    Slice("model", "checkpoint", 60, "a tiny checkpoint: eager, recorded and on the CPU alike"),
    Slice("memory", "memory", 20, "a step without memory, and the next"),
    Slice("serve", "serving", 90, "a server with a 34B model in 23.4 GiB"),
    Slice("profile", "profile", 90, "where a decode step and a prompt at 24,000 tokens spend their time"),
    Slice("alternatives", "alternatives", 30, "prompts' attention and products beside other ways to compute them"),
    Slice("attention", "attention", 20, "decode attention against its bar"),
    Slice("products", "products", 60, "products of quantized matrices against the memory's bandwidth"),
    Slice("mixture", "mixture", 50, "decode of a mixture of experts at 4 bits"),
)
