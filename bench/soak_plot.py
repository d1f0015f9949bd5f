"""Memory, descriptors and threads of a server over time, as a picture."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from bench.plot import GREY, STYLE
from bench.watch import Reading, line, lives

_SIZE, _SPACING = 8, 1.5  # of the lines below the panels: points, and how far apart they are
_FRONT, _ENGINE, _OTHERS = "#33475b", "#c8442d", "#a9b4bf"


def draw(
    readings: Sequence[Reading],
    marks_s: Sequence[float],
    marks_name: str,
    verdicts: Sequence[dict[str, object]],
    caption: str,
    path: Path,
) -> Path:
    """Three panels over the minutes of a run, thin lines at the marks; an engine's line breaks where it ended."""
    footer = "\n".join([*map(line, verdicts), caption])
    below = 0.2 + _SIZE * _SPACING / 72 * (footer.count("\n") + 1)  # inches
    height = 7.5 + below
    with plt.rc_context(STYLE):
        figure, (front, engine, counts) = plt.subplots(3, 1, figsize=(10, height), sharex=True)
        minutes = [reading.at_s / 60 for reading in readings]
        front.plot(minutes, [reading.front.mib for reading in readings], color=_FRONT, label="front")
        front.plot(minutes, [reading.others_mib for reading in readings], color=_OTHERS, label="its templates' process")
        front.plot([], [], color="#e0b4ac", linewidth=0.6, label=marks_name)
        counts.plot(minutes, [r.front.descriptors for r in readings], color=_FRONT, label="front's descriptors")
        counts.plot(minutes, [r.front.threads for r in readings], "--", color=_FRONT, label="front's threads")
        for number, life in enumerate(lives(readings)):
            at = [reading.at_s / 60 for reading in life]
            held = [reading.engine for reading in life if reading.engine is not None]
            name = "_" if number else "engine"  # matplotlib leaves out of the legend what begins so
            engine.plot(at, [h.mib for h in held], color=_ENGINE, label=name)
            counts.plot(at, [h.descriptors for h in held], color=_ENGINE, label=name + "'s descriptors")
            counts.plot(at, [h.threads for h in held], "--", color=_ENGINE, label=name + "'s threads")
        for axis, title in ((front, "Memory of the front"), (engine, "Memory of the engine"), (counts, "Held")):
            for mark_s in marks_s:
                axis.axvline(mark_s / 60, color="#e0b4ac", linewidth=0.6, zorder=0)
            axis.set_title(title, pad=8)
            axis.set_ylim(0, 1.3 * axis.get_ylim()[1])  # room for the legend
            axis.grid(axis="y", color="#e3e7ea")
            axis.tick_params(colors=GREY)
            axis.legend(loc="upper right", frameon=False, fontsize=8, ncols=3)
            axis.set_ylabel("number" if axis is counts else "MiB, anonymous", color=GREY)
        counts.set_xlabel("minutes", color=GREY)
        figure.text(0.04, 0.1 / height, footer, fontsize=_SIZE, color=GREY, linespacing=_SPACING)
        figure.tight_layout(rect=(0.02, below / height, 0.99, 1), h_pad=1.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, facecolor="white")
        plt.close(figure)
    return path
