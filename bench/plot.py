"""The comparison as a picture: one panel for each question a person would ask."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from bench.load import Summary

_COLOURS = {
    "tightrope": "#c8442d",
    "llama.cpp server": "#33475b",
    "llama-cpp-python server": "#a9b4bf",
    "transformers serve": "#33475b",
    "generate": "#a9b4bf",
}
GREY = "#5b6670"
_LINE, _LEGEND = 0.18, 0.4  # inches that a line of the footer, and the legend, take
STYLE: dict[Any, Any] = {  # Any: matplotlib types its keys as a list of literals
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 22,
    "xtick.bottom": False,
    "ytick.left": False,
}


@dataclass(frozen=True, slots=True)
class Panel:
    """Groups of bars: each group is a scenario and a metric of it, each bar of a group is a server."""

    title: str
    subtitle: str
    groups: tuple[tuple[str, str, str], ...]  # label, scenario, metric
    is_log: bool = False


PANELS = (
    Panel(
        "Throughput",
        "tokens per second over all streams, more is better",
        tuple((f"{n} stream{'s' * (n > 1)}", f"{n} stream{'s' * (n > 1)}", "tokens_per_s") for n in (1, 4, 8)),
    ),
    Panel(
        "Throughput beside a busy neighbour",
        "tokens per second while another process takes a core, more is better",
        tuple(
            (f"{n} stream{'s' * (n > 1)}", f"{n} stream{'s' * (n > 1)}, busy neighbour", "tokens_per_s") for n in (1, 8)
        ),
    ),
    Panel(
        "A growing chat",
        "milliseconds to the first token, logarithmic, less is better",
        (
            ("first turn,\n3,500 tokens", "growing chat", "first_ttft_ms"),
            ("second turn", "growing chat", "second_ttft_ms"),
        ),
        is_log=True,
    ),
    Panel(
        "A long prompt among three streams",
        "longest silence of a running stream in milliseconds, logarithmic, less is better",
        (
            ("usual wait\nfor a token", "long prompt", "usual_gap_ms"),
            ("longest wait while\n3,500 tokens come in", "long prompt", "largest_gap_ms"),
        ),
        is_log=True,
    ),
)


def draw(
    summary: Summary,
    verdicts: Sequence[dict[str, object]],
    caption: str,
    path: Path,
    panels: Sequence[Panel] = PANELS,
) -> Path:
    """Draw the panels that were measured, medians with whiskers from smallest to largest; returns `path`."""
    panels = [panel for panel in panels if any(scenario in summary for _, scenario, _ in panel.groups)]
    servers = [name for name in _COLOURS if any(name in found for found in summary.values())]
    columns = min(2, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    footer = _footer(verdicts, caption)
    below = 0.2 + _LINE * (footer.count("\n") + 1)  # inches, as all that isn't panels
    height = 3.5 * rows + _LEGEND + below
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(6.2 * columns, height), squeeze=False)
        for axis, panel in zip(axes.flat, panels, strict=False):
            _draw_panel(axis, panel, summary)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        figure.legend(
            handles=[Patch(color=_COLOURS[name], label=name) for name in servers],
            loc="upper left",
            bbox_to_anchor=(0.03, 1.0),
            ncols=max(1, len(servers)),
            frameon=False,
            fontsize=10,
            handlelength=1,
            handleheight=1,
        )
        figure.text(0.04, 0.1 / height, footer, fontsize=8, color=GREY, linespacing=1.5)
        figure.tight_layout(rect=(0.02, below / height, 0.99, 1 - _LEGEND / height), h_pad=2.5, w_pad=3)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, facecolor="white")
        plt.close(figure)
    return path


def _draw_panel(axis: Axes, panel: Panel, summary: Summary) -> None:
    measured = [group for group in panel.groups if group[1] in summary]
    servers = [name for name in _COLOURS if any(name in summary[scenario] for _, scenario, _ in measured)]
    width = 0.8 / max(1, len(servers))
    for group, (_, scenario, metric) in enumerate(measured):
        for place, server in enumerate(servers):
            spread = summary[scenario].get(server, {}).get(metric)
            if spread is not None:
                x = group + (place - (len(servers) - 1) / 2) * width
                _draw_value(axis, x, width, spread, _COLOURS[server], is_point=panel.is_log)
    axis.set_title(panel.title)
    axis.text(0, 1.04, panel.subtitle, transform=axis.transAxes, color=GREY, fontsize=8.5)
    axis.set_xticks(range(len(measured)), [label for label, _, _ in measured])
    axis.set_xlim(-0.6, len(measured) - 0.4)
    if panel.is_log:  # points on a grid: a bar would need a zero, which this scale doesn't have
        axis.set_yscale("log")
        axis.grid(axis="y", color="#e3e7ea")
        axis.margins(y=0.18)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.tick_params(axis="y", colors=GREY)
    else:
        axis.set_yticks([], [])
        axis.margins(y=0.12)
    axis.minorticks_off()


def _draw_value(axis: Axes, x: float, width: float, spread: dict[str, float], colour: str, *, is_point: bool) -> None:
    """The median as bar or point, a whisker from smallest to largest, and the median's number."""
    if is_point:
        axis.plot(x, spread["median"], "o", markersize=10, color=colour, zorder=3)
    else:
        axis.bar(x, spread["median"], width * 0.92, color=colour)
    axis.vlines(x, spread["min"], spread["max"], color="#111111", linewidth=0.8, alpha=0.6, zorder=4)
    axis.annotate(
        f"{spread['median']:,.0f}",
        (x, spread["max"]),
        xytext=(0, 8 if is_point else 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
    )


def _footer(verdicts: Sequence[dict[str, object]], caption: str) -> str:
    lines = [
        f"{verdict['name']}: {verdict['value']:.2f}"
        + (f" times {verdict['over']}" if verdict["over"] else "")
        + f" (bar: {verdict['bar']}{'' if verdict['met'] else ', missed'})"
        for verdict in verdicts
    ]
    return "\n".join([*lines, caption])
