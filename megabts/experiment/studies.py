"""What a comparison may add: a task that needs two experts, and experts taken out and put in.

cross-capability  Mathematics in Python (`corpora.math_code`), which neither expert knows alone: all methods as they
                  are, and some trained with a little of it in the stitches' data.
changes           The stitched model without one of its experts; a model of all but the last, which is then added, its
                  own slices alone being trained.
"""

from collections.abc import Sequence

from megabts.experiment.base import data_stage, preprocess_stage
from megabts.experiment.comparison import Comparison, of_seed
from megabts.experiment.recipe import SPLITS
from megabts.runtime.stages import Stage

CROSS = "math_code"
CROSS_SHARE = 0.05
"""Of the stitches' data, where there is some of it."""
CROSS_MEGABYTES = ("--math-code-megabytes", "2")
WITH_CROSS = ("dense-data-matched", "btx-top2", "bts", "bts-mixture")
"""Methods that are also trained with some of it."""
FEW, ADDED, ADDED_START = "bts-few", "bts-added", "bts-added-start"
CURVE_POINTS = 15
"""Validations while an added expert's slices train."""


def all_stages(comparisons: Sequence[Comparison], *, built_in: bool) -> list[Stage]:
    """The data, then every seed's stages with its studies."""
    first = comparisons[0]
    stages = first.data_stages(built_in=built_in)
    ready = [stage.name for stage in stages]
    crosses = "cross-capability" in first.studies
    cross_data = _cross_data(first) if crosses else []
    stages += cross_data
    shared = [*ready, *(stage.name for stage in cross_data)]
    for comparison in comparisons:
        own = comparison.stages()
        if crosses:
            own += cross_stages(comparison, shared[-1])
        if "changes" in comparison.studies:
            own += change_stages(comparison)
        stages += of_seed(own, comparison.seed, shared, ready)
    return stages


def _cross_data(comparison: Comparison) -> list[Stage]:
    """The same math as the other corpora's, and after it programs with questions that it does not have."""
    corpora = comparison.data / "corpora-cross"
    arguments = ("--out", corpora, "--seed", str(comparison.corpora_seed), *CROSS_MEGABYTES)
    made = data_stage(comparison, "corpora-cross", "build math in code", "build_corpora.py", *arguments)
    files = [corpora / CROSS / f"{split}.jsonl.gz" for split in SPLITS]
    pairs = zip(SPLITS, files, strict=True)
    needs = ("corpora-cross", "tokenizer")
    return [made, *(preprocess_stage(comparison, CROSS, split, file, needs) for split, file in pairs)]


def cross_names(comparison: Comparison) -> dict[str, str]:
    """{name of the losses: model} of the cross-capability study."""
    models = {f"{CROSS}, {name}": name for name in comparison.models if "," not in name}
    trained = [name for name in WITH_CROSS if name in comparison.models]
    return models | {f"{CROSS}, {name} with some": f"{name}+{CROSS}" for name in trained}


def cross_stages(comparison: Comparison, data: str) -> list[Stage]:
    """Training with some of the task's data, and evaluation of all on the task; `data`: the last stage of the data."""
    mixture = {domain: weight * (1 - CROSS_SHARE) for domain, weight in comparison.mixtures.stitch.items()}
    mixture[CROSS] = CROSS_SHARE
    branched = ("seed", *(f"expert-{domain}" for domain in comparison.experts), data)
    runs = {
        "dense-data-matched": ("dense", comparison.run_dir("seed"), branched),
        "btx-top2": ("moe", comparison.run_dir("btx-top2-start"), ("btx-top2-start", data)),
    }
    stages = []
    for name in WITH_CROSS:
        if name not in comparison.models:
            continue
        if name in runs:
            kind, start, needs = runs[name]
            begin = ("--checkpoint.init_from", start)
            stages.append(comparison.train(f"{name}+{CROSS}", kind, mixture, needs, *begin))
        else:
            stages.append(comparison.stitch(f"{name}+{CROSS}", comparison.stitched[name], branched, mixture))
    evaluations = (
        comparison.evaluate(name, model, domains=(CROSS,), needs=(data,))
        for name, model in cross_names(comparison).items()
    )
    return [*stages, *evaluations]


def change_stages(comparison: Comparison) -> list[Stage]:
    """Evaluations without each expert; an expert added to a model that was trained without it."""
    stages = [comparison.evaluate(f"bts without {domain}", "bts", "--without", domain) for domain in comparison.experts]
    branched = ("seed", *(f"expert-{domain}" for domain in comparison.experts))
    *_, last = comparison.experts
    few = comparison.stitch(FEW, {"without": last}, branched)
    added = ("add", "--checkpoint", comparison.run_dir(FEW), "--expert", f"{last}={comparison.experts[last]}")
    start = comparison.run_dir(ADDED_START)
    every = max(1, comparison.steps("stitch") // CURVE_POINTS)
    return [
        *stages,
        few,
        comparison.stage(ADDED_START, f"add {last}", "stitch.py", *added, "--out", start, needs=(FEW,), makes=start),
        comparison.train(
            *(ADDED, "stitch", comparison.mixtures.stitch, (ADDED_START,)),
            *("--checkpoint.init_from", start, "--train.valid_every", str(every)),
        ),
        *(comparison.evaluate(name, name) for name in (FEW, ADDED_START, ADDED)),
    ]
