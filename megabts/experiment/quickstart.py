"""The whole of BTS as a list of stages, each one command of `tools/` with its own log.

Independent runs share the machine with one thread each: small models gain little from more, and experts need no
communication. The seed, on which all else waits, and the stitches, for which all else is done, have all threads.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from megabts.config.load import load_config
from megabts.config.run import RunConfig
from megabts.errors import UserError
from megabts.experiment.recipe import SPLITS, Mixtures
from megabts.runtime.stages import Stage

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples" / "configs" / "quickstart"
MINUTES = 12
"""What the step counts of the configurations are made for, on two cores."""
VOCAB_SIZE = 4096
TOKENIZER_BYTES = 2_000_000
"""Text of each domain that the tokenizer is trained on."""
DENSE_RATES = (1e-3, 3e-3, 1e-2)
"""Learning rates tried for the dense model trained on the stitches' data."""
VALID_WINDOWS = 200
"""Windows per domain that the final losses are measured on."""
SETTINGS = "experiment.json"


@dataclass(frozen=True)
class Quickstart:
    """One quickstart: where it is written, what it reads, how long and from which seed it trains."""

    out: Path
    corpora: Path
    domains: tuple[str, ...]
    minutes: float
    seed: int
    vocab_size: int = VOCAB_SIZE

    def write_settings(self) -> None:
        """Record the settings in `out`; raises UserError when it holds a quickstart with others."""
        path = self.out / SETTINGS
        mine = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        mine = {key: str(v) if isinstance(v, Path) else v for key, v in mine.items()}
        if path.exists():
            before = json.loads(path.read_text())
            changes = [
                f"{key}: {before.get(key)} -> {value}" for key, value in mine.items() if before.get(key) != value
            ]
            if changes:
                raise UserError(
                    f"{self.out} holds a quickstart with other settings ({'; '.join(changes)}); "
                    "give another --out, or remove it"
                )
        self.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(mine, indent=2) + "\n")

    @property
    def mixtures(self) -> Mixtures:
        """Domain weights of each training run."""
        return Mixtures(self.domains)

    def run_dir(self, run: str) -> Path:
        """Folder of a training run or merged model."""
        return self.out / "models" / run

    def losses(self, model: str) -> Path:
        """File with a model's losses per domain."""
        return self.out / "losses" / f"{model}.json"

    def prefix(self, domain: str, split: str) -> Path:
        """Indexed dataset of a domain's split."""
        return self.out / "data" / f"{domain}_{split}_text_document"

    def dense_name(self, rate: float) -> str:
        """Name of the dense run at a learning rate."""
        return f"dense-{rate:g}"

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of all training runs."""
        experts = tuple(f"expert-{domain}" for domain in self.mixtures.experts)
        return ("seed", *experts, "bts", *map(self.dense_name, DENSE_RATES))

    def steps(self, kind: str) -> int:
        """Training steps of a seed, expert, dense or stitch run: the configuration's, scaled by the minutes."""
        return max(20, round(_config(kind).train.steps * self.minutes / MINUTES))

    def stages(self, *, built_in: bool) -> list[Stage]:
        """All stages in order; `built_in` corpora are made first."""
        stages = [self._corpora()] if built_in else []
        stages += self._data_stages(("corpora",) if built_in else ())
        tokenized = tuple(stage.name for stage in stages)
        stages.append(self._train("seed", "seed", self.mixtures.seed, tokenized, exclusive=True))
        experts = []
        for domain in self.mixtures.experts:
            stage = self._train(f"expert-{domain}", "expert", self.mixtures.expert(domain), ("seed",))
            experts.append(stage)
        stages += [*experts, self._stitch(tuple(stage.name for stage in experts))]
        for rate in DENSE_RATES:
            name = self.dense_name(rate)
            stages.append(self._train(name, "dense", self.mixtures.stitch, ("seed",), "--optimizer.lr", f"{rate:g}"))
        stages.append(self._soup(tuple(stage.name for stage in experts)))
        evaluations = [self._evaluate(name) for name in (*self.runs, "soup")]
        return [*stages, *evaluations, self._report(tuple(stage.name for stage in evaluations))]

    def _stage(self, name: str, title: str, tool: str, *arguments: str | Path, **options: object) -> Stage:
        command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
        done, log = self.out / "done" / f"{name}.json", self.out / "logs" / f"{name}.log"
        return Stage(name, title, command, done, log=log, **options)  # type: ignore[arg-type]

    def _corpora(self) -> Stage:
        return self._stage(
            "corpora", "build the corpora", "build_corpora.py", "--out", self.corpora, "--seed", str(self.seed)
        )

    def _file(self, domain: str, split: str) -> Path:
        plain = self.corpora / domain / f"{split}.jsonl"
        return plain if plain.exists() else plain.with_suffix(".jsonl.gz")

    def _data_stages(self, needs: tuple[str, ...]) -> list[Stage]:
        train: list[str | Path] = [self._file(domain, "train") for domain in self.domains]
        stage = self._stage(
            "tokenizer",
            "train the tokenizer",
            "train_tokenizer.py",
            *("--type", "sentencepiece-bpe", "--output", self.out / "tokenizer"),
            *("--input", *train),
            *("--vocab-size", str(self.vocab_size), "--bytes-per-file", str(TOKENIZER_BYTES)),
            needs=needs,
        )
        return [stage, *(self._preprocess(domain, split) for domain in self.domains for split in SPLITS)]

    def _preprocess(self, domain: str, split: str) -> Stage:
        prefix = str(self.prefix(domain, split)).removesuffix("_text_document")
        return self._stage(
            f"data-{domain}-{split}",
            f"tokenize {domain} {split}",
            "preprocess_data.py",
            *("--input", self._file(domain, split), "--output-prefix", prefix),
            *("--tokenizer", self.out / "tokenizer", "--append-eod", "--workers", "1"),
            needs=("tokenizer",),
        )

    def _train(
        self,
        name: str,
        kind: str,
        mixture: dict[str, float],
        needs: tuple[str, ...],
        *overrides: str,
        exclusive: bool = False,
    ) -> Stage:
        train = {str(self.prefix(domain, "train")): weight for domain, weight in mixture.items()}
        valid = {domain: str(self.prefix(domain, "valid")) for domain in self.domains}
        run_dir, steps = self.run_dir(name), self.steps(kind)
        start: tuple[str | Path, ...] = ()
        if kind == "seed":
            start = ("--model.vocab_size", str(self.vocab_size))
        elif kind in ("expert", "dense"):
            start = ("--checkpoint.init_from", self.run_dir("seed"))
        return self._stage(
            name,
            f"train {name}",
            "train.py",
            *("--config", CONFIGS / f"{kind}.yaml"),
            *("--checkpoint.dir", run_dir, "--checkpoint.resume", "true", *start),
            *("--data.train", json.dumps(train), "--data.valid", json.dumps(valid)),
            *("--data.tokenizer", self.out / "tokenizer", "--data.seed", str(1234 + self.seed)),
            *("--train.seed", str(self.seed), "--train.steps", str(steps)),
            *overrides,
            needs=needs,
            metrics=run_dir,
            total_steps=steps,
            exclusive=exclusive,
        )

    def _stitch(self, needs: tuple[str, ...]) -> Stage:
        experts = {domain: str(self.run_dir(f"expert-{domain}")) for domain in self.mixtures.experts}
        members = ("--bts.hub", str(self.run_dir("seed")), "--bts.experts", json.dumps(experts))
        return self._train("bts", "stitch", self.mixtures.stitch, needs, *members, exclusive=True)

    def _soup(self, needs: tuple[str, ...]) -> Stage:
        members = [self.run_dir(name) for name in ("seed", *needs)]
        arguments = [item for member in members for item in ("--member", member)]
        out = self.run_dir("soup")
        return self._stage("soup", "average the members", "merge.py", "soup", *arguments, "--out", out, needs=needs)

    def _evaluate(self, model: str) -> Stage:
        data = [f"{domain}={self.prefix(domain, 'valid')}" for domain in self.domains]
        return self._stage(
            f"evaluate-{model}",
            f"evaluate {model}",
            "evaluate.py",
            *("--checkpoint", self.run_dir(model), "--json", self.losses(model)),
            *("--samples", str(VALID_WINDOWS), "--seq-length", str(_config("seed").data.seq_length)),
            *("--data", *data),
            needs=(model,),
        )

    def _report(self, needs: tuple[str, ...]) -> Stage:
        return self._stage("report", "write the report", "report.py", "--run", self.out, needs=needs)


def _config(kind: str) -> RunConfig:
    return load_config(["--config", str(CONFIGS / f"{kind}.yaml")])


def open_quickstart(out: Path) -> Quickstart:
    """The quickstart whose settings `out` holds. Raises UserError when there are none."""
    path = out / SETTINGS
    if not path.exists():
        raise UserError(f"{out} holds no {SETTINGS}; run the quickstart with --out {out} first")
    settings = json.loads(path.read_text())
    named = {field: settings[field] for field in ("minutes", "seed", "vocab_size") if field in settings}
    return Quickstart(out, Path(settings["corpora"]), tuple(settings["domains"]), **named)
