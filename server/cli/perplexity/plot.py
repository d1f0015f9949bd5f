"""Perplexity over context length as a picture. Needs matplotlib, which a plain install doesn't bring."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # It needs no display.

import matplotlib.pyplot as plt

COLOURS = ("#c8442d", "#33475b", "#4d9078", "#d99a2b", "#7d5ba6", "#6b7f8e", "#111111", "#b56576")
GREY = "#5b6670"
NOTE_WIDTH = 112  # So many characters fit into a line below the picture.


def draw(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    title: str,
    notes: Sequence[str],
    path: Path,
    *,
    trained_len: int | None = None,
    most: float | None = None,
) -> Path:
    """Draw one line for each curve's (context, perplexity) points, contexts logarithmic to base 2; returns `path`.

    notes: told below the picture, each on lines of its own. trained_len: a mark at this context. most: perplexities
    above leave the picture.
    """
    lines = [line for note in notes for line in textwrap.wrap(note, NOTE_WIDTH)]
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axis = plt.subplots(figsize=(7.2, 4.4 + 0.16 * len(lines)))
        for index, (name, points) in enumerate(curves.items()):
            axis.plot(*zip(*points, strict=True), "o-", markersize=4, color=COLOURS[index % len(COLOURS)], label=name)
        axis.set_xscale("log", base=2)
        contexts = sorted({context for points in curves.values() for context, _ in points})
        axis.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axis.minorticks_off()
        axis.set_xlabel("context length in tokens")
        axis.set_ylabel("perplexity, less is better")
        axis.grid(axis="y", color="#e3e7ea")
        if most is not None:
            axis.set_ylim(0, most)
        if trained_len is not None:
            axis.axvline(trained_len, color=GREY, linewidth=0.8, linestyle=":")
            axis.annotate(
                " trained window",
                (trained_len, 1),
                xycoords=("data", "axes fraction"),
                va="top",
                color=GREY,
                fontsize=8,
            )
        axis.legend(frameon=False)
        axis.set_title(title, loc="left", fontweight="bold")
        figure.tight_layout(rect=(0, 0.03 * len(lines), 1, 1))
        figure.text(0.02, 0.01, "\n".join(lines), fontsize=7, color=GREY, family="monospace", linespacing=1.4)
        figure.savefig(path, dpi=150, facecolor="white")
        plt.close(figure)
    return path
