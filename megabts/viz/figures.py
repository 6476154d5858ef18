"""Curves and heatmaps as inline SVG that follows the page's light or dark theme.

matplotlib draws with three stand-in colours (ink, muted, line), which become CSS variables afterwards; text stays text,
in the page's font. Colours are Okabe and Ito's, told apart by colour-blind readers too; each member keeps one colour on
the whole page. Limit: beyond eight members colours repeat. The object interface of matplotlib is used, so nothing is
left behind between calls.
"""

import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megabts.viz.records import Curve, GateTable

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#8C8C8C")
INK, MUTED, LINE = "#0a0b01", "#0a0b02", "#0a0b03"
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)"}
MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"))
# The n-th curve of one colour: SVG dashes (empty is solid) and opacity.
STROKES = (("", 1.0), ("5 2", 0.8), ("1 1.5", 0.9), ("5 2 1 2", 0.65))
EXPERT = "expert-"
SHOWN_POINTS = 600
WIDTH = 4.4

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megabts",
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "hatch.color": LINE,
    "hatch.linewidth": 1.0,
}
# matplotlib would name itself, its address and the date; a page made twice from the same data is the same page.
NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


def member_colours(members: Sequence[str], runs: Iterable[str] = ()) -> dict[str, str]:
    """One colour per member, in the members' order, then for the seed and expert runs that are no member."""
    colours = {member: PALETTE[i % len(PALETTE)] for i, member in enumerate(members)}
    for run in runs:
        if (run == "seed" or run.startswith(EXPERT)) and run_colour(run, colours) == INK:
            colours[run] = PALETTE[len(colours) % len(PALETTE)]
    return colours


def run_colour(run: str, colours: dict[str, str]) -> str:
    """The colour of a run: its member's ("expert-code" is the member "code" or "expert-code"), else ink."""
    aliases = [run, run.removeprefix(EXPERT), EXPERT + run, *(["hub"] if run == "seed" else [])]
    return next((colours[alias] for alias in aliases if alias in colours), INK)


def themed(text: str) -> str:
    """`text` with the stand-in colours replaced by the page's CSS variables."""
    for stand_in, variable in THEME.items():
        text = text.replace(stand_in, variable)
    return text


def smooth(losses: Sequence[float]) -> np.ndarray:
    """Exponential moving average over about a fiftieth of the run, bias-corrected; what is not finite is skipped."""
    keep = 1 - 2 / (max(1.0, len(losses) / 50) + 1)
    total = weight = 0.0
    out = []
    for loss in losses:
        if math.isfinite(loss):
            total, weight = keep * total + (1 - keep) * loss, keep * weight + (1 - keep)
        out.append(total / weight if weight else math.nan)
    return np.array(out)


def curve_figure(curves: Sequence[Curve], domains: Sequence[str], colours: dict[str, str]) -> str:
    """SVG of training losses over tokens (average over faint raw) with validation losses as marks, a shape a domain.

    Curves of the same colour differ in their `strokes`.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.75), layout="constrained")
        axes = figure.add_subplot()
        for curve, stroke in zip(curves, strokes(curves, colours), strict=True):
            _draw_curve(axes, curve, domains, run_colour(curve.name, colours), stroke)
        axes.set_ylim(*_loss_range(curves))
        axes.set_xlabel("tokens")
        axes.set_ylabel("loss, nats per token")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: short_count(tokens)))
        axes.tick_params(length=0)
        return to_svg(figure, "Loss over tokens: " + ", ".join(curve.name for curve in curves))


def strokes(curves: Sequence[Curve], colours: dict[str, str]) -> list[tuple[str, float]]:
    """The (dashes, opacity) of each curve: the n-th curve of one colour takes the n-th of `STROKES`."""
    return strokes_of([run_colour(curve.name, colours) for curve in curves])


def strokes_of(colours: Sequence[str]) -> list[tuple[str, float]]:
    """The n-th line of one colour takes the n-th of `STROKES`."""
    return [STROKES[colours[:i].count(colour) % len(STROKES)] for i, colour in enumerate(colours)]


def _draw_curve(axes: Axes, curve: Curve, domains: Sequence[str], colour: str, stroke: tuple[str, float]) -> None:
    last = len(curve.steps) - 1
    shown = np.unique(np.linspace(0, last, min(last + 1, SHOWN_POINTS)).round().astype(int))
    tokens = np.array(curve.tokens, dtype=float)[shown]
    dashes, opacity = stroke
    pattern = (0.0, tuple(float(length) for length in dashes.split()) or None)
    axes.plot(tokens, np.array(curve.losses, dtype=float)[shown], color=colour, alpha=0.2 * opacity, linewidth=0.7)
    axes.plot(tokens, smooth(curve.losses)[shown], color=colour, alpha=opacity, linewidth=1.5, linestyle=pattern)
    for domain, (marker, _) in zip(domains, cycled(MARKERS, len(domains)), strict=True):
        points = curve.valid.get(domain, [])
        at = np.interp([step for step, _ in points], [0, *curve.steps], [0, *curve.tokens])
        losses = [loss for _, loss in points]
        axes.plot(at, losses, marker, color=colour, alpha=opacity, markersize=3.6, markeredgewidth=0)


def _loss_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """Bounds of the loss axis: every validation loss and nearly all of the training losses, but no single spike."""
    raw = np.array([loss for curve in curves for loss in curve.losses if math.isfinite(loss)])
    valid = [loss for c in curves for points in c.valid.values() for _, loss in points if math.isfinite(loss)]
    seen = [*valid, *(np.quantile(raw, [0.002, 0.98]) if len(raw) else [])]
    if not seen:
        return 0.0, 1.0
    margin = max(0.04 * (max(seen) - min(seen)), 0.01)
    return float(min(seen) - margin), float(max(seen) + margin)


def gate_figure(gates: GateTable, layer: int, colours: dict[str, str]) -> str:
    """SVG heatmap of one stitch layer, members x domains, the number in each cell; no gate is a hatched cell.

    A row has its member's colour; its strength is the weight over the largest one among the layers of the same kind.
    """
    values = gates.values[layer]
    rows, columns = len(gates.members), len(gates.domains)
    full = _largest(gates, layer_kind(gates.layers[layer]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.4 + 0.31 * rows), layout="constrained")
        axes = figure.add_subplot()
        for row, member in enumerate(gates.members):
            for column in range(columns):
                _draw_cell(axes, column, row, values[row][column], full, colours[member])
        axes.set(xlim=(0, columns), ylim=(rows, 0))
        axes.set_xticks(np.arange(columns) + 0.5, gates.domains, color=INK, parse_math=False)
        axes.set_yticks(np.arange(rows) + 0.5, gates.members, color=INK, parse_math=False)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        return to_svg(figure, f"Mean gate weights, {gates.layers[layer]}")


def _draw_cell(axes: Axes, x: int, y: int, value: float | None, full: float, colour: str) -> None:
    cell = Rectangle((x + 0.02, y + 0.05), 0.96, 0.9, linewidth=0)
    axes.add_patch(cell)
    if value is None or not math.isfinite(value):
        cell.set(facecolor="none", edgecolor=LINE, hatch="////")
        return
    cell.set(facecolor=colour, alpha=0.05 + 0.6 * value / full)
    axes.text(x + 0.5, y + 0.52, f"{value:.2f}", ha="center", va="center")


def layer_kind(layer: str) -> str:
    """ "Hub-into-Experts" out of "layer 2, Hub-into-Experts"."""
    return layer.rpartition(",")[2].strip()


def _largest(gates: GateTable, kind: str) -> float:
    layers = [rows for name, rows in zip(gates.layers, gates.values, strict=True) if layer_kind(name) == kind]
    values = [value for rows in layers for row in rows for value in row if value is not None and math.isfinite(value)]
    return max(values, default=0.0) or 1.0


def to_svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> element for an HTML page: themed, without fixed size, namespaces or ids of groups."""
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=NO_METADATA)
    svg = buffer.getvalue()
    head, _, body = svg[svg.index("<svg") :].partition(">")
    view = re.search(r'viewBox="[^"]*"', head)
    assert view, "matplotlib writes a viewBox"
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)
    return themed(f'<svg {view[0]} role="img" aria-label="{escape_attribute(label)}">{body}')


def escape_attribute(text: str) -> str:
    """`text` safe between double quotes."""
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def cycled(items: Sequence[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """`count` items, beginning anew when they run out."""
    return [items[i % len(items)] for i in range(count)]


def short_count(count: float) -> str:
    """A count for people: 1536 -> "1.54k", 2_000_000 -> "2M"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"
