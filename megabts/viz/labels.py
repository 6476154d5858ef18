"""Labels of figures put where they can be read: near their points, off the marks, off one another.

Text is not measured but taken to be as wide as usual, since the page's font is not matplotlib's.
"""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from megabts.viz.figures import MUTED

POINT_SIZE = 10.0
"""Square kept free around a mark, points."""
LETTER, HEIGHT = 5.4, 9.0
"""Room for a letter, points."""
LEADER = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 4, "shrinkB": 3}
Box = tuple[float, float, float, float]
"""Left, bottom, right, top in pixels."""


def pixels_per_point(axes: Axes) -> float:
    """Pixels in a seventy-second of an inch, the unit of text and offsets."""
    figure = axes.get_figure(root=True)
    assert figure is not None, "axes belong to a figure"
    return figure.dpi / 72


def write_labels(axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str], taken: Sequence[Box]) -> None:
    """Write each text near its point (data), clear of `taken` (pixels), with a line to it where it had to move away.

    The limits of the axes must be final.
    """
    scale = pixels_per_point(axes)
    half = POINT_SIZE * scale / 2
    at = [axes.transData.transform(point) for point in points]
    taken = [*taken, *((x - half, y - half, x + half, y + half) for x, y in at)]
    corners = axes.transAxes.transform([(0, 0), (1, 1)])
    for text, point, (x, y) in zip(texts, points, at, strict=True):
        size = (LETTER * len(text) * scale, HEIGHT * scale)
        dx, dy, moved = _free_place((x, y), size, taken, (*corners[0], *corners[1]), scale)
        taken.append(_box(x + dx, y + dy, size))
        axes.annotate(
            text,
            point,
            (dx / scale, dy / scale),
            textcoords="offset points",
            ha="center",
            va="center_baseline",
            fontsize=8,
            arrowprops=LEADER if moved else None,
        )


def _free_place(
    point: tuple[float, float], size: tuple[float, float], taken: Sequence[Box], inside: Box, scale: float
) -> tuple[float, float, bool]:
    """(dx, dy, is it far), pixels: the nearest place where a box of `size` covers nothing of `taken`, or least."""
    choices = []
    for ring in range(8):
        for turn in range(16):
            angle, reach = 2 * math.pi * turn / 16, (8 + 5 * ring) * scale
            dx = math.cos(angle) * (reach + size[0] / 2 - 2 * scale)
            dy = math.sin(angle) * (reach + 1 * scale)
            box = _box(point[0] + dx, point[1] + dy, size)
            outside = size[0] * size[1] - _overlap(box, inside)
            covered = sum(_overlap(box, other) for other in taken)
            choices.append((round(covered + outside, 3), ring, turn, dx, dy))
    _, ring, _, dx, dy = min(choices)
    return dx, dy, ring > 0


def _box(x: float, y: float, size: tuple[float, float]) -> Box:
    return x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2


def _overlap(one: Box, other: Box) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def name_ends(axes: Axes, x: float, ends: Sequence[tuple[str, float, str]]) -> None:
    """Write (name, height, colour) right of the last point `x`, moved apart where lines end close together."""
    scale = pixels_per_point(axes)
    ends = sorted(ends, key=lambda end: end[1])
    heights = [axes.transData.transform((x, change))[1] for _, change, _ in ends]
    bottom, top = axes.transAxes.transform([(0, 0), (0, 1)])[:, 1]
    for (name, change, colour), y, free in zip(
        ends, heights, spread_out(heights, 10 * scale, bottom, top), strict=True
    ):
        axes.annotate(
            name,
            (x, change),
            (16, (free - y) / scale),
            textcoords="offset points",
            va="center",
            fontsize=8,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3},
        )


def spread_out(heights: Sequence[float], apart: float, bottom: float, top: float) -> list[float]:
    """Ascending heights moved as little as needed to be `apart`, between `bottom` and `top` where they fit."""
    groups: list[list[float]] = []  # [sum of wanted first heights, number of labels]
    for height in heights:
        groups.append([height, 1])
        while len(groups) > 1:
            (low, low_count), (high, high_count) = groups[-2:]
            if high / high_count - low / low_count >= apart * (low_count + high_count) / 2:
                break
            groups[-2:] = [[low + high, low_count + high_count]]
    out: list[float] = []
    for total, count in groups:
        middle = total / count
        out += [middle + apart * (place - (count - 1) / 2) for place in range(int(count))]
    shift = max(bottom - out[0], 0.0) if out else 0.0
    out = [height + shift for height in out]
    return [min(height, top - apart * (len(out) - 1 - place)) for place, height in enumerate(out)]
