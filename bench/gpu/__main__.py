"""The CUDA side in one command: every Triton kernel against the reference, then speeds against the card's own.

Last come an EXL2 model of Yi-34B's shape in 24 GiB, for which exllamav2's kernels run beside ours where they are
installed, and a Mixtral of 8x7B's shape at 4 bits.

`python -m bench.gpu` in the checkout, on a machine with a CUDA card, PyTorch, Triton and transformers; no more is
needed, nothing need be installed. Writes bench/results/gpu.json and exits with 1 if a result is wrong or below its bar.
`--smoke` runs everything at tiny sizes on a CPU, in Triton's interpreter, prints the results and judges no speed.
"""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU, to see that the program runs")
    is_smoke = parser.parse_args().smoke
    if is_smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    try:
        import torch
        import transformers  # noqa: F401  its absence is told here, not after minutes
        import triton  # noqa: F401
    except ImportError as error:
        return _refuse(f"{error.name} is missing; install torch, triton and transformers")
    if not is_smoke and not torch.cuda.is_available():
        return _refuse("no CUDA device; --smoke runs tiny sizes on a CPU")

    from bench import report
    from bench.gpu import attention, correctness, experts, model, quantized, quantized_model, timing

    device = torch.device("cpu" if is_smoke else "cuda")
    bandwidth = timing.memory_bandwidth(device, 1 << (20 if is_smoke else 31))
    _show(f"memory: a copy moves {bandwidth / 1e9:.0f} GB/s")
    results: dict[str, object] = {"device": _describe(device), "bandwidth_gb_s": bandwidth / 1e9}
    checks = [
        *correctness.check_kernels(device, is_smoke, _show),
        *quantized.check_products(device, is_smoke, _show),
        *experts.check(device, is_smoke, _show),
    ]
    speeds = []
    for name, measure in (
        ("decode_attention", attention.measure),
        ("products", quantized.measure),
        ("decode", model.measure),
        ("exl2_decode", quantized_model.measure),
        ("mixture_decode", experts.measure),
    ):
        rows = measure(device, bandwidth, is_smoke, _show)
        results[name] = rows
        speeds += rows
    results["checks"] = checks
    if is_smoke:
        print(json.dumps(results, indent=2))
    else:
        print(f"written to {report.write('gpu', results)}")
    wrong, slow = ([row for row in rows if not row["holds"]] for rows in (checks, speeds))
    for row in wrong:
        print(f"wrong: {row['kernel']}: {row['case']}: error {row['error']:.2g}, allowed {row['bound']:.2g}")
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks hold, {len(slow)} of {len(speeds)} speeds below a bar")
    return 1 if wrong or (slow and not is_smoke) else 0


def _refuse(reason: str) -> int:
    print(f"bench.gpu: {reason}", file=sys.stderr)
    return 1


def _show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _describe(device: "torch.device") -> dict[str, object]:
    import torch

    if device.type != "cuda":
        return {"name": "cpu"}
    card = torch.cuda.get_device_properties(device)
    return {
        "name": card.name,
        "multiprocessors": card.multi_processor_count,
        "memory_gib": round(card.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    sys.exit(main())
