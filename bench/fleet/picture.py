"""The simulated fleets as a picture: hits and first tokens over the number of replicas, for each kind of clients."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from bench.fleet.routing import ROUTERS
from bench.fleet.traces import CROWDS
from bench.plot import GREY, STYLE

_COLOURS = dict(zip(ROUTERS, ("#a9b4bf", "#8fa5bd", "#33475b", "#e0a08f", "#c8442d"), strict=True))
_ROWS = (
    ("hit_rate", "Prompt tokens found", "share, more is better", False),
    ("ttft_p50_s", "First token, median", "seconds, logarithmic, less is better", True),
    ("ttft_p99_s", "First token, 99 of 100", "seconds, logarithmic, less is better", True),
)


def draw(results: Mapping[str, Any], path: Path) -> Path:
    """Draw the runs of all sizes; returns `path`."""
    rows = [row for row in results["runs"] if row["table"] == "sizes"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(_ROWS), len(CROWDS), figsize=(12.4, 9.2), layout="constrained", squeeze=False)
        for column, crowd in enumerate(CROWDS):
            for line, (metric, title, unit, is_log) in enumerate(_ROWS):
                mine = [row for row in rows if row["crowd"] == crowd]
                _panel(axes[line][column], mine, metric, is_log=is_log)
                axes[line][column].set_title(f"{crowd}: {title[0].lower()}{title[1:]}")
                axes[line][column].text(0, 1.04, unit, transform=axes[line][column].transAxes, color=GREY, fontsize=8.5)
        axes[0][-1].legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.62))
        figure.supxlabel("replicas", color=GREY, fontsize=9)
        figure.savefig(path, dpi=150, facecolor="white")
        plt.close(figure)
    return path


def _panel(axis: Axes, rows: list[dict[str, Any]], metric: str, *, is_log: bool) -> None:
    for router, colour in _COLOURS.items():
        points = sorted((row["replicas"], row[metric]) for row in rows if row["router"] == router)
        axis.plot([x for x, _ in points], [y for _, y in points], "o-", color=colour, label=router, markersize=4)
    axis.set_xscale("log")
    sizes = sorted({row["replicas"] for row in rows})
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.grid(axis="y", color="#e3e7ea")
    axis.tick_params(axis="y", colors=GREY)
    if is_log:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axis.set_ylim(0, 1.02)
    axis.minorticks_off()
