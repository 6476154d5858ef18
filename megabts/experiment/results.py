"""From a finished quickstart's files to its report: losses, curves, gates, claims."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from megabts.bts.gates import GatePlace, GateRecord, gate_places, record_gates
from megabts.bts.model import BTSModel
from megabts.build import LoadedModel, load_model, num_parameters
from megabts.data.build import build_valid_datasets
from megabts.data.loader import Loader
from megabts.data.validation import ValidationSet
from megabts.errors import UserError
from megabts.evaluation.perplexity import batch_loss
from megabts.experiment.quickstart import DENSE_RATES, Quickstart
from megabts.inference.text_stream import TextStream
from megabts.parallel.mesh import ParallelMesh
from megabts.runtime.metrics import read_metrics
from megabts.tokenizers.build import build_tokenizer
from megabts.tokenizers.protocol import Tokenizer
from megabts.viz.records import AVERAGE, Curve, GateTable, Report, SweepPoint, TokenText

GATE_WINDOWS = 32
"""Validation windows per domain that the gate table is averaged over."""
EXPERT_BAR, ORACLE_BAR, BTS_BAR = 0.93, 0.92, 1.05
"""An expert's loss on its domain and the oracle's average, as shares of the seed's; BTS's average, of the oracle's."""
DENSE = "dense-data-matched"


def make_report(quickstart: Quickstart) -> Report:
    """Everything the page and `results.json` show. Raises UserError when a stage has not been run."""
    sweep = _sweep(quickstart)
    chosen = sweep[_best(sweep)]
    names = {"seed": "seed"} | {f"expert-{d}": f"expert-{d}" for d in quickstart.mixtures.experts}
    names |= {"soup": "soup", DENSE: quickstart.dense_name(chosen.learning_rate), "bts": "bts"}
    _check_windows(quickstart, names.values())
    models = {name: _losses(quickstart, run) for name, run in names.items()}
    loaded = load_model(quickstart.run_dir("bts"), ParallelMesh(), None, "cpu")
    gates, texts = _gates(quickstart, loaded)
    curves = [_curve(quickstart, run) for run in quickstart.runs]
    return Report(
        title="Branch-Train-Stitch quickstart",
        domains=list(quickstart.domains),
        models=models,
        seconds=_seconds(quickstart),
        tokens={curve.name: curve.tokens[-1] for curve in curves},
        curves=curves,
        sweep=sweep,
        gates=gates,
        texts=texts,
        settings=_settings(quickstart, loaded),
        checks=[_sweep_check(sweep), *checks(models, quickstart.domains, quickstart.mixtures.experts)],
    )


def checks(
    models: dict[str, dict[str, float]], domains: tuple[str, ...], experts: tuple[str, ...]
) -> list[tuple[str, bool, str]]:
    """The claims of the experiment: (claim, whether it holds, the numbers)."""
    seed, bts = models["seed"], models["bts"][AVERAGE]
    claims = []
    for domain in experts:
        ratio = models[f"expert-{domain}"][domain] / seed[domain]
        claim = f"The {domain} expert's loss on its domain is at most {EXPERT_BAR} of the seed's"
        claims.append((claim, ratio <= EXPERT_BAR, f"{ratio:.3f}"))
    oracle = oracle_average(models, domains, experts)
    ratio = oracle / seed[AVERAGE]
    claim = f"The oracle (best member per domain) has at most {ORACLE_BAR} of the seed's average loss"
    claims.append((claim, ratio <= ORACLE_BAR, f"{oracle:.3f} / {seed[AVERAGE]:.3f} = {ratio:.3f}"))
    for name, losses in models.items():
        if name != "bts":
            numbers = f"{bts:.3f} against {losses[AVERAGE]:.3f}"
            claims.append((f"BTS has a lower average loss than {name}", bts < losses[AVERAGE], numbers))
    ratio = bts / oracle
    claims.append(("BTS is within 5% of the oracle", ratio <= BTS_BAR, f"{bts:.3f} / {oracle:.3f} = {ratio:.3f}"))
    return claims


def _sweep_check(sweep: list[SweepPoint]) -> tuple[str, bool, str]:
    """Whether the best learning rate of the dense runs lies between others: a fair yardstick."""
    averages = ", ".join(f"{point.learning_rate:g}: {point.average:.3f}" for point in sweep)
    return "The dense model's best learning rate lies inside its sweep", 0 < _best(sweep) < len(sweep) - 1, averages


def _best(sweep: list[SweepPoint]) -> int:
    return next(index for index, point in enumerate(sweep) if point.chosen)


def oracle_average(models: dict[str, dict[str, float]], domains: tuple[str, ...], experts: tuple[str, ...]) -> float:
    """Average over domains of the best member's loss there."""
    members = ["seed", *(f"expert-{domain}" for domain in experts)]
    return sum(min(models[member][domain] for member in members) for domain in domains) / len(domains)


def _check_windows(quickstart: Quickstart, runs: Iterable[str]) -> None:
    """Raise UserError unless all models were measured on the same number of tokens of each domain."""
    for domain in quickstart.domains:
        counts = {run: json.loads(quickstart.losses(run).read_text())[domain]["tokens"] for run in runs}
        if len(set(counts.values())) > 1:
            raise UserError(
                f"the models were measured on different {domain} texts: tokens {counts}; evaluate them alike"
            )


def _losses(quickstart: Quickstart, run: str) -> dict[str, float]:
    found = json.loads(quickstart.losses(run).read_text())
    losses = {domain: found[domain]["loss"] for domain in quickstart.domains}
    return losses | {AVERAGE: sum(losses.values()) / len(losses)}


def _sweep(quickstart: Quickstart) -> list[SweepPoint]:
    """The dense runs, the one with the lowest average chosen."""
    losses = {rate: _losses(quickstart, quickstart.dense_name(rate)) for rate in DENSE_RATES}
    best = min(losses, key=lambda rate: losses[rate][AVERAGE])
    return [
        SweepPoint(rate, {d: found[d] for d in quickstart.domains}, found[AVERAGE], rate == best)
        for rate, found in losses.items()
    ]


def _curve(quickstart: Quickstart, run: str) -> Curve:
    steps, valid = read_metrics(quickstart.run_dir(run))
    points = {d: [(row["step"], row["valid"][d]) for row in valid] for d in quickstart.domains}
    seen = [row["step"] * row["tokens"] for row in steps]
    return Curve(run, [row["step"] for row in steps], seen, [row["loss"] for row in steps], points)


def _seconds(quickstart: Quickstart) -> dict[str, float]:
    """Wall seconds of every finished stage."""
    markers = sorted((quickstart.out / "done").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return {path.stem: json.loads(path.read_text())["seconds"] for path in markers}


def _settings(quickstart: Quickstart, loaded: LoadedModel) -> dict[str, str]:
    assert isinstance(loaded.model, BTSModel)
    trained, _ = num_parameters(loaded.model)
    model, run = loaded.config.model, loaded.config
    shape = f"{model.num_layers} layers x {model.hidden_size}, vocabulary {model.vocab_size:,}"
    return {
        "seed": str(quickstart.seed),
        "member": f"{model.num_parameters:,} parameters: {shape}",
        "stitches": f"{trained:,} parameters, {len(loaded.model.plan)} layers, experts {run.bts.expert_stream}",
        "batch": f"{run.train.global_batch} x {run.data.seq_length} tokens",
        "number format": run.precision.dtype,
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
    }


def _gates(quickstart: Quickstart, loaded: LoadedModel) -> tuple[GateTable, list[TokenText]]:
    """Mean gates per place, member and domain, and one text of each domain with its last gates."""
    model = loaded.model
    assert isinstance(model, BTSModel)
    tokenizer = build_tokenizer(loaded.tokenizer)
    sets = build_valid_datasets(loaded.config.data, GATE_WINDOWS, tokenizer=tokenizer)
    members = ["seed", *(f"expert-{domain}" for domain in quickstart.mixtures.experts)]
    places = gate_places(model)
    by_domain, texts = {}, []
    for domain, windows in sets.items():
        record = _record(model, windows)
        by_domain[domain] = {index: torch.cat(parts, 2) for index, parts in record.places.items()}
        last = by_domain[domain][len(places) - 1]
        texts.append(_text(domain, windows, last, tokenizer))
    values = [
        [[_mean_gate(by_domain[domain][index], place, row) for domain in sets] for row in range(len(members))]
        for index, place in enumerate(places)
    ]
    return GateTable([place.title for place in places], members, list(sets), values), texts


@torch.no_grad()
def _record(model: BTSModel, windows: ValidationSet) -> GateRecord:
    loader = Loader(windows, micro_batch=1, global_batch=1, dp_rank=0, dp_size=1, seq_length=windows.seq_length)
    model.train(False)
    with record_gates(model) as record:
        batch_loss(model, loader.read(0, len(windows)), torch.device("cpu"))
    return record


def _mean_gate(gates: torch.Tensor, place: GatePlace, member: int) -> float | None:
    """Mean of gates [members gated, s, b] for one member (0: the hub, which a Hub-into-Experts layer does not gate)."""
    row = member if place.gates_hub else member - 1
    return None if row < 0 else gates[row].mean().item()


def _text(domain: str, windows: ValidationSet, gates: torch.Tensor, tokenizer: Tokenizer) -> TokenText:
    """The middle window; a token's weights are the gates at the position that predicts it."""
    which = len(windows) // 2
    ids = windows[which].tolist()
    stream = TextStream(tokenizer, ids[:1])
    tokens = [stream.add(token) for token in ids[1:]]
    return TokenText(domain, tokens, gates[:, :, which].T.tolist())


def write_results(quickstart: Quickstart, report: Report) -> Path:
    """Write `results.json`, `report.json` and `report.html` into the quickstart's folder; returns the page's path."""
    from megabts.viz.report import results_json, write_report

    out = quickstart.out
    (out / "results.json").write_text(json.dumps(results_json(report), indent=2) + "\n")
    (out / "report.json").write_text(json.dumps(report.to_dict()) + "\n")
    write_report(report, out / "report.html")
    return out / "report.html"
