"""Every method on the same members and the same tokens, as a list of stages: one `Comparison` for each seed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megabts.bts.flops import bts_flops
from megabts.bts.plan import stitch_plan
from megabts.experiment.base import Experiment
from megabts.experiment.forms import STITCHED, Settings, ablations
from megabts.experiment.methods import METHODS, UPCYCLED
from megabts.experiment.scale import PRESETS, Scale, read_scale
from megabts.model.flops import dense_flops
from megabts.runtime.stages import Stage


@dataclass(frozen=True)
class Comparison(Experiment):
    """All methods from one seed; `out` is a folder below the one that holds the data of all seeds."""

    preset: str = "tiny"
    studies: tuple[str, ...] = ()
    """What is added: of ablations, cross-capability, changes."""

    kind = "compare"
    methods: tuple[str, ...] = ()
    """Of the methods, those to compare beside seed and experts; none: all."""

    free = ("studies", "methods")

    @property
    def scale(self) -> Scale:
        """The preset's."""
        return read_scale(self.preset)

    @property
    def full_minutes(self) -> float:
        """The preset's."""
        return self.scale.minutes

    @property
    def tokenizer_bytes(self) -> int:
        """The preset's."""
        return self.scale.tokenizer_bytes

    @property
    def configs(self) -> Path:
        """Folder of the preset's configurations."""
        return PRESETS / self.preset

    @property
    def data(self) -> Path:
        """Tokenizer and datasets are those of all seeds."""
        return self.out.parent

    @property
    def corpora_seed(self) -> int:
        """The same whatever seeds are compared: one that is added, or left out, must find the others' data."""
        return 0

    @property
    def members(self) -> dict[str, Path]:
        """Folders of seed and experts, by name."""
        return {"seed": self.run_dir("seed"), **self.experts}

    @property
    def stitched(self) -> dict[str, Settings]:
        """The stitched models: name -> how they differ from the paper's form."""
        if "ablations" not in self.studies:
            return STITCHED
        return STITCHED | ablations(self.config("seed").model, self.config("stitch"), tuple(self.experts))

    @property
    def models(self) -> tuple[str, ...]:
        """Names of all models compared."""
        experts = (f"expert-{domain}" for domain in self.experts)
        known = (*METHODS, *(name for name in self.stitched if name not in METHODS))
        return ("seed", *experts, *(name for name in known if not self.methods or name in self.methods))

    def stages(self) -> list[Stage]:
        """Members, methods, evaluations; the data must be there."""
        members = self.member_stages((), exclusive=False)
        branched = tuple(stage.name for stage in members)
        start = ("--checkpoint.init_from", self.run_dir("seed"))
        stitch = self.mixtures.stitch
        steps = self.compute_matched_steps()
        stages = [
            *members,
            self.train("dense-data-matched", "dense", stitch, ("seed",), *start),
            self.train("dense-compute-matched", "dense", stitch, ("seed",), *start, steps=steps),
            self.soup_stage(branched),
            self._btm(branched),
            self.train("expert-routing", "routing", stitch, branched, "--routing.members", self._paths(self.members)),
        ]
        for name, arguments in UPCYCLED.items():
            needs = ("seed",) if arguments[0] == "sparse" else branched
            made = self._upcycle(name, needs, *arguments)
            begin = ("--checkpoint.init_from", self.run_dir(f"{name}-start"))
            stages += [made, self.train(name, "moe", stitch, (made.name,), *begin)]
        stages += [self.stitch(name, settings, branched) for name, settings in self.stitched.items()]
        stages += [self.evaluate(name, name) for name in self.models]
        return needed(stages, {stage.name for stage in stages[-len(self.models) :]})

    def compute_matched_steps(self) -> int:
        """Steps in which the dense model does as many operations as all experts and the paper's stitches together."""
        config = self.config("seed")
        model, length = replace(config.model, vocab_size=self.vocab_size), config.data.seq_length
        bts = replace(self.config("stitch").bts, experts=dict.fromkeys(self.experts, ""))
        plan = stitch_plan(model.num_layers, bts)
        dense = dense_flops(model, length).total
        stitched = self.steps("stitch") * bts_flops(model, bts, length, plan).total / dense
        return round(len(self.experts) * self.steps("expert") + stitched)

    def _upcycle(self, name: str, needs: tuple[str, ...], method: str, *arguments: str) -> Stage:
        if method == "sparse":
            members = ["--member", f"seed={self.run_dir('seed')}", "--copies", str(len(self.members))]
        else:
            members = [item for key, path in self.members.items() for item in ("--member", f"{key}={path}")]
        start = self.run_dir(f"{name}-start")
        common: tuple[str | Path, ...] = ("--method", method, *members, "--seed", str(self.seed), "--out", start)
        title = f"upcycle {name}"
        return self.stage(f"{name}-start", title, "upcycle.py", *common, *arguments, needs=needs, makes=start)

    def _btm(self, needs: tuple[str, ...]) -> Stage:
        members = [item for key, path in self.members.items() for item in ("--member", f"{key}={path}")]
        out = self.run_dir("btm")
        return self.stage("btm", "make btm", "merge.py", "btm", *members, "--out", out, needs=needs, makes=out)

    def stitch(
        self, name: str, settings: Settings, needs: tuple[str, ...], mixture: dict[str, float] | None = None
    ) -> Stage:
        """Training of stitches that differ from the paper's form by `settings`."""
        experts, hub = dict(self.experts), self.run_dir("seed")
        if "hub" in settings:
            experts = {"seed": hub, **experts}
            hub = experts.pop(settings["hub"])
        if "without" in settings:
            experts.pop(settings["without"])
        forms = [
            item for key, value in settings.items() if key not in ("hub", "without") for item in (f"--{key}", value)
        ]
        members = ("--bts.hub", hub, "--bts.experts", self._paths(experts))
        return self.train(name, "stitch", mixture or self.mixtures.stitch, needs, *members, *forms)

    def evaluate(
        self, name: str, model: str, *arguments: str, domains: Sequence[str] = (), needs: tuple[str, ...] = ()
    ) -> Stage:
        """Losses of `model`, kept under `name`, on the windows of `domains` (all)."""
        return self.stage(
            f"evaluate-{name}",
            f"evaluate {name}",
            "evaluate.py",
            *("--checkpoint", self.run_dir(model), "--json", self.losses(name), "--protocol", "documents"),
            *("--dtype", "float32"),  # merged members are kept in it, trained ones are not: one arithmetic for all
            *("--samples", str(self.scale.windows), "--seq-length", str(self.config("seed").data.seq_length)),
            *("--data", *(f"{domain}={self.prefix(domain, 'valid')}" for domain in domains or self.domains)),
            *arguments,
            needs=(model, *needs),
        )

    @staticmethod
    def _paths(folders: dict[str, Path]) -> str:
        return json.dumps({name: str(folder) for name, folder in folders.items()})


def needed(stages: Sequence[Stage], wanted: set[str]) -> list[Stage]:
    """The stages of these names and all that they need, in order."""
    wanted = set(wanted)
    for stage in reversed(stages):
        if stage.name in wanted:
            wanted.update(stage.needs)
    return [stage for stage in stages if stage.name in wanted]


def of_seed(stages: Sequence[Stage], seed: int, shared: Sequence[str], ready: Sequence[str]) -> list[Stage]:
    """The same stages with the seed in their names; `shared`: stages of all seeds; `ready`: of these, what those need
    that need nothing else."""
    prefix = f"seed {seed}: "
    return [
        replace(
            stage,
            name=prefix + stage.name,
            title=prefix + stage.title,
            needs=tuple(need if need in shared else prefix + need for need in stage.needs) or tuple(ready),
        )
        for stage in stages
    ]
