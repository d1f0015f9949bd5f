"""bench/gpu on a machine without a card: it says so, and its smoke run goes through everything at tiny sizes."""

import json
import os
import subprocess
import sys

import pytest
from checkout import ROOT

# what a bare machine lacks: tightrope's other dependencies
MISSING = ("pydantic", "msgspec", "fastapi", "llama_cpp", "httpx", "uvicorn", "jinja2")
BARE = f"""
import runpy, sys
for name in {MISSING!r}: sys.modules[name] = None
runpy.run_module("bench.gpu", run_name="__main__")
"""


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    """bench.gpu in a fresh interpreter that sees no card, and nothing that only tightrope needs."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", BARE, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_without_a_card_it_says_so_in_one_line():
    result = run()

    assert result.returncode == 1
    assert result.stderr == "bench.gpu: no CUDA device; --smoke runs tiny sizes on a CPU\n"


@pytest.mark.slow
def test_its_smoke_run_checks_every_kernel_on_a_bare_machine():
    result = run("--smoke")

    assert result.returncode == 0, result.stderr
    results = json.JSONDecoder().raw_decode(result.stdout)[0]
    assert {row["kernel"].split()[0] for row in results["checks"]} == {
        "store_kv", "rotate", "attention", "rms_norm", "gated", "quantized", "experts"
    }  # fmt: skip
    assert all(row["holds"] for row in results["checks"])
    assert [row["sequences"] for row in results["decode"]] == [1, 2]
    assert {row["rows"] for row in results["products"]} == {1, 8}
    assert {row["matrix"].split()[0] for row in results["products"]} == {"gptq", "exl2", "nf4"}
    (row,) = results["exl2_decode"]
    assert row["kernel"] == "Triton"
    assert row["planned_weight_bytes"] > row["step_bytes"] - 40 * row["layers"] * 2 * 2 * (32 + 2) > 0
    assert results["decode_attention"][0]["layer_bytes"] == 200 * 2 * 8 * (128 + 2 * 4)
    mixtures = results["mixture_decode"]
    assert [row["sequences"] for row in mixtures] == [1, 2]
    assert mixtures[0]["experts_read"] == 2 * 2  # layers, and experts of a token
    assert mixtures[0]["step_bytes"] < mixtures[1]["step_bytes"]
