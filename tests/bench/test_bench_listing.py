"""The listing of the CUDA kernels: how machine code is read, what is committed, and the bars, compiled anew."""

import json
from pathlib import Path

import pytest
import triton

from bench import report
from bench.gpu.listing.cards import CARDS, Card, programs_at_once
from bench.gpu.listing.cases import cases
from bench.gpu.listing.compiled import Compiled, Instruction
from bench.gpu.listing.pipes import busy, loop
from bench.gpu.listing.table import BARS, Row, mixed, row_of

RTX_3090 = CARDS[0]


def code(*lines: str) -> tuple[Instruction, ...]:
    """One instruction a line, sixteen bytes each; a branch names the line that it goes to."""
    found = []
    for i, line in enumerate(lines):
        name, _, operands = line.partition(" ")
        found.append(Instruction(16 * i, name, f"{16 * int(operands):#x}" if operands else ""))
    return tuple(found)


@pytest.mark.quick
def test_a_loop_is_counted_as_often_as_it_is_run():
    lines = code("MOV", "LDG.E.128", "LOP3.LUT", "FFMA", "BRA 1", "STG.E", "EXIT")

    assert loop(lines) == range(1, 5)
    found = busy(lines, 10, 86)
    assert found["issue"] == 10 * 4 + 3
    assert found["alu"] == 2 * (10 + 1)
    assert found["fma"] == 10
    assert found["load_store"] == 4 * (4 * 10 + 1)


@pytest.mark.quick
def test_each_pipe_has_the_cycles_that_its_instructions_take():
    lines = code("HMMA.16816.F32", "HFMA2.MMA", "IMAD.WIDE", "MUFU.EX2", "LDSM.16.M88.4", "LDS.64", "UMOV", "NOP")

    found = busy(lines, 1, 86)

    assert found == {"issue": 8, "alu": 0, "fma": 4, "xu": 8, "tensor": 32, "load_store": 4 * (4 + 2)}
    assert busy(lines, 1, 90)["tensor"] == 4
    assert busy(code("HGMMA.64x8x16.F32"), 1, 90)["tensor"] == 4


@pytest.mark.quick
def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match=r"FROB\.X is in no table"):
        busy(code("FROB.X"), 1, 86)
    with pytest.raises(ValueError, match="a loop has one within it"):
        loop(code("MOV", "MOV", "BRA 1", "MOV", "BRA 0"))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [(56, 1024, 4, 9), (96, 0, 4, 5), (208, 1024, 4, 2), (255, 0, 8, 1), (105, 83 << 10, 4, 1), (24, 0, 1, 16)],
)
def test_registers_shared_memory_and_warps_bound_the_programs_of_a_multiprocessor(
    registers: int, shared: int, warps: int, programs: int
):
    assert programs_at_once(Compiled(registers, 0, shared, warps, ()), RTX_3090) == programs


@pytest.mark.quick
def test_the_committed_listing_is_of_every_card_and_holds_its_bars():
    rows = json.loads((report.RESULTS / "listing.json").read_text())["results"]["kernels"]

    assert {row["card"] for row in rows} == {card.name for card in CARDS}
    assert [row for row in rows if not row["holds"] or row["spills"]] == []
    kinds = ("exl2 4.65 bits", "gptq 4 bits", "gptq 4 bits act-order", "awq 4 bits", "nf4")
    wanted = {f"{kind}, {count}" for kind in kinds for count in ("1 row", "8 rows", "8 rows of bf16")}
    assert {row["case"] for row in rows if row["bar"] is not None} == wanted
    for row in rows:
        if row["bar"] is not None:
            assert max(row["shares"].values()) <= row["bar"]
            assert row["bar"] == next(bar for kind, bar in BARS.items() if row["case"].startswith(kind))


@pytest.mark.slow
@pytest.mark.parametrize("card", [card for card in CARDS if card.capability != 89], ids=lambda card: card.name)
def test_no_kernel_spills_or_keeps_a_pipe_busy_beyond_its_bar(
    card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An RTX 4090's code is that of a 3090, which has less of all for its memory to wait for."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    rows: list[Row] = [row_of(case, card) for case in cases(card.num_processors)]

    assert [(row.case, row.kernel, row.spills, row.shares) for row in mixed(rows) if not row.holds] == []
    assert max(row.shared_bytes for row in rows) <= card.most_shared
