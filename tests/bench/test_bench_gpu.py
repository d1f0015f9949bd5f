"""bench/gpu on a machine without a card: it says so, and its smoke runs go through every slice at tiny sizes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkout import ROOT

from bench.gpu import __main__ as gpu
from bench.gpu import run as measured
from bench.gpu.slices import SLICES
from bench.report import RowFile

# what a bare machine lacks: tightrope's other dependencies
MISSING = ("pydantic", "msgspec", "fastapi", "llama_cpp", "httpx", "uvicorn", "jinja2")
# a checkout whose package isn't installed: what pip has left of it is taken away
UNINSTALLED = """for found in (sys.meta_path, sys.path):
    found[:] = [each for each in found if "__editable__" not in str(each)]
"""
Rows = list[dict[str, object]]


def run(folder: Path, *words: str, missing: tuple[str, ...] = ()) -> tuple["subprocess.CompletedProcess[str]", Rows]:
    """bench.gpu in a fresh interpreter that sees no card, and the rows that it wrote into the folder."""
    hidden = "".join(f"sys.modules[{name!r}] = None\n" for name in missing)
    (folder / "sitecustomize.py").write_text(f"import sys\n{hidden}{UNINSTALLED}")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "bench.gpu", "--out", str(folder / "out"), *words]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    written = folder / "out" / "smoke.jsonl"
    return result, read(written) if written.exists() else []


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def smoke(folder: Path, name: str, missing: tuple[str, ...] = ()) -> Rows:
    """What one slice measured, which held."""
    result, rows = run(folder, "--smoke", "--budget", "3000", "--only", name, missing=missing)
    assert result.returncode == 0, result.stderr
    environment, device, *found, end = rows
    assert {"command", "versions", "machine"} <= environment.keys()
    assert device == {"slice": name, "device": {"name": "cpu"}}
    assert end["status"] == 0
    assert all(row["slice"] == name and row.get("holds") is not False for row in found)
    return found


def test_without_a_card_it_says_so_in_one_line(tmp_path: Path):
    result, rows = run(tmp_path)

    assert result.returncode == 1
    assert result.stderr == "bench.gpu: no CUDA device; --smoke runs tiny sizes on a CPU\n"
    assert not rows


def test_a_slice_that_does_not_fit_what_is_left_of_the_budget_is_not_begun(tmp_path: Path):
    result, rows = run(tmp_path, "--smoke", "--budget", "5", "--only", "kernels", "store")

    assert result.returncode == 1
    assert [row["slice"] for row in rows[1:]] == ["store", "kernels"]
    assert all("left of the budget, and it takes about" in str(row["not_begun"]) for row in rows[1:])
    assert "store: not begun: " in result.stderr


def test_all_slices_fit_into_ten_minutes():
    assert sum(slice.seconds for slice in SLICES) <= gpu.BUDGET_S < 600


def test_a_bar_is_met_in_cycles_where_memory_outruns_the_processors(monkeypatch: pytest.MonkeyPatch):
    cycles, bandwidth = 132 * 1.98e9, 4.8e12  # of an H200
    monkeypatch.setattr(measured, "processor_cycles", lambda device: cycles)
    monkeypatch.setattr(measured, "memory_bandwidth", lambda device, num_bytes: bandwidth)
    card = measured.Run(torch.device("cuda"), is_smoke=False)
    bytes_a_cycle = 936e9 / (82 * 1.695e9)  # of an RTX 3090

    row = card.judged(1 << 30, (1 << 30) / (0.61 * bytes_a_cycle * cycles), 0.6)
    assert row["holds"] is True
    assert row["share"] == pytest.approx(0.61 * bytes_a_cycle * cycles / bandwidth)
    assert row["share_3090"] == pytest.approx(0.61)
    assert card.judged(1 << 30, (1 << 30) / (0.59 * bytes_a_cycle * cycles), 0.6)["holds"] is False
    assert card.judged(1 << 30, (1 << 30) / (0.61 * bandwidth), 0.6)["holds"] is True


def test_the_rows_of_a_slice_that_dies_are_kept(tmp_path: Path):
    rows = RowFile("gpu", tmp_path)
    code = f"import os; print('{{\"kernel\": 1}}', flush=True); os.kill(os.getpid(), {signal.SIGSEGV.value})"

    assert gpu._follow([sys.executable, "-c", code], 60, "store", rows) == (-signal.SIGSEGV, True)
    assert read(rows.path)[1:] == [{"slice": "store", "kernel": 1}]


def test_a_row_that_was_cut_stays_on_a_line_of_its_own(tmp_path: Path):
    (tmp_path / "gpu.jsonl").write_text('{"slice": "store"}\n{"slice": "ker')

    RowFile("gpu", tmp_path).add({"slice": "model"})

    first, cut, environment, last = (tmp_path / "gpu.jsonl").read_text().splitlines()
    assert (first, cut, last) == ('{"slice": "store"}', '{"slice": "ker', '{"slice": "model"}')
    assert "versions" in json.loads(environment)


@pytest.mark.slow
def test_what_is_stored_is_checked_on_a_bare_machine(tmp_path: Path):
    rows = smoke(tmp_path, "store", MISSING)

    assert {row["kernel"] for row in rows} == {"store_kv"}
    assert len(rows) == 6


@pytest.mark.slow
def test_every_kernel_is_checked_on_a_bare_machine(tmp_path: Path):
    compiled, *rows = smoke(tmp_path, "kernels", MISSING)

    assert compiled["compiled"] == 0  # in an interpreter
    assert {row["kernel"] for row in rows} == {
        "rotate", "attention", "rms_norm", "gated", "exl2", "gptq", "awq", "nf4", "low rank",
        "experts plain", "experts gptq", "experts exl2",
    }  # fmt: skip


@pytest.mark.slow
def test_a_tiny_checkpoint_is_run_eagerly_recorded_and_on_the_cpu(tmp_path: Path):
    rows = smoke(tmp_path, "model")

    pairs = [row for row in rows if "error" in row]
    assert [row["case"] for row in pairs] == ["eager = CPU, 3 sequences", "recorded = eager, 3 sequences"]
    assert {row["copied_pages"] for row in rows if "error" not in row} == {1}


@pytest.mark.slow
def test_what_a_slice_lacks_is_told(tmp_path: Path):
    result, rows = run(tmp_path, "--smoke", "--only", "model", missing=MISSING)

    assert result.returncode == 1
    assert str(rows[2]["failed"]).startswith("ModuleNotFoundError: import of ")


@pytest.mark.slow
def test_a_step_without_memory_is_followed_by_a_good_one(tmp_path: Path):
    rows = smoke(tmp_path, "memory")

    assert [row["same_logits"] for row in rows] == [True, True]
    assert all(str(row["refusal"]).startswith("OutOfMemory: out of memory in a step of 200 tokens") for row in rows)


@pytest.mark.slow
def test_a_real_server_is_asked(tmp_path: Path):
    start, *asked, log = smoke(tmp_path, "serve")

    assert "start_s" in start
    assert [(row["prompt_tokens"], row["tokens"]) for row in asked] == [(16, 8), (100, 8), (100, 8)]
    assert asked[-1]["cached_tokens"] == 99
    assert "rope: no scaling, theta 5000000, trained window 4096 tokens, served window 256" in str(log["lines"])


@pytest.mark.slow
def test_steps_and_their_kernels_are_timed(tmp_path: Path):
    rows = smoke(tmp_path, "profile")

    steps = [
        "loaded",
        "decode",
        "decode, agreeing",
        "5 tokens of a prompt",
        "20 tokens of a prompt",
        "recording all",
        "peak",
    ]
    assert [row["step"] for row in rows if "kernel" not in row] == steps
    assert {row["step"] for row in rows if row.get("kernel") == "all"} == {steps[1], *steps[3:5]}
    decode = next(row for row in rows if "step_bytes" in row)
    assert decode["step_bytes"] > 48 * 2 * 2 * 2 * (32 + 2)  # keys and values: tokens, layers, heads, bytes


@pytest.mark.slow
def test_other_ways_for_prompts_are_timed_on_a_bare_machine(tmp_path: Path):
    rows = smoke(tmp_path, "alternatives", MISSING)

    assert {row["attention"] for row in rows if "attention" in row} == {"ours, q8", "ours, f16", "torch's flash"}
    assert [row["tokens"] for row in rows if row.get("product") == "exl2, expanded"] == [5, 20]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_rows"), [("attention", 1), ("products", 8)])
def test_speeds_of_kernels_are_measured_on_a_bare_machine(tmp_path: Path, name: str, num_rows: int):
    assert len(smoke(tmp_path, name, MISSING)) == num_rows


@pytest.mark.slow
def test_a_mixture_reads_the_experts_that_were_picked(tmp_path: Path):
    one, two = smoke(tmp_path, "mixture")

    assert one["experts_read"] == 2 * 2  # layers, and experts of a token
    assert int(str(one["step_bytes"])) < int(str(two["step_bytes"]))
