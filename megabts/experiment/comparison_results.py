"""From a comparison's files to its results: `comparison.json`, a Markdown table, a page.

Losses are nats per token on windows that begin where documents do (`evaluation.windows`), averaged over domains and
then over seeds; the spread is the standard deviation of the average over seeds. What a method cost (tokens, operations,
seconds) is its own training alone: every method but the dense ones stands on the members' training, which is told with
the members.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megabts.bts.parameters import parameter_report, short
from megabts.build import num_parameters, whole_model
from megabts.checkpoint.source import CONFIG_FILE
from megabts.checkpoint.storage import resolve
from megabts.config.load import from_yaml
from megabts.config.run import RunConfig
from megabts.evaluation.windows import MIXED
from megabts.experiment.comparison import Comparison
from megabts.experiment.forms import STITCHED
from megabts.experiment.studies import ADDED, ADDED_START, CROSS, FEW, cross_names
from megabts.runtime.metrics import read_metrics

Comparisons = Sequence[Comparison]
UNTRAINED = ("soup", "btm")
"""Methods that are put together without training."""


def collect(comparisons: Comparisons) -> dict[str, Any]:
    """The content of `comparison.json`, from the finished stages of one comparison per seed."""
    first = comparisons[0]
    result = {
        "domains": list(first.domains),
        "seeds": [comparison.seed for comparison in comparisons],
        "minutes": first.minutes,
        "preset": first.preset,
        "methods": {name: _method(comparisons, name) for name in first.models},
        "oracle": _oracle(comparisons),
    }
    if "cross-capability" in first.studies:
        names = {name: name.removeprefix(f"{CROSS}, ") for name in cross_names(first)}
        result["cross-capability"] = {
            short_name: _measured(comparisons, name, (CROSS,)) for name, short_name in names.items()
        }
    if "changes" in first.studies:
        changed = ("bts", *(f"bts without {domain}" for domain in first.experts), FEW, ADDED_START, ADDED)
        result["changes"] = {name: _measured(comparisons, name, first.domains) for name in changed}
        result["added"] = _added(comparisons)
    return result


def _measured(comparisons: Comparisons, name: str, domains: Sequence[str]) -> dict[str, Any]:
    """Losses of one model per domain, their average, and its spread over seeds."""
    found = [_losses(comparison, name) for comparison in comparisons]
    averages = [_average(losses, domains) for losses in found]
    return {
        "losses": {domain: statistics.mean(losses[domain]["loss"] for losses in found) for domain in domains},
        "average": statistics.mean(averages),
        "spread": _spread(averages),
        "averages": averages,
        "by_position": _positions([losses[domain] for losses in found for domain in domains]),
    }


def _added(comparisons: Comparisons) -> dict[str, Any]:
    """The expert added last, and its domain's validation loss, mean over seeds, after so many tokens."""
    *_, domain = comparisons[0].experts
    curves = []
    for comparison in comparisons:
        steps, valid = read_metrics(comparison.run_dir(ADDED))
        tokens = {row["step"]: row["tokens"] * row["step"] for row in steps}
        curves.append([(tokens[row["step"]], row["valid"][domain]) for row in valid])
    means = [(column[0][0], statistics.mean(loss for _, loss in column)) for column in zip(*curves, strict=True)]
    return {"expert": domain, "losses": means}


def _method(comparisons: Comparisons, name: str) -> dict[str, Any]:
    found = [_losses(comparison, name) for comparison in comparisons]
    measured = _measured(comparisons, name, comparisons[0].domains)
    trained, total, active = parameters(comparisons[0], name)
    costs = [_cost(comparison, name) for comparison in comparisons]
    tokens, flops, seconds = (statistics.mean(column) for column in zip(*costs))
    return {
        **measured,
        "mixed": statistics.mean(losses[MIXED]["loss"] for losses in found),
        "mixed_spread": _spread([losses[MIXED]["loss"] for losses in found]),
        "mixed_by_position": _positions([losses[MIXED] for losses in found]),
        "trained_params": trained,
        "total_params": total,
        "active_params": active,
        "tokens": round(tokens),
        "flops": flops,
        "seconds": round(seconds, 1),
    }


def _losses(comparison: Comparison, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(comparison.losses(name).read_text())
    return found


def _average(losses: dict[str, Any], domains: Sequence[str]) -> float:
    return statistics.mean(losses[domain]["loss"] for domain in domains)


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _positions(measured: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """Mean over domains and seeds of the losses by position."""
    columns = zip(*(losses["by_position"] for losses in measured), strict=True)
    return [(column[0][0], statistics.mean(loss for _, loss in column)) for column in columns]


def _oracle(comparisons: Comparisons) -> dict[str, Any]:
    """The best member of each domain, by its own loss: what choosing whole texts could reach at best."""
    domains, averages, by_domain = comparisons[0].domains, [], []
    for comparison in comparisons:
        members = ["seed", *(f"expert-{domain}" for domain in comparison.experts)]
        losses = [_losses(comparison, name) for name in members]
        best = {domain: min(found[domain]["loss"] for found in losses) for domain in domains}
        by_domain.append(best)
        averages.append(statistics.mean(best.values()))
    return {
        "losses": {domain: statistics.mean(best[domain] for best in by_domain) for domain in domains},
        "average": statistics.mean(averages),
        "spread": _spread(averages),
    }


def parameters(comparison: Comparison, name: str) -> tuple[int, int, int]:
    """(trained, total, of one token) parameters of a model of the comparison; nothing is built.

    The total of the paper's stitches is the paper's count, that of another form what it really has.
    """
    config = from_yaml((resolve(comparison.run_dir(name)) / CONFIG_FILE).read_text(), name)
    one, count = config.model.num_parameters, len(comparison.members)
    if config.method == "bts":
        report = parameter_report(config.model, config.bts)
        return report.trained, report.paper_total if report.paper_form else report.total, report.active
    if config.method == "btm":
        return 0, count * one, count * one
    trained, total = num_parameters(whole_model(config))
    if config.method == "routing":
        return trained, total, one + trained
    if config.method == "moe":
        return trained, total, total - _idle(config)
    return (0 if name in UNTRAINED else trained), total, total


def _idle(config: RunConfig) -> int:
    """Parameters of the ffn experts, with their adapters, that a token does not run through."""
    model, moe = config.model, config.moe
    each = 3 * model.hidden_size * moe.ffn_width(model.ffn_size)
    each += model.hidden_size**2 if moe.adapters else 0
    return sum((moe.num_ffn_experts - moe.active(layer)) * each for layer in range(model.num_layers))


def _cost(comparison: Comparison, name: str) -> tuple[float, float, float]:
    """(tokens, operations, seconds) of a model's own training, making it included."""
    stages = [name, f"{name}-start"]
    markers = [path for stage in stages if (path := comparison.out / "done" / f"{stage}.json").exists()]
    seconds = sum(json.loads(path.read_text())["seconds"] for path in markers)
    if name in UNTRAINED:
        return 0, 0.0, seconds
    steps, _ = read_metrics(comparison.run_dir(name))
    return sum(row["tokens"] for row in steps), sum(row["flops"] for row in steps), seconds


def markdown(result: dict[str, Any]) -> str:
    """Losses per domain with mean and spread (the paper's Table 3), costs (its Table 2), then what was added."""
    domains, methods = result["domains"], {name: e for name, e in result["methods"].items() if form_of(name) == name}
    best = min(entry["average"] for entry in methods.values())
    losses = [["method", *domains, "average", "mixed texts"]]
    for name, entry in methods.items():
        average = _with_spread(entry)
        bold = "**" if entry["average"] == best else ""
        row = [name, *(f"{entry['losses'][domain]:.3f}" for domain in domains), f"{bold}{average}{bold}"]
        losses.append([*row, f"{entry['mixed']:.3f}"])
    oracle = result["oracle"]
    row = ["*oracle*", *(f"{oracle['losses'][domain]:.3f}" for domain in domains)]
    losses.append([*row, _with_spread(oracle), ""])
    costs = [["method", "trained", "total", "active", "tokens", "FLOPs", "seconds"]]
    for name, entry in methods.items():
        counts = [short(entry[f"{kind}_params"]) for kind in ("trained", "total", "active")]
        costs.append([name, *counts, short(entry["tokens"]), f"{entry['flops']:.2e}", f"{entry['seconds']:.0f}"])
    tables = [_table(losses), _table(costs)]
    if len(methods) < len(result["methods"]):
        tables.append(_table(_ablations(result)))
    if "cross-capability" in result:
        rows = [["model", "math in code"]]
        rows += [[name, _with_spread(entry)] for name, entry in result["cross-capability"].items()]
        tables.append(_table(rows))
    if "changes" in result:
        rows = [["model", *domains, "average"]]
        for name, entry in result["changes"].items():
            rows.append([name, *(f"{entry['losses'][domain]:.3f}" for domain in domains), _with_spread(entry)])
        tables.append(_table(rows))
        curve = [("tokens", f"loss on {result['added']['expert']}")]
        curve += [(f"{tokens:,}", f"{loss:.3f}") for tokens, loss in result["added"]["losses"]]
        tables.append(_table(curve))
    return "\n\n".join(tables) + "\n"


def form_of(name: str) -> str:
    """The stitched model that an ablation changes: `bts` of "bts, K = 1"; of any other method itself."""
    form, comma, _ = name.partition(", ")
    return form if comma and form in STITCHED else name


def _ablations(result: dict[str, Any]) -> list[list[str]]:
    """Rows of the ablations' table: parameters and losses, and average minus that of the form it changes.

    The difference is of each seed by itself, from the same members, then its mean and spread.
    """
    methods, domains = result["methods"], result["domains"]
    rows = [["ablation", "trained", *domains, "average", "difference", "to"]]
    for name, entry in methods.items():
        form = form_of(name)
        if form != name:
            row = [name, short(entry["trained_params"]), *(f"{entry['losses'][domain]:.3f}" for domain in domains)]
            rows.append([*row, _with_spread(entry), _difference(entry, methods.get(form)), form])
    return rows


def _difference(entry: dict[str, Any], other: dict[str, Any] | None) -> str:
    if other is None:
        return ""
    each = [mine - its for mine, its in zip(entry["averages"], other["averages"], strict=True)]
    return f"{statistics.mean(each):+.3f} ± {_spread(each):.3f}"


def _with_spread(entry: dict[str, Any]) -> str:
    return f"{entry['average']:.3f} ± {entry['spread']:.3f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return "\n".join([lines[0], rule, *lines[1:]])


def write_comparison(result: dict[str, Any], out: Path) -> list[Path]:
    """Write comparison.json, comparison.md and comparison.html into a folder; returns their paths."""
    from megabts.viz.comparison import write_page

    files: dict[str, Callable[[Path], object]] = {
        "comparison.json": lambda path: path.write_text(json.dumps(result, indent=2) + "\n"),
        "comparison.md": lambda path: path.write_text(markdown(result)),
        "comparison.html": lambda path: write_page(result, path),
    }
    for name, write in files.items():
        write(out / name)
    return [out / name for name in files]
