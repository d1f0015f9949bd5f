"""Compile every kernel of kernels/triton at a 34B model's shapes and read what it will do from its machine code.

`python -m bench.gpu.listing` needs no card: Triton brings the compiler, the assembler and the tool that lists. Writes
bench/results/listing.json and exits with 1 for a kernel that spills registers, or keeps a pipe busy for longer than its
bar. `--arch 86` compiles for one card alone, `--only TEXT ...` what has one in its name; both only print.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict

import triton

from bench import report
from bench.gpu.listing.cards import CARDS
from bench.gpu.listing.cases import cases
from bench.gpu.listing.table import Row, mixed, row_of


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.listing", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, choices=[card.capability for card in CARDS], help="one card alone")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="what has one of these in its name")
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        for card in CARDS:
            if arguments.arch in (None, card.capability):
                of_card: list[Row] = []
                for case in cases(card.num_processors):
                    if any(text in case.name for text in arguments.only):
                        of_card.append(row_of(case, card))
                        print(_line(of_card[-1]), flush=True)
                rows += mixed(of_card)
    failing = [row for row in rows if not row.holds]
    for row in failing:
        print(f"fails: {row.card}, {row.case}, {row.kernel}: {', '.join(_reasons(row))}", file=sys.stderr)
    if arguments.arch is None and arguments.only == [""]:
        written = report.write(
            "listing", {"kernels": [{**asdict(row), "bar": row.bar, "holds": row.holds} for row in rows]}
        )
        print(f"written to {written}")
    return 1 if failing else 0


def _line(row: Row) -> str:
    shares = " ".join(f"{pipe} {share:.0%}" for pipe, share in row.shares.items())
    per_weight = "" if row.per_weight is None else f", {row.per_weight:.2f} instructions a weight"
    return (
        f"{row.card}: {row.case} ({row.kernel}): {row.registers} registers, {row.spills} spills, "
        f"{row.shared_bytes / 1024:.1f} KiB, {row.programs_at_once} x {row.warps} warps, "
        f"{row.barriers} barriers{per_weight} {shares}"
    )


def _reasons(row: Row) -> Iterator[str]:
    if row.spills:
        yield f"{row.spills} spills"
    for pipe, share in row.shares.items():
        if row.bar is not None and share > row.bar:
            yield f"{pipe} busy for {share:.0%} of the memory time, at most {row.bar:.0%} are allowed"


if __name__ == "__main__":
    sys.exit(main())
