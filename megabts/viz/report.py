"""The report of a Branch-Train-Stitch run: one HTML page that needs nothing else, a results file, a table to print.

The page holds its figures as SVG and its style inline: no script, no address, readable offline, in light and in dark.
`Report` is the data; the page can be drawn again from its JSON. Limit: a page is drawn in memory, so coloured texts of
some hundred tokens, not of millions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from megabts.viz import figures, texts
from megabts.viz.page import Row, compare_losses, format_loss, render, write_whole
from megabts.viz.records import AVERAGE, Curve, GateTable, Report, SweepPoint, TokenText

__all__ = [
    "Curve",
    "GateTable",
    "Report",
    "SweepPoint",
    "TokenText",
    "results_json",
    "results_table",
    "write_report",
]

SEED, SOUP, DENSE, BTS = "seed", "soup", "dense-data-matched", "bts"
ORACLE = "oracle (best member per domain)"


def write_report(report: Report, path: Path) -> None:
    """Write the page to `path`, whose folders are made. It is written aside and renamed: never half a page."""
    write_whole(_page(report), path)


def results_json(report: Report) -> dict[str, Any]:
    """The numbers for other programs: domains, losses per model, seconds and tokens per stage."""
    columns = [*report.domains, AVERAGE]
    return {
        "domains": list(report.domains),
        "models": {name: {column: report.models[name][column] for column in columns} for name in _ordered(report)},
        "seconds": dict(report.seconds),
        "tokens": dict(report.tokens),
    }


def results_table(report: Report) -> Table:
    """The losses as a table for the terminal, nats per token; the best trained value of each column is bold."""
    table = Table(title=Text(report.title), caption="validation loss, nats per token")
    table.add_column("model", no_wrap=True)
    for column in (*report.domains, AVERAGE):
        table.add_column(Text(column), justify="right")
    for row in loss_rows(report):
        cells = [Text(format_loss(cell.loss), style="bold" if cell.best else "") for cell in row.cells]
        table.add_row(Text(row.name), *cells, style="dim" if row.name == ORACLE else "")
    return table


def loss_rows(report: Report) -> list[Row]:
    """The rows in reading order: seed, experts, soup, others, dense, bts, then the oracle, which nobody trained."""
    columns = [*report.domains, AVERAGE]
    losses = {name: [report.models[name][column] for column in columns] for name in _ordered(report)}
    oracle = _oracle(report)
    return compare_losses({**losses, ORACLE: oracle} if oracle else losses, SEED, [ORACLE])


def _ordered(report: Report) -> list[str]:
    def rank(name: str) -> int:
        known = {SEED: 0, SOUP: 2, DENSE: 4, BTS: 5}
        return known.get(name, 1 if name.startswith(figures.EXPERT) else 3)

    return sorted(report.models, key=rank)


def _oracle(report: Report) -> list[float]:
    """Per domain the loss of the best of seed and experts, then their mean; empty where there is no member."""
    members = [row for name, row in report.models.items() if name == SEED or name.startswith(figures.EXPERT)]
    if not members or not report.domains:
        return []
    best = [min(row[domain] for row in members) for domain in report.domains]
    return [*best, sum(best) / len(best)]


@dataclass
class Panel:
    """A figure of the page: heading, SVG, a line under it, and the legend as (name, colour, SVG dashes, opacity)."""

    title: str
    svg: Markup
    caption: str
    legend: list[tuple[str, str, str, float]]


def curve_panels(report: Report, colours: dict[str, str]) -> list[Panel]:
    """A panel each for the seed, the experts, the dense sweep, and the rest (the stitch)."""
    groups: dict[str, list[Curve]] = {"Seed": [], "Experts": [], "Dense, same data": [], "Stitch": []}
    for curve in report.curves:
        is_expert, is_dense = curve.name.startswith(figures.EXPERT), curve.name.startswith("dense")
        name = (
            "Seed" if curve.name == SEED else "Experts" if is_expert else "Dense, same data" if is_dense else "Stitch"
        )
        groups[name].append(curve)
    panels = []
    for title, curves in groups.items():
        if curves:
            svg = Markup(figures.curve_figure(curves, report.domains, colours))
            names = [(curve.name, figures.themed(figures.run_colour(curve.name, colours))) for curve in curves]
            legend = [(*name, *stroke) for name, stroke in zip(names, figures.strokes(curves, colours), strict=True)]
            panels.append(Panel(title, svg, "", legend))
    return panels


def gate_panels(gates: GateTable, colours: dict[str, str]) -> list[Panel]:
    """A heatmap per stitch layer, with what its numbers mean."""
    captions = {
        "Experts-into-Hub": "Softmax over the members: a column sums to one.",
        "Hub-into-Experts": "Sigmoid per expert: the share of the hub's state it takes in. The hub has no gate here.",
    }
    return [
        Panel(
            layer[:1].upper() + layer[1:],
            Markup(figures.gate_figure(gates, i, colours)),
            captions.get(figures.layer_kind(layer), ""),
            [],
        )
        for i, layer in enumerate(gates.layers)
    ]


def _page(report: Report) -> str:
    members = report.gates.members
    colours = figures.member_colours(members, [*report.models, *(curve.name for curve in report.curves)])
    full = texts.full_excess(report.texts, max(len(members), 1))
    rows = loss_rows(report)
    return render(
        "report.html",
        report=report,
        columns=[*report.domains, AVERAGE],
        rows=rows,
        averages={row.name: row.cells[-1] for row in rows},
        oracle=ORACLE,
        colours=_named_colours(colours, [*members, *report.models, *report.seconds]),
        markers=[mark for _, mark in figures.cycled(figures.MARKERS, len(report.domains))],
        curve_panels=curve_panels(report, colours),
        gate_panels=gate_panels(report.gates, colours),
        texts=[texts.colour_text(text, colours, members, full) for text in report.texts],
        full_weight=full + 1 / max(len(members), 1),
        stages=time_rows(report),
    )


def _named_colours(colours: dict[str, str], names: list[str]) -> dict[str, str]:
    """The colours of the names that are a member's; soup, dense and stitched models have none."""
    found = {name: figures.run_colour(name, colours) for name in names}
    return {name: colour for name, colour in found.items() if colour != figures.INK}


@dataclass
class Stage:
    """Where time went: seconds, their share of the longest stage (the bar) and of all, tokens and tokens a second."""

    name: str
    seconds: float
    bar: float
    share: float
    tokens: int | None
    speed: float | None


def time_rows(report: Report) -> list[Stage]:
    """A row per stage, in the order the stages were given."""
    longest, total = max(report.seconds.values(), default=0) or 1, sum(report.seconds.values()) or 1
    out = []
    for name, seconds in report.seconds.items():
        tokens = report.tokens.get(name)
        speed = tokens / seconds if tokens and seconds else None
        out.append(Stage(name, seconds, seconds / longest, seconds / total, tokens, speed))
    return out
