"""What cards can do, by their data sheets and the tables of CUDA's programming guide, and how kernels fill them."""

from dataclasses import dataclass

from bench.gpu.listing.compiled import Compiled

REGISTERS = 65536  # of a multiprocessor, a quarter for each of its four parts
RESERVED = 1024  # bytes of shared memory that the system takes for each program


@dataclass(frozen=True)
class Card:
    """`clock` in Hz, `bandwidth` of memory in bytes a second, `shared` bytes of a multiprocessor for its programs."""

    name: str
    capability: int
    num_processors: int
    clock: float
    bandwidth: float
    shared: int
    most_shared: int  # bytes that a program can have
    most_warps: int  # of a multiprocessor
    most_programs: int


CARDS = (
    Card("RTX 3090", 86, 82, 1.695e9, 936e9, 100 << 10, 99 << 10, 48, 16),
    Card("RTX 4090", 89, 128, 2.52e9, 1008e9, 100 << 10, 99 << 10, 48, 24),
    Card("H200", 90, 132, 1.98e9, 4800e9, 228 << 10, 227 << 10, 64, 32),
)


def programs_at_once(kernel: Compiled, card: Card) -> int:
    """Programs of a kernel that a multiprocessor of the card holds."""
    of_warp = -(-kernel.registers * 32 // 256) * 256
    warps = REGISTERS // 4 // of_warp * 4
    by_shared = card.shared // (kernel.shared + RESERVED)
    return min(warps // kernel.num_warps, by_shared, card.most_warps // kernel.num_warps, card.most_programs)
