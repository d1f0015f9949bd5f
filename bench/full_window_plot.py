"""The full window as a picture: the time to the first token of each turn, and what moving tokens changes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt

from bench.plot import GREY, STYLE

_COLOURS = {
    "torch engine": "#c8442d",
    "torch engine, GGUF": "#e0a08f",
    "llama.cpp, driven by tightrope": "#8fa5bd",
    "llama.cpp server": "#33475b",
}


def draw(rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any], path: Path) -> None:
    """Two panels; what was not measured is left out."""
    with plt.rc_context(STYLE):
        figure, (speed, quality) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        for name, colour in _COLOURS.items():
            mine = [row for row in rows if row["part"] == "speed" and row["server"] == name]
            mine = [row for row in mine if row["what"] != "cold" or not row["turn"]]
            if mine:
                turns = [row["turn"] for row in mine]
                speed.plot(turns, [row["ttft_s"] for row in mine], color=colour, marker="o", markersize=3, label=name)
        speed.set_title("A full window costs one message")
        speed.set_xlabel("turn; the first reads the whole window", color=GREY)
        speed.set_ylabel("seconds to the first token", color=GREY)
        speed.set_yscale("log")
        speed.legend(frameon=False)
        mine = [row for row in rows if row["part"] == "quality" and row["cache"] == "q8"]
        dropped = [row for row in mine if row["what"] == "the oldest go"]
        places = range(1, len(dropped) + 1)
        quality.plot(places, [row["kld"] for row in dropped], color="#c8442d", marker="o", markersize=3,
                     label="moved upon moved, never healed")  # fmt: skip
        quality.plot(places, [row["first_kld"] for row in dropped], color="#33475b", marker="o", markersize=3,
                     label="healed between turns")  # fmt: skip
        quality.axhline(0.053, color=GREY, linestyle=":", label="a cache in 4 bits")
        quality.set_title("and changes next to nothing")
        quality.set_xlabel("turns that lose their oldest messages", color=GREY)
        quality.set_ylabel("KL divergence from a cold prefill, nats", color=GREY)
        quality.set_yscale("log")
        quality.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.92))
        figure.savefig(path, dpi=150)
        plt.close(figure)
