"""Seconds of a stitched step as experts and stitch layers grow, beside what the count of operations predicts."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from megabts.viz.figures import PALETTE

Step = tuple[float, float]
"""(measured, predicted), seconds."""


def draw_scaling(panels: Mapping[str, Mapping[int, Step]], path: Path) -> None:
    """Write a picture (type by the name's ending), one panel for each `panels`: its title, and steps by a number."""
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(7.5, 3.2), layout="constrained", dpi=110)
        for axes, (title, steps) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
            numbers = sorted(steps)
            for index, (label, style) in enumerate((("measured", "o-"), ("predicted by operations", "s--"))):
                values = [steps[number][index] for number in numbers]
                axes.plot(numbers, values, style, label=label, color=PALETTE[index])
            axes.set_xlabel(title)
            axes.set_xticks(numbers)
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", alpha=0.3)
        figure.axes[0].set_ylabel("seconds a step")
        figure.axes[0].legend(frameon=False)
        figure.savefig(path)
