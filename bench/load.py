"""Load generator for any server with OpenAI's streaming endpoints: python -m bench.load http://127.0.0.1:8080"""

import argparse
import asyncio
import fcntl
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench import report
from bench.meter import measured_cores
from bench.sse import RequestFailed
from bench.stats import Sample, summarise
from bench.workloads import SCENARIOS, Scenario, Target, busy_neighbour

Summary = dict[str, dict[str, dict[str, dict[str, float]]]]


async def measure(target: Target, scenario: Scenario, round_index: int, salt: str) -> Sample:
    """Run one scenario once. Raises RequestFailed when a request does."""
    with ExitStack() as stack:
        if scenario.beside_neighbour:
            stack.enter_context(busy_neighbour())
        cores = stack.enter_context(measured_cores(target.pid))
        try:
            metrics = await scenario.run(target, f"{salt} {scenario.name} {round_index}")
        except RequestFailed as error:
            raise RequestFailed(f"{target.name}, {scenario.name}: {error}") from error
    return Sample(target.name, scenario.name, round_index, {**metrics, **cores})


@contextmanager
def exclusive(lock: Path | None) -> Iterator[None]:
    """Hold the lock file for the block, so that measurements of one machine wait for each other."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scenario", action="append", choices=sorted(SCENARIOS), help="may be repeated; default: all")
    parser.add_argument("--rounds", type=int, help="how often each scenario runs; default: its own number")
    parser.add_argument("--lock", type=Path, help="lock file to hold while measuring")


def chosen(names: list[str] | None) -> list[Scenario]:
    """The scenarios of these names, or all, in the order of the table."""
    return [scenario for name, scenario in SCENARIOS.items() if not names or name in names]


def table(summary: Summary) -> str:
    """The medians, a line for each scenario and server."""
    lines = []
    for scenario, servers in summary.items():
        lines.append(scenario)
        for server, metrics in servers.items():
            values = "  ".join(f"{name} {_short(spread['median'])}" for name, spread in metrics.items())
            lines.append(f"  {server:<24}{values}")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


async def _run(options: argparse.Namespace) -> list[Sample]:
    target = Target(options.url, options.url, options.pid, {})
    salt = str(time.time_ns())  # a server that has seen an earlier run must not know the prompts
    samples = []
    for scenario in chosen(options.scenario):
        for index in range(options.rounds or scenario.rounds):
            with exclusive(options.lock):
                samples.append(await measure(target, scenario, index, salt))
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="address of the server, such as http://127.0.0.1:8080")
    parser.add_argument("--pid", type=int, help="the server's process, to measure its use of the processors too")
    parser.add_argument("--write", metavar="NAME", help="keep the results as bench/results/NAME.json")
    add_common_options(parser)
    options = parser.parse_args()
    try:
        samples = asyncio.run(_run(options))
    except RequestFailed as error:
        raise SystemExit(str(error)) from None
    summary = summarise(samples)
    print(table(summary))
    if options.write:
        rounds = [{"scenario": s.scenario, "round": s.round, **s.metrics} for s in samples]
        print(report.write(options.write, {"summary": summary, "rounds": rounds}))


if __name__ == "__main__":
    main()
