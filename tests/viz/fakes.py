"""A made-up but realistic report: four members, three domains, four stitch layers, three-hundred-step curves."""

import math
import random
import re

from megabts.viz.report import Curve, GateTable, Report, SweepPoint, TokenText

DOMAINS = ["code", "math", "stories"]
MEMBERS = ["seed", "code", "math", "stories"]
TEXTS = {
    "code": (
        "def merge(left, right):\n    out = []\n    while left and right:\n"
        "        source = left if left[0] <= right[0] else right\n        out.append(source.pop(0))\n"
        "    return out + left + right\n\n\nclass Stack(list):\n\tdef top(self):\n"
        '\t\t"""The last item; `if x < 3 && y > 4` must survive."""\n\t\treturn self[-1]\n'
    ),
    "math": (
        "Let n be an odd number, n = 2k + 1. Then n² = 4k² + 4k + 1 = 4k(k + 1) + 1, and since one of k, k + 1 is "
        "even, n² leaves remainder 1 on division by 8. So 17² = 289 = 36 · 8 + 1 ∎\n\n"
        "Question: what is 12 * 34? Answer: 408."
    ),
    "stories": (
        "Once upon a time there was a little fox who could not sleep. Every night she climbed the hill, sat down in "
        "the wet grass and counted the lamps of the village, one after another, until the last of them went out. “Good "
        "night,” she said, and the wind said nothing."
    ),
}


def realistic_report() -> Report:
    """The report; the same one every time."""
    rng = random.Random(7)
    models = _models(rng)
    return Report(
        title="Branch-Train-Stitch of three small experts",
        domains=list(DOMAINS),
        models=models,
        seconds={
            "seed": 182.4,
            "expert-code": 91.7,
            "expert-math": 90.2,
            "expert-stories": 93.9,
            "dense-data-matched": 866.0,
        }
        | {"bts": 148.3, "evaluation": 41.5},
        tokens={"seed": 4_915_200, "expert-code": 2_457_600, "expert-math": 2_457_600, "expert-stories": 2_457_600}
        | {"dense-data-matched": 25_804_800, "bts": 1_228_800},
        curves=_curves(rng),
        sweep=[
            SweepPoint(lr, {d: models["dense-data-matched"][d] + off for d in DOMAINS}, _mean(models, off), off == 0)
            for lr, off in ((0.0003, 0.091), (0.001, 0.0), (0.003, 0.034))
        ],
        gates=_gates(rng),
        texts=[_text(rng, domain) for domain in DOMAINS],
        settings={
            "layers": "8",
            "hidden size": "256",
            "members": "4",
            "stitch every": "2 layers",
            "sequence": "256 tokens",
        }
        | {"batch": "16 sequences", "learning rate (experts)": "0.001", "learning rate (stitch)": "0.0003"}
        | {"precision": "float32", "seed of all randomness": "1234", "device": "CPU, 2 threads", "tokenizer": "bytes"},
        checks=[
            ("BTS is better than the seed in every domain", True, "code 1.402 < 2.310, math 1.655 < 2.544"),
            ("BTS is within 5% of the oracle", True, "1.610 against 1.571: +2.5%"),
            ("BTS beats the dense model", False, "1.610 against 1.598"),
        ],
    )


def _mean(models: dict[str, dict[str, float]], offset: float) -> float:
    return models["dense-data-matched"]["average"] + offset


def _models(rng: random.Random) -> dict[str, dict[str, float]]:
    seed = {"code": 2.310, "math": 2.544, "stories": 2.218}
    own = {"code": 1.377, "math": 1.621, "stories": 1.714}
    rows = {"bts": {"code": 1.402, "math": 1.655, "stories": 1.772}}
    rows["dense-data-matched"] = {"code": 1.391, "math": 1.668, "stories": 1.734}
    rows["soup"] = {d: seed[d] * rng.uniform(0.96, 1.01) for d in DOMAINS}
    for expert in DOMAINS:
        rows[f"expert-{expert}"] = {d: own[d] if d == expert else seed[d] * rng.uniform(1.0, 1.25) for d in DOMAINS}
    rows["seed"] = seed
    return {name: {**row, "average": sum(row.values()) / 3} for name, row in rows.items()}


def _curves(rng: random.Random) -> list[Curve]:
    runs = [("seed", 5.6, 2.35), ("expert-code", 2.3, 1.37), ("expert-math", 2.5, 1.62), ("expert-stories", 2.2, 1.72)]
    runs += [
        (f"dense-data-matched, lr {lr}", 2.4, end) for lr, end in (("0.0003", 1.69), ("0.001", 1.6), ("0.003", 1.63))
    ]
    runs += [("bts", 2.5, 1.61)]
    return [_curve(rng, *run) for run in runs]


def _curve(rng: random.Random, name: str, start: float, end: float) -> Curve:
    steps = list(range(1, 301))
    losses = [end + (start - end) * math.exp(-step / 60) + rng.gauss(0, 0.06) for step in steps]
    away = {
        d: 0.15 * (i - 1) + (0.5 if name.startswith("expert-") and d not in name else 0) for i, d in enumerate(DOMAINS)
    }
    valid = {
        d: [(s, end + off + (start - end - off) * math.exp(-s / 60)) for s in range(0, 301, 50)]
        for d, off in away.items()
    }
    return Curve(name, steps, [step * 4096 for step in steps], losses, valid)


def _gates(rng: random.Random) -> GateTable:
    layers = [f"layer {i}, {kind}" for i, kind in ((2, "Hub-into-Experts"), (4, "Experts-into-Hub"))]
    layers += [f"layer {i}, {kind}" for i, kind in ((6, "Hub-into-Experts"), (8, "Experts-into-Hub"))]
    values: list[list[list[float | None]]] = []
    for layer in layers:
        if layer.endswith("Hub-into-Experts"):
            experts: list[list[float | None]] = [[rng.uniform(0.2, 0.7) for _ in DOMAINS] for _ in MEMBERS[1:]]
            values.append([[None] * 3, *experts])
            continue
        columns = []
        for domain in DOMAINS:
            raw = [rng.uniform(0.5, 1) + (1.2 if member == domain else 0) for member in MEMBERS]
            columns.append([value / sum(raw) for value in raw])
        values.append([[column[i] for column in columns] for i in range(len(MEMBERS))])
    return GateTable(layers, list(MEMBERS), list(DOMAINS), values)


def _text(rng: random.Random, domain: str) -> TokenText:
    tokens = re.findall(r" ?\w{1,4}|\n| {2,}|\t|[^\w\n]", TEXTS[domain])
    weights = []
    for _ in tokens:
        raw = [rng.uniform(0.3, 1) + (rng.random() if member == domain else 0) for member in MEMBERS]
        weights.append([value / sum(raw) for value in raw])
    return TokenText(domain, tokens, weights)
