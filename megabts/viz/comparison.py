"""The page of a comparison of methods: one HTML file with losses, costs and figures, drawn from its results file.

`result` is the content of a comparison's `comparison.json`: domains, seeds, minutes, preset, the oracle, and for each
method its losses (nats per token; mean over seeds, spread = one standard deviation), losses by position, parameters and
costs. Methods are ranked by average loss; a method's rank is its number in every figure. Ablations, whose names begin
with a stitched model's and a comma, have a table of their own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from megabts.viz.comparison_figures import (
    FAMILIES,
    Levels,
    Line,
    Point,
    added_figure,
    bar_figure,
    cost_figure,
    family,
    position_figure,
)
from megabts.viz.page import Row, compare_losses, render, write_whole

ABLATION = ("bts, ", "bts-mixture, ")
SEED, ORACLE, BTM = "seed", "oracle", "btm"
AVERAGE, MIXED = "average", "mixed texts"
BY_POSITION = ("dense-compute-matched", BTM, "expert-routing", "bts", "bts-mixture")
"""Methods whose losses by position are drawn; the best of the upcycled ones joins them."""
Method = dict[str, Any]


def write_page(result: dict[str, Any], path: Path) -> None:
    """Write the page to `path`, whose folders are made; the file is renamed into place, never half a page."""
    write_whole(_page(result), path)


def _page(result: dict[str, Any]) -> str:
    methods, ablations = ranked(result)
    names = list(methods)
    families = {name: family(name, result["domains"]) for name in result["methods"]}
    shown = [name for name in names if families[name] != "members"]
    used = [kind for kind in FAMILIES if kind in {families[name] for name in shown}]
    points = _points(result, methods)
    base = "bts" if "bts" in methods else SEED
    return render(
        "comparison.html",
        result=result,
        repeated=len(result["seeds"]) > 1,
        columns=[*result["domains"], AVERAGE, MIXED],
        lead=lead(result, methods),
        rows=_rows(result, methods),
        studies=[*_cross(result), *_changes(result)],
        added=_added(result),
        ablations=_rows(result, _with_references(methods, ablations), base) if ablations else [],
        ablation_base=base,
        numbers={name: number for number, name in enumerate(names, 1)},
        methods=result["methods"],
        spreads=_spreads(result),
        names=names,
        shown=shown,
        ablation_names=list(ablations),
        colours={name: FAMILIES[kind][0] for name, kind in families.items()},
        legend=[(kind, *FAMILIES[kind][::2]) for kind in used],
        cost_figures=_cost_figures(result, methods, points),
        bar_figures=_bar_figures(result, methods),
        position_figures=_position_figures(result, methods),
    )


def ranked(result: dict[str, Any]) -> tuple[dict[str, Method], dict[str, Method]]:
    """(methods, ablations), each by ascending average loss; one that diverged comes last."""
    in_order = _by_average(result["methods"])
    return (
        {name: method for name, method in in_order.items() if not name.startswith(ABLATION)},
        {name: method for name, method in in_order.items() if name.startswith(ABLATION)},
    )


def _by_average(methods: dict[str, Method]) -> dict[str, Method]:
    def average(name: str) -> float:
        found: float = methods[name]["average"]
        return found if math.isfinite(found) else math.inf

    return {name: methods[name] for name in sorted(methods, key=average)}


def _with_references(methods: dict[str, Method], ablations: dict[str, Method]) -> dict[str, Method]:
    """The ablations among what they are compared with: the unchanged stitched models and the seed."""
    references = {name: methods[name] for name in (SEED, "bts", "bts-mixture") if name in methods}
    return _by_average({**references, **ablations})


def lead(result: dict[str, Any], methods: dict[str, Method]) -> dict[str, Any]:
    """What the page begins with: the best method and its margins (nats, relative) to the next, btm and the oracle."""
    best, *others = methods
    average = methods[best]["average"]
    against = [(f"the next, {name}", methods[name]["average"]) for name in others[:1]]
    if BTM in others[1:]:
        against.append(("the members as an ensemble, btm", methods[BTM]["average"]))
    against.append(("the oracle, the best member of each domain with hindsight", result["oracle"]["average"]))
    return {
        "best": best,
        "average": average,
        "spread": methods[best]["spread"],
        "margins": [
            Margin(name, loss, abs(average - loss), abs(average / loss - 1), average <= loss)
            for name, loss in against
            if math.isfinite(loss) and math.isfinite(average)
        ],
    }


@dataclass
class Margin:
    """How far the best method is from another: the other's average loss, distance in nats and relative, who leads."""

    name: str
    loss: float
    nats: float
    share: float
    better: bool


def _rows(result: dict[str, Any], methods: dict[str, Method], base: str = SEED) -> list[Row]:
    """Rows of losses (domains, average, mixed texts) in the methods' order, then the oracle's; compared with `base`."""
    domains, oracle = result["domains"], result["oracle"]
    losses = {
        name: [*(method["losses"][domain] for domain in domains), method["average"], method["mixed"]]
        for name, method in methods.items()
    }
    losses[ORACLE] = [*(oracle["losses"][domain] for domain in domains), oracle["average"], math.nan]
    return compare_losses(losses, base, [ORACLE])


def _spreads(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Method -> column -> spread over seeds, for the columns that have one."""
    found = {
        name: {AVERAGE: method["spread"], MIXED: method["mixed_spread"]} for name, method in result["methods"].items()
    }
    return {**found, ORACLE: {AVERAGE: result["oracle"]["spread"]}}


@dataclass
class Study:
    """A table of its own: heading, note, columns, rows, spreads by row and column, the row to shade against."""

    title: str
    note: str
    columns: list[str]
    rows: list[Row]
    spreads: dict[str, dict[str, float]]
    base: str


def _cross(result: dict[str, Any]) -> list[Study]:
    """Losses on a task that needs two experts, where the comparison had one."""
    found = result.get("cross-capability", {})
    if not found:
        return []
    note = "Math in code, which no expert knows alone. “With some”: trained with a little of it in the stitches' data."
    losses = {name: [entry["average"]] for name, entry in _by_average(found).items()}
    spreads = {name: {"math in code": entry["spread"]} for name, entry in found.items()}
    title = "A task for two experts"
    return [Study(title, note, ["math in code"], compare_losses(losses, SEED, []), spreads, SEED)]


def _changes(result: dict[str, Any]) -> list[Study]:
    """Losses of the stitched model with experts taken out and put in, where the comparison did that."""
    found, domains = result.get("changes", {}), result["domains"]
    if not found:
        return []
    note = (
        "The stitched model without each expert, nothing trained anew; one stitched without the last expert "
        "(bts-few), that expert added to it (bts-added-start), and the added slices trained (bts-added). "
        "Differences are to the whole model, bts."
    )
    losses = {name: [*(entry["losses"][d] for d in domains), entry["average"]] for name, entry in found.items()}
    spreads = {name: {AVERAGE: entry["spread"]} for name, entry in found.items()}
    rows = compare_losses(losses, "bts", [])
    return [Study("Experts taken out and put in", note, [*domains, AVERAGE], rows, spreads, "bts")]


def _added(result: dict[str, Any]) -> list[tuple[str, Markup]]:
    if "added" not in result:
        return []
    expert = result["added"]["expert"]
    title = f"Loss on {expert} while the added expert's slices train"
    return [(title, Markup(added_figure(result["added"]["losses"], title)))]


def _points(result: dict[str, Any], methods: dict[str, Method]) -> Callable[..., list[Point]]:
    """A function to the methods as points, from functions of a method to its loss, spread and cost."""
    families = {name: family(name, result["domains"]) for name in methods}
    repeated = len(result["seeds"]) > 1

    def make(
        loss: Callable[[Method], float],
        spread: Callable[[Method], float] | None = None,
        cost: Callable[[Method], float] = lambda _: 0,
    ) -> list[Point]:
        return [
            Point(number, name, families[name], cost(m), loss(m), spread(m) if spread and repeated else None)
            for number, (name, m) in enumerate(methods.items(), 1)
        ]

    return make


def _cost_figures(
    result: dict[str, Any], methods: dict[str, Method], points: Callable[..., list[Point]]
) -> list[tuple[str, Markup]]:
    levels = Levels(methods[SEED]["average"], result["oracle"]["average"])
    figures = []
    for title, key, label in (
        ("Loss over trained parameters", "trained_params", "trained parameters"),
        ("Loss over training operations", "flops", "training FLOPs"),
    ):
        shown = points(lambda m: m["average"], lambda m: m["spread"], lambda m, key=key: m[key])
        shown = [point for point in shown if point.family != "members"]
        figures.append((title, Markup(cost_figure(shown, levels, label))))
    return figures


def _bar_figures(result: dict[str, Any], methods: dict[str, Method]) -> list[tuple[str, Markup]]:
    points, seed, oracle = _points(result, methods), methods[SEED], result["oracle"]
    panels = [("average", points(lambda m: m["average"], lambda m: m["spread"]), seed["average"], oracle["average"])]
    panels.append((MIXED, points(lambda m: m["mixed"], lambda m: m["mixed_spread"]), seed["mixed"], math.nan))
    for domain in result["domains"]:
        shown = points(lambda m, domain=domain: m["losses"][domain])
        panels.append((domain, shown, seed["losses"][domain], oracle["losses"][domain]))
    return [(title, Markup(bar_figure(shown, Levels(start, best), title))) for title, shown, start, best in panels]


def position_methods(methods: Sequence[str], domains: Sequence[str]) -> list[str]:
    """Of ranked methods those whose losses by position are drawn, in their order."""
    upcycled = [name for name in methods if family(name, domains) == "upcycled mixtures"][:1]
    return [name for name in methods if name in (*BY_POSITION, *upcycled)]


def _position_figures(result: dict[str, Any], methods: dict[str, Method]) -> list[tuple[str, Markup]]:
    shown = position_methods(list(methods), result["domains"])
    figures = []
    for title, key in (("Texts of one domain", "by_position"), ("Mixed texts", "mixed_by_position")):
        lines = [Line(name, family(name, result["domains"]), methods[name][key]) for name in shown]
        figures.append((title, Markup(position_figure(lines, methods[SEED][key], title))))
    return figures
