"""What the pages share: templates to one offline HTML file, losses against the seed's, numbers for people."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from megabts.viz.figures import short_count

BETTER, WORSE = "0 114 178", "230 159 0"


def render(template: str, **values: Any) -> str:
    """A page from a template of `templates/`; every value is escaped, a missing one is an error."""
    environment = Environment(
        loader=PackageLoader("megabts.viz"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        loss=format_loss, percent=format_percent, duration=format_duration, count=short_count, power=format_power
    )
    return environment.get_template(template).render(**values)


def write_whole(page: str, path: Path) -> None:
    """Write the page to `path`, whose folders are made. It is written aside and renamed: never half a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(page, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@dataclass
class Cell:
    """One loss of a table; `change` is relative to the seed (None without one), `shade` a CSS background."""

    loss: float
    change: float | None
    best: bool
    shade: str


@dataclass
class Row:
    """One model of a loss table: a cell per column."""

    name: str
    cells: list[Cell]


def compare_losses(losses: dict[str, list[float]], seed: str, outside: Sequence[str]) -> list[Row]:
    """Rows of losses against those of the model `seed`; the models of `outside` are never the best of a column.

    A loss that is not finite (diverged, or not measured) has no change and no shade.
    """
    columns = max((len(row) for row in losses.values()), default=0)
    inside = [row for name, row in losses.items() if name not in outside]
    best = [min((row[i] for row in inside if math.isfinite(row[i])), default=0) for i in range(columns)]
    start = losses.get(seed, [math.nan] * columns)
    changes = {
        name: [_change(loss, first) for loss, first in zip(row, start, strict=True)] for name, row in losses.items()
    }
    widest = max((abs(c) for row in changes.values() for c in row if c is not None), default=0.0)
    return [
        Row(
            name,
            [
                Cell(loss, change, name not in outside and loss == lowest, _shade(change, widest))
                for loss, change, lowest in zip(row, changes[name], best, strict=True)
            ],
        )
        for name, row in losses.items()
    ]


def _change(loss: float, start: float) -> float | None:
    return loss / start - 1 if math.isfinite(loss) and math.isfinite(start) and start > 0 else None


def _shade(change: float | None, widest: float) -> str:
    if not change or not widest:
        return "transparent"
    return f"rgb({BETTER if change < 0 else WORSE}/{0.32 * abs(change) / widest:.2f})"


def format_loss(loss: float) -> str:
    """Three decimals; a loss that is not finite says so."""
    return f"{loss:.3f}" if math.isfinite(loss) else "diverged"


def format_percent(change: float, digits: int = 1) -> str:
    """A relative change with its sign: -0.034 -> "−3.4%" (with the true minus sign)."""
    text = f"{100 * change:+.{digits}f}%"
    return text.replace("-", "−") if float(text[:-1]) else text[1:]


def format_duration(seconds: float) -> str:
    """42.3 -> "42.3 s", 725 -> "12 min 05 s", 11520 -> "3 h 12 min"."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_power(count: float) -> str:
    """1.234e15 -> "1.23 × 10¹⁵", 0 -> "0"."""
    if not count:
        return "0"
    mantissa, _, exponent = f"{count:.2e}".partition("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
