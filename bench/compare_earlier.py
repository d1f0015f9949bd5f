"""Compare this checkout with an earlier one: python -m bench.compare_earlier CHECKOUT MODEL [MODEL ...]

CHECKOUT has an environment of its own in .venv. Three times (--runs) both servers start side by side on each model, now
this one first and now the other, because a process is some percent faster or slower by where its memory lies, and take
turns at each scenario, A B, then B A. Bar: the median of the runs is no worse than the earlier one's by more than 3 %,
or by more than the earlier one's own runs lie apart, whichever is more. Writes bench/results/compare_earlier.json.
"""

import argparse
import asyncio
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

from bench import report
from bench.compare import compared
from bench.load import chosen
from bench.peers import PEERS, Setup, StartFailed, end_servers_when_told
from bench.sse import RequestFailed
from bench.stats import Sample

ROUNDS = 2
ALLOWED = 0.03
NOW, EARLIER = "tightrope", "tightrope, earlier"
# what is compared, and whether more of it is better
METRICS = {
    "1 stream": {"decode_tokens_per_s": True, "ttft_ms": False},
    "8 streams": {"tokens_per_s": True, "ttft_ms": False},
    "growing chat": {"first_ttft_ms": False, "second_ttft_ms": False},
    "long prompt": {"ttft_ms": False, "largest_gap_ms": False},
}


async def run_once(setup: Setup, checkout: Path, scenarios: list[str], run: int) -> list[Sample]:
    """Start both servers, let them take turns at everything, and end them. Raises StartFailed and RequestFailed."""
    sides = [PEERS[NOW], replace(PEERS[NOW], name=EARLIER, checkout=checkout)]
    if run % 2:
        sides.reverse()
    return await compared(sides, setup, chosen(scenarios), ROUNDS, salt=f"earlier {run}")


def medians(runs: Sequence[Sequence[Sample]], server: str, scenario: str, metric: str) -> list[float]:
    """Of each run, the median over its rounds."""
    return [
        median(sample.metrics[metric] for sample in run if (sample.server, sample.scenario) == (server, scenario))
        for run in runs
    ]


def judged(runs: Sequence[Sequence[Sample]]) -> list[dict[str, object]]:
    """For each metric: both sides' medians of each run, how much slower this checkout is, and how much it may be."""
    rows: list[dict[str, object]] = []
    for scenario in dict.fromkeys(sample.scenario for sample in runs[0]):
        for metric, more_is_better in METRICS[scenario].items():
            earlier = medians(runs, EARLIER, scenario, metric)
            now = medians(runs, NOW, scenario, metric)
            ratio = median(now) / median(earlier)
            slower = 1 / ratio - 1 if more_is_better else ratio - 1
            allowed = max(ALLOWED, (max(earlier) - min(earlier)) / median(earlier))
            rows.append(
                {
                    "scenario": scenario,
                    "metric": metric,
                    "earlier": earlier,
                    "now": now,
                    "slower": slower,
                    "allowed": allowed,
                    "met": slower <= allowed,
                }
            )
    return rows


async def _run(options: argparse.Namespace) -> None:
    found: dict[str, object] = {"earlier": _commit(options.checkout)}
    for model in options.model:
        setup = Setup(model, threads=options.threads)
        described: dict[str, object] = {**asdict(setup), "model": model.name}
        runs = [await run_once(setup, options.checkout, options.scenario, run) for run in range(options.runs)]
        rows = judged(runs)
        found[model.name] = {
            "setup": described,
            "compared": rows,
            "rounds": [[asdict(sample) for sample in run] for run in runs],
        }
        report.write(options.name, found)
        for row in rows:
            mark = "met   " if row["met"] else "MISSED"
            told = f"{row['slower']:+.1%} slower, {row['allowed']:.1%} allowed"
            print(f"{mark} {model.name}, {row['scenario']}, {row['metric']}: {told}", flush=True)


def _commit(checkout: Path) -> str:
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(git, cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of the earlier checkout, with its .venv")
    parser.add_argument("model", nargs="+", type=Path, help="a .gguf file, or a folder of a Hugging Face model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scenario", nargs="+", choices=METRICS, default=list(METRICS))
    parser.add_argument("--name", default="compare_earlier", help="results go to bench/results/NAME.json")
    options = parser.parse_args()
    end_servers_when_told()
    try:
        asyncio.run(_run(options))
    except (StartFailed, RequestFailed) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
