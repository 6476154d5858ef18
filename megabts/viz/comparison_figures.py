"""Figures of a comparison of methods: average loss against cost, bars per domain, losses by position.

A method has its family's colour (Okabe and Ito's) and mark everywhere and, where names would not fit, the number of its
row in the loss table. Labels are placed where they cover neither a mark nor one another. Losses are nats per token;
error bars are one standard deviation over seeds. Limit: what is much worse than the seed stands at the figure's edge,
its value in words.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megabts.viz.figures import INK, LINE, MUTED, STYLE, WIDTH, short_count, strokes_of, to_svg
from megabts.viz.labels import Box, name_ends, pixels_per_point, write_labels
from megabts.viz.page import format_loss

FAMILIES = {
    "dense": ("#E69F00", "s", "■"),
    "put together without training": ("#56B4E9", "^", "▲"),
    "expert routing": ("#CC79A7", "D", "◆"),
    "upcycled mixtures": ("#009E73", "v", "▼"),
    "stitched": ("#0072B2", "o", "●"),
    "members": ("#8C8C8C", "X", "✖"),
    "other": ("#D55E00", "P", "✚"),
}
"""Family of methods -> colour, matplotlib's mark, the same mark as a character."""
PREFIXES = {"dense-": "dense", "btx": "upcycled mixtures", "sparse-": "upcycled mixtures", "bam": "upcycled mixtures"}
NAMES = {
    "seed": "members",
    "soup": "put together without training",
    "btm": "put together without training",
    "expert-routing": "expert routing",
}
HEADROOM = 0.5
"""How far above the seed losses are drawn to scale, over the best method's distance to the seed."""


def family(name: str, domains: Sequence[str] = ()) -> str:
    """The family of a method; "expert-D" of a domain D is a member, as the seed is."""
    if name in NAMES or name.removeprefix("expert-") in domains:
        return NAMES.get(name, "members")
    if name.startswith("bts"):
        return "stitched"
    return next((kind for prefix, kind in PREFIXES.items() if name.startswith(prefix)), "other")


@dataclass
class Point:
    """A method: number of its row, name, family, cost (0: not trained), loss and its spread (None: one seed)."""

    number: int
    name: str
    family: str
    cost: float
    loss: float
    spread: float | None = None


@dataclass
class Levels:
    """Losses that every figure refers to: the seed's, and the oracle's where there is one."""

    seed: float
    oracle: float = math.nan


def cost_figure(points: Sequence[Point], levels: Levels, label: str) -> str:
    """SVG of losses over costs (log); what was not trained stands left of a line. Lines: the seed and the oracle."""
    points = [point for point in points if math.isfinite(point.loss)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.3))
        figure.subplots_adjust(left=0.115, right=0.985, top=0.98, bottom=0.13)
        axes = figure.add_subplot()
        low, top = _loss_limits([point.loss for point in points], levels)
        places = _cost_places(axes, [point.cost for point in points])
        axes.set_ylim(low, top)
        axes.set_xlabel(label)
        axes.set_ylabel("average loss, nats per token")
        axes.tick_params(length=0)
        taken = [*_level(axes, levels.seed, "seed"), *_level(axes, levels.oracle, "oracle")]
        limit = top - 0.03 * (top - low)
        for point, x in zip(points, places, strict=True):
            y = min(point.loss, limit)
            colour, mark, _ = FAMILIES[point.family]
            if point.spread and y == point.loss:
                axes.errorbar(x, y, point.spread, ecolor=colour, elinewidth=1.2, capsize=2, alpha=0.75, fmt="none")
            axes.plot([x], [y], mark, color=colour, markersize=5.5, markeredgewidth=0, clip_on=False)
        texts = [f"{point.number}" + (f" (at {point.loss:.2f})" if point.loss > limit else "") for point in points]
        heights = [min(point.loss, limit) for point in points]
        write_labels(axes, list(zip(places, heights, strict=True)), texts, taken)
        return to_svg(figure, f"Average loss over {label}: " + ", ".join(point.name for point in points))


def _loss_limits(losses: Sequence[float], levels: Levels) -> tuple[float, float]:
    """Bounds that hold seed, oracle and every loss but those much worse than the seed."""
    known = [loss for loss in (*losses, levels.seed, levels.oracle) if math.isfinite(loss)] or [0.0, 1.0]
    low = min(known)
    ceiling = levels.seed + HEADROOM * (levels.seed - low) if levels.seed > low else max(known)
    high = max([loss for loss in known if loss <= ceiling] or [low])
    margin = 0.08 * (high - low) or 0.05
    return low - margin, high + margin


def _cost_places(axes: Axes, costs: Sequence[float]) -> list[float]:
    """Where costs stand on the x axis: log10, and a place of its own on the left for those that are 0."""
    paid = [math.log10(cost) for cost in costs if cost > 0] or [0.0]
    first, last = min(paid), max(paid)
    room = max(last - first, 0.3)
    left, right = first - 0.08 * room, last + 0.08 * room
    marks = [(math.log10(m) + e, m * 10.0**e) for e in range(math.floor(left), math.ceil(right) + 1) for m in (1, 2, 5)]
    marks = [mark for mark in marks if left <= mark[0] <= right]
    whole = [mark for mark in marks if mark[0] == round(mark[0])]
    ticks = whole if len(whole) > 1 else marks
    names = [_power(cost) if cost >= 1e12 else short_count(cost) for _, cost in ticks]
    free = left - 0.1 * room
    if len(paid) < len(costs):
        axes.axvline(left - 0.02 * room, color=LINE, linewidth=1, linestyle=(0, (2, 2)))
        left = free - 0.08 * room
        ticks, names = [(free, 0.0), *ticks], ["none", *names]
    axes.set_xlim(left, right)
    axes.set_xticks([place for place, _ in ticks], names, parse_math=False)
    return [math.log10(cost) if cost > 0 else free for cost in costs]


def _power(cost: float) -> str:
    mantissa, _, exponent = f"{cost:.0e}".partition("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == "1" else f"{mantissa}·{power}"


def _level(axes: Axes, loss: float, name: str) -> list[Box]:
    """A dashed line over the whole width, its name above it at the right; returns what both cover, in pixels."""
    if not math.isfinite(loss):
        return []
    axes.axhline(loss, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(name, (1, loss), (-1, 3), axes.get_yaxis_transform(), "offset points", ha="right", color=MUTED)
    scale = pixels_per_point(axes)
    (left, y), (right, _) = axes.get_yaxis_transform().transform([(0, loss), (1, loss)])
    return [(left, y - scale, right, y + scale), (right - 5 * len(name) * scale, y, right, y + 12 * scale)]


def bar_figure(points: Sequence[Point], levels: Levels, title: str) -> str:
    """SVG of a bar per method, its loss minus the seed's; the loss itself stands left of it, the oracle is a line.

    Bars begin at the seed, so their lengths may be compared. One much longer to the right is cut and pale.
    """
    changes = [point.loss - levels.seed for point in points]
    finite = [change for change in (*changes, levels.oracle - levels.seed) if math.isfinite(change)]
    low = min([0.0, *finite])
    high = min(max([0.0, *finite]), max(-low * HEADROOM, 0.0) or math.inf)
    room = high - low or 0.1
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.25 + 0.205 * len(points)))
        height = figure.get_figheight()
        figure.subplots_adjust(left=0.43, right=0.985, top=1 - 0.02 / height, bottom=0.23 / height)
        axes = figure.add_subplot()
        for row, (point, change) in enumerate(zip(points, changes, strict=True)):
            _draw_bar(axes, row, point, change, high)
        for x, colour in ((0.0, INK), (levels.oracle - levels.seed, MUTED)):
            if math.isfinite(x):
                axes.axvline(x, color=colour, linewidth=0.8, linestyle="-" if colour == INK else (0, (4, 3)))
        axes.set(xlim=(low - 0.06 * room, high + 0.06 * room), ylim=(len(points) - 0.4, -0.6))
        axes.set_yticks(range(len(points)), [])
        axes.grid(False, axis="y")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.2g}".replace("-", "−") if value else "seed")
        return to_svg(figure, f"{title}, loss minus the seed's: " + ", ".join(point.name for point in points))


def _draw_bar(axes: Axes, row: int, point: Point, change: float, high: float) -> None:
    for text, left in ((format_loss(point.loss), -4), (point.name, -33 if math.isfinite(change) else -44)):
        place: dict[str, Any] = {
            "xycoords": axes.get_yaxis_transform(),
            "textcoords": "offset points",
            "annotation_clip": False,
        }
        axes.annotate(text, (0, row), (left, 0), ha="right", va="center_baseline", fontsize=7.5, **place)
    if not math.isfinite(change):
        return
    colour, end, cut = FAMILIES[point.family][0], min(change, high), change > high
    axes.barh(row, end, 0.72, color=colour, linewidth=0, alpha=0.4 if cut else 1.0)
    if point.spread and not cut:
        axes.errorbar(end, row, xerr=point.spread, ecolor=INK, elinewidth=0.9, capsize=1.8, fmt="none")


@dataclass
class Line:
    """The losses of one method by position: (last position of the stretch, mean loss in nats per token)."""

    name: str
    family: str
    losses: Sequence[tuple[int, float]]


def position_figure(lines: Sequence[Line], seed: Sequence[tuple[int, float]], title: str) -> str:
    """SVG of losses by position (log2), minus the seed's at that position, each line named at its right end."""
    start = dict(seed)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.0))
        figure.subplots_adjust(left=0.13, right=0.655, top=0.97, bottom=0.145)
        axes = figure.add_subplot()
        axes.axhline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xscale("log", base=2)
        ends = [("seed", 0.0, MUTED)]
        for line, (dashes, opacity) in zip(lines, strokes_of([line.family for line in lines]), strict=True):
            kept = [(place, loss - start[place]) for place, loss in line.losses if place in start]
            kept = [(place, change) for place, change in kept if math.isfinite(change)]
            if not kept:
                continue
            colour, mark, _ = FAMILIES[line.family]
            pattern = (0.0, tuple(float(length) for length in dashes.split()) or None)
            places, changes = zip(*kept, strict=True)
            axes.plot(places, changes, color=colour, alpha=opacity, linewidth=1.5, linestyle=pattern)
            axes.plot(places, changes, mark, color=colour, alpha=opacity, markersize=3.6, markeredgewidth=0)
            ends.append((line.name, changes[-1], colour))
        stretches = [place for place, _ in seed]
        axes.set_xticks(stretches, [str(place) for place in stretches])
        axes.minorticks_off()
        axes.set_xlabel("position in the window, tokens")
        axes.set_ylabel("loss minus the seed's")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.3g}".replace("-", "−") if value else "0")
        axes.tick_params(length=0)
        name_ends(axes, stretches[-1], ends)
        return to_svg(figure, f"{title}: " + ", ".join(line.name for line in lines))


def added_figure(losses: Sequence[tuple[float, float]], title: str) -> str:
    """SVG of (tokens, loss) while an added expert's slices train."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.5), layout="constrained")
        axes = figure.add_subplot()
        colour, mark, _ = FAMILIES["stitched"]
        tokens, heights = [count for count, _ in losses], [loss for _, loss in losses]
        axes.plot(tokens, heights, f"{mark}-", color=colour, markersize=3.6, markeredgewidth=0, linewidth=1.5)
        axes.set_xlabel("tokens")
        axes.set_ylabel("loss, nats per token")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: short_count(count)))
        axes.tick_params(length=0)
        return to_svg(figure, title)
