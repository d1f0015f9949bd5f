"""How many machines, and who gets which request: python -m bench.fleet [costs | calibrate | simulate]

costs: what prompts and answers take on real replicas of one thread with the bundled model, alone and beside another.
calibrate: the same clients before two real replicas and before two simulated ones; hit rate and time to the first
    token must be within 15 %. With exact digests the real ones are behind `tightrope cluster`, otherwise the router is
    the simulation's. A case takes two and a half minutes; --case names some of them.
simulate (the default): role-play, agents and leaderboards before 2 to 1,000 replicas that take what was measured, with
    requests sent at random, to the least loaded, by session, by what was sent where, and by what is held; with
    replicas that die, digests that are late, and chats on disk; and how many replicas a crowd needs.

Each writes its part of bench/results/fleet.json, and the tables of docs/replicas.md; simulate draws
bench/results/fleet.png, too. --draw does all that with what is there.
All is drawn from a seed: the same command gives the same numbers.
"""

import argparse

from tqdm import tqdm

from bench import report
from bench.fleet import results, table
from bench.fleet.calibrate import CASES, calibrated, measured_costs
from bench.fleet.costs import Costs
from bench.fleet.picture import draw
from bench.fleet.runs import needed, runs
from bench.peers import ROOT, end_servers_when_told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="simulate", choices=("costs", "calibrate", "simulate"))
    parser.add_argument("--case", nargs="+", choices=tuple(CASES), default=tuple(CASES), help="of calibrate")
    parser.add_argument("--seconds", type=float, default=150.0, help="of each case of calibrate (default: 150)")
    parser.add_argument("--jobs", type=int, default=2, help="simulations at the same time (default: 2)")
    parser.add_argument("--most", type=int, default=1000, help="replicas at most (default: 1000)")
    parser.add_argument("--draw", action="store_true", help="draw what is there, and no more")
    options = parser.parse_args()
    end_servers_when_told()
    if options.draw:
        pass
    elif options.part == "costs":
        results.put("costs", measured_costs())
    elif options.part == "calibrate":
        calibrate(options.case, options.seconds)
    else:
        simulate_all(options.most, options.jobs)
    if options.draw or options.part == "simulate":
        print(draw(results.read(), report.RESULTS / "fleet.png"))
    if results.read().keys() >= {"runs", "needed", "calibration"}:
        table.put(ROOT / "docs/replicas.md", results.read())
    print(results.PATH)


def calibrate(names: list[str], seconds: float) -> None:
    found = results.read()["costs"]
    costs, together = Costs.read(found), float(found["together"])
    for row in tqdm(calibrated(costs, together, names, seconds), total=len(names), desc="cases", disable=None):
        rows = {old["case"]: old for old in results.read().get("calibration", [])} | {row["case"]: row}
        results.put("calibration", [rows[name] for name in CASES if name in rows])
        tqdm.write(f"{row['case']}: {row['apart']}")


def simulate_all(most: int, jobs: int) -> None:
    costs = Costs.read(results.read()["costs"])
    results.put("runs", runs(costs, most, jobs))
    results.put("needed", needed(costs, jobs))


if __name__ == "__main__":
    main()
