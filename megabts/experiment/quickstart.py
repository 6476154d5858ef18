"""The whole of BTS as a list of stages, each one command of `tools/` with its own log.

The seed, on which all else waits, and the stitches, for which all else is done, have all threads.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from megabts.errors import UserError
from megabts.experiment.base import SETTINGS, Experiment
from megabts.runtime.stages import Stage

DENSE_RATES = (1e-3, 3e-3, 1e-2)
"""Learning rates tried for the dense model trained on the stitches' data."""
VALID_WINDOWS = 200
"""Windows per domain that the final losses are measured on."""


@dataclass(frozen=True)
class Quickstart(Experiment):
    """Seed, experts, stitches and what they are measured against, from one seed."""

    kind = "quickstart"

    @property
    def full_minutes(self) -> float:
        """On two cores."""
        return 12

    def dense_name(self, rate: float) -> str:
        """Name of the dense run at a learning rate."""
        return f"dense-{rate:g}"

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of all training runs."""
        experts = tuple(f"expert-{domain}" for domain in self.mixtures.experts)
        return ("seed", *experts, "bts", *map(self.dense_name, DENSE_RATES))

    def stages(self, *, built_in: bool) -> list[Stage]:
        """All stages in order; `built_in` corpora are made first."""
        stages = self.data_stages(built_in=built_in)
        stages += self.member_stages(tuple(stage.name for stage in stages), exclusive=True)
        experts = tuple(f"expert-{domain}" for domain in self.experts)
        stages.append(self._stitch(experts))
        for rate in DENSE_RATES:
            start = ("--checkpoint.init_from", self.run_dir("seed"), "--optimizer.lr", f"{rate:g}")
            stages.append(self.train(self.dense_name(rate), "dense", self.mixtures.stitch, ("seed",), *start))
        stages.append(self.soup_stage(experts))
        evaluations = [self._evaluate(name) for name in (*self.runs, "soup")]
        return [*stages, *evaluations, self._report(tuple(stage.name for stage in evaluations))]

    def _stitch(self, needs: tuple[str, ...]) -> Stage:
        experts = {domain: str(path) for domain, path in self.experts.items()}
        members = ("--bts.hub", self.run_dir("seed"), "--bts.experts", json.dumps(experts))
        return self.train("bts", "stitch", self.mixtures.stitch, needs, *members, exclusive=True)

    def _evaluate(self, model: str) -> Stage:
        data = [f"{domain}={self.prefix(domain, 'valid')}" for domain in self.domains]
        return self.stage(
            f"evaluate-{model}",
            f"evaluate {model}",
            "evaluate.py",
            *("--checkpoint", self.run_dir(model), "--json", self.losses(model)),
            *("--samples", str(VALID_WINDOWS), "--seq-length", str(self.config("seed").data.seq_length)),
            *("--data", *data),
            needs=(model,),
        )

    def _report(self, needs: tuple[str, ...]) -> Stage:
        return self.stage("report", "write the report", "report.py", "--run", self.out, needs=needs)


def open_quickstart(out: Path) -> Quickstart:
    """The quickstart whose settings `out` holds. Raises UserError when there are none."""
    path = out / SETTINGS
    if not path.exists():
        raise UserError(f"{out} holds no {SETTINGS}; run the quickstart with --out {out} first")
    settings = json.loads(path.read_text())
    named = {field: settings[field] for field in ("minutes", "seed", "vocab_size") if field in settings}
    return Quickstart(out, Path(settings["corpora"]), tuple(settings["domains"]), **named)
