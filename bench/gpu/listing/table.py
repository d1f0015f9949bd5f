"""A row of the listing: what a kernel takes of a card, and for which share of its bytes' time each pipe is busy."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.gpu.listing.cards import Card, programs_at_once
from bench.gpu.listing.cases import Case
from bench.gpu.listing.compiled import compile_launch
from bench.gpu.listing.pipes import ISSUE, busy, loop
from bench.gpu.matrices import EXL2_MIX

BARS = {"exl2 4.65 bits": 0.6, "gptq": 0.6, "awq": 0.6, "nf4": 0.8}  # of the memory time, for no pipe above it
BARRED_ROWS = ("1 row", "8 rows", "8 rows of bf16")
BARRED_CARD = "RTX 3090"


@dataclass(frozen=True)
class Row:
    """`shares` by pipe, empty for a kernel whose time its bytes don't tell; `barriers` and `body` are of the loop."""

    card: str
    capability: int
    case: str
    kernel: str
    registers: int
    spills: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    programs_at_once: int
    instructions: int
    body: int
    barriers: int
    per_weight: float | None
    memory_s: float
    shares: dict[str, float]

    @property
    def bar(self) -> float | None:
        """The largest share that is allowed."""
        kind, _, rows = self.case.rpartition(", ")
        if self.card != BARRED_CARD or rows not in BARRED_ROWS or not self.shares:
            return None
        return next((bar for name, bar in BARS.items() if kind.startswith(name)), None)

    @property
    def holds(self) -> bool:
        return not self.spills and (self.bar is None or max(self.shares.values()) <= self.bar)


def row_of(case: Case, card: Card) -> Row:
    """Compiles the case."""
    kernel = compile_launch(case.launch, card.capability)
    shares: dict[str, float] = {}
    per_weight, memory_s, body = None, 0.0, range(0)
    if case.num_bytes:
        body = loop(kernel.instructions)
        cycles = busy(kernel.instructions, case.turns, card.capability)
        warps = case.launch.num_programs * kernel.num_warps
        memory_s = case.num_bytes / card.bandwidth
        seconds = {pipe: count * warps / (4 * card.num_processors * card.clock) for pipe, count in cycles.items()}
        shares = {pipe: time / memory_s for pipe, time in seconds.items()}
        per_weight = cycles[ISSUE] * warps * 32 / case.num_weights
    return Row(
        card.name,
        card.capability,
        case.name,
        case.launch.name,
        kernel.registers,
        kernel.num_spills,
        kernel.stack,
        kernel.shared,
        kernel.num_warps,
        programs_at_once(kernel, card),
        len(kernel.instructions),
        len(body),
        sum(kernel.instructions[i].name.startswith("BAR") for i in body),
        per_weight,
        memory_s,
        shares,
    )


def mixed(rows: Sequence[Row]) -> list[Row]:
    """The same rows; that of EXL2 at 4.65 bits with the times of its widths' rows, by their share of the weights."""
    by_name = {row.case: row for row in rows}
    found = []
    for row in rows:
        kind, _, count = row.case.rpartition(", ")
        names = {f"exl2 {bits} bits, {count}": share for bits, share in EXL2_MIX}
        if kind == "exl2 4.65 bits" and names.keys() <= by_name.keys():
            parts = [(by_name[name], share) for name, share in names.items()]
            memory_s = sum(part.memory_s * share for part, share in parts)
            shares = {
                pipe: sum(part.shares[pipe] * part.memory_s * share for part, share in parts) / memory_s
                for pipe in parts[0][0].shares
            }
            per_weight = sum((part.per_weight or 0) * share for part, share in parts)
            row = replace(row, memory_s=memory_s, shares=shares, per_weight=per_weight)
        found.append(row)
    return found
