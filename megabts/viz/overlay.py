"""Loss curves of runs that should be the same, on one another, and how far each is from the first."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megabts.errors import UserError
from megabts.runtime.metrics import read_metrics
from megabts.viz.figures import PALETTE

DASHES = ("-", "--", "-.", ":", (0, (6, 2, 1, 2)), (0, (1, 3)))


def read_losses(runs: Mapping[str, Path]) -> dict[str, dict[int, float]]:
    """Training loss, nats per token, by run and step. Raises UserError for a run without steps or without a match."""
    losses = {name: {row["step"]: row["loss"] for row in read_metrics(folder)[0]} for name, folder in runs.items()}
    first = next(iter(losses))
    for name, found in losses.items():
        if not found.keys() & losses[first].keys():
            raise UserError(f"{runs[name]} has no step that {runs[first]} has; compare runs of the same steps")
    return losses


def largest_difference(losses: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Of every run but the first: the largest |loss / the first's - 1| over their common steps."""
    (_, first), *others = losses.items()
    return {name: max(abs(found[s] / first[s] - 1) for s in found.keys() & first.keys()) for name, found in others}


def draw_overlay(losses: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Write a picture (type by the name's ending): losses above, relative distance to the first run below."""
    (_, first), *others = losses.items()
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(7.5, 5.5), layout="constrained", dpi=80)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for number, (name, found) in enumerate(losses.items()):
            style = {"color": PALETTE[number % len(PALETTE)], "linestyle": DASHES[number % len(DASHES)]}
            # Wide below, narrow above: a curve that is covered still shows at its edges.
            width = 1.2 + 1.4 * (len(losses) - 1 - number)
            above.plot(list(found), list(found.values()), label=name, linewidth=width, **style)
            if number:
                steps = sorted(found.keys() & first.keys())
                _draw_distance(below, steps, [abs(found[s] / first[s] - 1) for s in steps], style)
        above.set_ylabel("training loss, nats per token")
        above.legend(frameon=False)
        below.set_ylabel("relative difference\nto the first")
        below.set_yscale("log")
        below.set_xlabel("step")
        figure.savefig(path)
    assert others, "nothing to compare"


def _draw_distance(axes: Axes, steps: Sequence[int], distances: Sequence[float], style: Mapping[str, object]) -> None:
    floor = 1e-17  # equal losses have no place on a logarithmic axis
    axes.plot(steps, [max(distance, floor) for distance in distances], linewidth=1.2, **style)  # type: ignore[arg-type]
