"""The CUDA side in slices, the most telling first: right or wrong, then how fast, well within ten minutes.

`python -m bench.gpu` in the checkout, on a machine with a CUDA card, PyTorch, Triton and transformers; the slices that
load a model need what tightrope needs. Each row is added to gpu.jsonl in --out as soon as it is measured, so
that a run that is cut keeps the others; a later run, of other slices perhaps, goes on in the same file. Exits with 1 if
a result is wrong or below its bar, or a slice was not run. `--smoke` goes through everything at tiny sizes on a CPU, in
Triton's interpreter, and judges no speed.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from bench import report
from bench.gpu.slices import MOST_TIMES, SLICES, Slice

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = 540


def main() -> int:
    options = _options()
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
    refusal = _refusal(options.smoke)
    if refusal is not None:
        print(f"bench.gpu: {refusal}", file=sys.stderr)
        return 1
    ends_s = time.monotonic() + options.budget
    rows = report.RowFile("smoke" if options.smoke else "gpu", options.out)
    cache = options.cache or options.out / "triton"
    os.environ["TRITON_CACHE_DIR"] = str(cache.resolve())
    wanted = [slice for slice in SLICES if slice.name in (options.only or [slice.name])]
    failing = [slice.name for slice in wanted if not _run(slice, options.smoke, ends_s, rows)]
    print(f"written to {rows.path}; {len(wanted) - len(failing)} of {len(wanted)} slices hold", file=sys.stderr)
    if failing:
        print(f"not so: {', '.join(failing)}", file=sys.stderr)
    return 1 if failing else 0


def _options() -> argparse.Namespace:
    lines = [__doc__.partition("\n")[0], ""]
    lines += [f"  {slice.name:13} {slice.about} ({slice.seconds} s)" for slice in SLICES]
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [slice.name for slice in SLICES]
    parser.add_argument("--only", nargs="+", choices=names, metavar="SLICE", help="these alone, in the order above")
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET_S,
        metavar="SECONDS",
        help=f"begin no slice that would not fit into what is left of so many; default: {BUDGET_S}",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the results")
    parser.add_argument("--cache", type=Path, help="folder of compiled kernels (Triton's); default: triton in --out")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU, to see that the program runs")
    return parser.parse_args()


def _refusal(is_smoke: bool) -> str | None:
    """Why there is nothing to run on, in one line."""
    try:
        for name in ("torch", "triton", "transformers"):
            importlib.import_module(name)
    except ImportError as error:
        return f"{error.name} is missing; install torch, triton and transformers"
    import torch

    return None if is_smoke or torch.cuda.is_available() else "no CUDA device; --smoke runs tiny sizes on a CPU"


def _run(slice: Slice, is_smoke: bool, ends_s: float, rows: report.RowFile) -> bool:
    """Whether all of a slice was measured and holds."""
    begun_s = time.monotonic()
    left_s = ends_s - begun_s
    if left_s < slice.seconds:
        why = f"{left_s:.0f} s are left of the budget, and it takes about {slice.seconds}"
        rows.add({"slice": slice.name, "not_begun": why})
        print(f"{slice.name}: not begun: {why}", file=sys.stderr)
        return False
    limit_s = left_s if is_smoke else min(left_s, MOST_TIMES * slice.seconds)
    command = [sys.executable, "-m", "bench.gpu.one", slice.module, *(["--smoke"] if is_smoke else [])]
    status, holds = _follow(command, limit_s, slice.name, rows)
    took_s = time.monotonic() - begun_s
    end: dict[str, object] = {"slice": slice.name, "seconds": took_s, "status": status}
    if took_s >= limit_s:
        end["ended"] = f"after {limit_s:.0f} s"
    rows.add(end)
    print(f"{slice.name}: {took_s:.0f} s, {'holds' if holds and not status else 'does not hold'}", file=sys.stderr)
    return holds and not status


def _follow(command: Sequence[str], limit_s: float, name: str, rows: report.RowFile) -> tuple[int, bool]:
    """Run one slice and keep each row that it prints; returns its exit status, and whether all rows hold."""
    holds = True
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        timer = threading.Timer(limit_s, _kill, [process])
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                row = {"slice": name, **json.loads(line)}
                rows.add(row)
                holds = holds and row.get("holds") is not False
                print(_told(row), file=sys.stderr, flush=True)
            return process.wait(), holds
        finally:
            timer.cancel()
            _kill(process)


def _kill(process: "subprocess.Popen[str]") -> None:
    """A slice with all that it started: a server, for one."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _told(row: dict[str, object]) -> str:
    """A row as people read it."""
    parts = [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()]
    return " ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
