"""How long each pipe of a multiprocessor is busy with a kernel, read from its machine code.

A multiprocessor has four parts. Each issues one instruction of a warp in a cycle, and has its own pipes: ALU (logic,
integer sums, comparisons, packing of halves: 16 lanes), FMA (float32: 32 lanes in two halves, one of which alone takes
integer products and packed halves), XU (conversions, exponentials: 4 lanes) and tensor. Loads, stores and shuffles of
all four go through one pipe, 128 bytes or 32 lanes in a cycle. Bank conflicts and misses aren't in a listing.

Sources: the throughput table of the CUDA C++ Programming Guide, and the pipes' descriptions in Nsight Compute's.
"""

import re
from collections.abc import Iterator, Sequence

from bench.gpu.listing.compiled import Instruction

ISSUE, ALU, FMA, HEAVY, XU, TENSOR, MEMORY = "issue", "alu", "fma", "fma_heavy", "xu", "tensor", "load_store"

_KINDS = {
    ALU: """BMSK CSEL F2FP FMNMX FSEL FSET FSETP HMNMX2 HSET2 HSETP2 I2FP IABS IADD IADD3 IMNMX ISETP LEA LOP LOP3 MOV
        P2R PLOP3 PRMT R2P R2UR REDUX SEL SGXT SHF SHL SHR VABSDIFF VIADD VIADDMNMX VIMNMX VIMNMX3 VOTE""",
    FMA: "FADD FFMA FMUL FSWZADD",
    HEAVY: "HADD2 HFMA2 HMUL2 IDP IMAD IMUL",
    XU: "BREV F2F F2I FLO FRND I2F I2I MUFU POPC",
    TENSOR: "HGMMA HMMA",
    MEMORY: "ATOM ATOMG ATOMS LD LDG LDGSTS LDL LDS LDSM RED SHFL ST STG STL STS STSM",
    # What runs where no pipe is short: control and waits. Instructions of uniform registers begin with a U.
    ISSUE: """ACQBULK BAR BMOV BRA BREAK BRX BSSY BSYNC CALL CCTL CS2R DEPBAR ELECT ERRBAR EXIT FENCE LDC LDGDEPBAR
        MEMBAR NANOSLEEP NOP RET S2R S2UR SYNCS WARPGROUP WARPSYNC YIELD""",
}
_PIPE_OF = {kind: pipe for pipe, kinds in _KINDS.items() for kind in kinds.split()}
_BYTES = re.compile(r"\.(64|128)\b")
_MATRICES = re.compile(r"\.([124])$")


def loop(instructions: Sequence[Instruction]) -> range:
    """Places of the instructions of a kernel's one large loop; empty where it has none.

    Raises ValueError for a loop within it, whose turns nothing tells.
    """
    place = {line.address: i for i, line in enumerate(instructions)}
    found = []
    for i, line in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", line.operands)
        if line.name.startswith("BRA") and target and int(target[1], 16) < line.address:
            found.append(range(place[int(target[1], 16)], i + 1))
    if not found:
        return range(0)
    largest = max(found, key=len)
    if any(other.start in largest and other.stop - 1 in largest for other in found if other != largest):
        raise ValueError("a loop has one within it")
    return largest


def busy(instructions: Sequence[Instruction], turns: float, capability: int) -> dict[str, float]:
    """Cycles of one part's pipes that a warp needs whose loop is run `turns` times, all branches taken.

    Those of loads and stores are cycles of the whole multiprocessor, times four.
    """
    body = loop(instructions)
    total = dict.fromkeys((ISSUE, ALU, FMA, HEAVY, XU, TENSOR, MEMORY), 0.0)
    for i, line in enumerate(instructions):
        for pipe, cycles in _costs(line, capability):
            total[pipe] += cycles * (turns if i in body else 1)
    total[FMA] = max(total[FMA], total.pop(HEAVY))
    return total


def _costs(line: Instruction, capability: int) -> Iterator[tuple[str, float]]:
    kind = line.name.partition(".")[0]
    pipe = _PIPE_OF.get(kind, ISSUE if kind.startswith("U") else None)
    if pipe is None:
        raise ValueError(f"{line.name} is in no table of pipes")
    yield ISSUE, 1
    if pipe == HEAVY:
        yield FMA, 1
        yield HEAVY, 1 if kind.startswith("H") and capability >= 90 else 2
    elif pipe == TENSOR:
        yield TENSOR, _products(line.name, capability)
    elif pipe == MEMORY:
        yield MEMORY, 4 * _rows(line.name)
    elif pipe != ISSUE:
        yield pipe, {ALU: 2, FMA: 1, XU: 8}[pipe]


def _products(name: str, capability: int) -> float:
    """Cycles of a part's tensor pipe; cards for games have float32 sums at half the rate of float16 ones."""
    if group := re.search(r"\.64x(\d+)x", name):  # a group of four warps multiplies
        return int(group[1]) / 2
    whole = 32 if ".16816." in name else 16
    return whole / 8 if capability >= 90 else whole if ".F32" in name else whole / 2


def _rows(name: str) -> int:
    """Times 128 bytes that an instruction moves for a warp, if its addresses are neighbours."""
    if name.startswith(("LDSM", "STSM")):
        matrices = _MATRICES.search(name)
        return int(matrices[1]) if matrices else 1
    wide = _BYTES.search(name)
    return int(wide[1]) // 32 if wide else 1
