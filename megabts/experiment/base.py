"""What experiments on one machine have in common: a folder, corpora, and stages that prepare data and train.

Every stage is one command of `tools/` with its own log. Independent runs share the machine with one thread each: small
models gain little from more, and they need no communication.
"""

import json
import sys
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from megabts.config.load import load_config
from megabts.config.run import RunConfig
from megabts.errors import UserError
from megabts.experiment.recipe import SPLITS, Mixtures
from megabts.runtime.stages import Stage

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples" / "configs"
VOCAB_SIZE = 4096
TOKENIZER_BYTES = 2_000_000
"""Text of each domain that the tokenizer is trained on."""
SETTINGS = "experiment.json"


@dataclass(frozen=True)
class Experiment(ABC):
    """One experiment: where it is written, what it reads, how long and from which seed it trains."""

    out: Path
    corpora: Path
    domains: tuple[str, ...]
    minutes: float
    seed: int
    vocab_size: int = VOCAB_SIZE

    kind: ClassVar[str]
    """What people call it."""
    free: ClassVar[tuple[str, ...]] = ()
    """Settings that may change when an experiment is gone on with."""

    @property
    @abstractmethod
    def full_minutes(self) -> float:
        """What the step counts of the configurations are made for."""

    @property
    def tokenizer_bytes(self) -> int:
        """Text of each domain that the tokenizer is trained on."""
        return TOKENIZER_BYTES

    @property
    def configs(self) -> Path:
        """Folder of its configurations."""
        return CONFIGS / self.kind

    @property
    def data(self) -> Path:
        """Folder of what depends on corpora and vocabulary alone: tokenizer and datasets."""
        return self.out

    @property
    def corpora_seed(self) -> int:
        """Of the built-in corpora's generated problems."""
        return self.seed

    def write_settings(self) -> None:
        """Record the settings in `out`; raises UserError when it holds an experiment with others."""
        path = self.out / SETTINGS
        mine = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        mine = {key: str(v) if isinstance(v, Path) else v for key, v in mine.items()}
        if path.exists():
            before = json.loads(path.read_text())
            changes = [
                f"{key}: {before.get(key)} -> {value}"
                for key, value in mine.items()
                if key not in self.free and before.get(key) != value
            ]
            if changes:
                raise UserError(
                    f"{self.out} holds a {self.kind} with other settings ({'; '.join(changes)}); "
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

    @property
    def experts(self) -> dict[str, Path]:
        """Folders of the experts, by domain."""
        return {domain: self.run_dir(f"expert-{domain}") for domain in self.mixtures.experts}

    def losses(self, model: str) -> Path:
        """File with a model's losses per domain."""
        return self.out / "losses" / f"{model}.json"

    def prefix(self, domain: str, split: str) -> Path:
        """Indexed dataset of a domain's split."""
        return self.data / "data" / f"{domain}_{split}_text_document"

    def config(self, kind: str) -> RunConfig:
        """The configuration of a kind of run, as its file has it."""
        return _config(self.configs / f"{kind}.yaml")

    def steps(self, kind: str) -> int:
        """Training steps of a kind of run: the configuration's, scaled by the minutes, but more than its warm-up."""
        config = self.config(kind)
        scaled = round(config.train.steps * self.minutes / self.full_minutes)
        return max(config.optimizer.warmup_steps + 2, scaled)

    def stage(self, name: str, title: str, tool: str, *arguments: str | Path, **options: object) -> Stage:
        """A command of `tools/` of its own."""
        return _stage(self.out, name, title, tool, *arguments, **options)

    def data_stages(self, *, built_in: bool) -> list[Stage]:
        """Tokenizer and datasets; `built_in` corpora are made first."""
        needs: tuple[str, ...] = ()
        stages = []
        if built_in:
            arguments = ("--out", self.corpora, "--seed", str(self.corpora_seed))
            stages.append(data_stage(self, "corpora", "build the corpora", "build_corpora.py", *arguments))
            needs = ("corpora",)
        train: list[str | Path] = [self._file(domain, "train") for domain in self.domains]
        tokenizer = data_stage(
            self,
            "tokenizer",
            "train the tokenizer",
            "train_tokenizer.py",
            *("--type", "sentencepiece-bpe", "--output", self.data / "tokenizer"),
            *("--input", *train),
            *("--vocab-size", str(self.vocab_size), "--bytes-per-file", str(self.tokenizer_bytes)),
            needs=needs,
        )
        return [*stages, tokenizer, *self._preprocess_stages()]

    def _file(self, domain: str, split: str) -> Path:
        plain = self.corpora / domain / f"{split}.jsonl"
        return plain if plain.exists() else plain.with_suffix(".jsonl.gz")

    def _preprocess_stages(self) -> list[Stage]:
        return [
            preprocess_stage(self, domain, split, self._file(domain, split), ("tokenizer",))
            for domain in self.domains
            for split in SPLITS
        ]

    def train(
        self,
        name: str,
        kind: str,
        mixture: dict[str, float],
        needs: tuple[str, ...],
        *overrides: str | Path,
        steps: int | None = None,
        exclusive: bool = False,
    ) -> Stage:
        """A training run of a kind (a configuration), on a mixture of domains."""
        data = {str(self.prefix(domain, "train")): weight for domain, weight in mixture.items()}
        valid = {domain: str(self.prefix(domain, "valid")) for domain in self.domains}
        run_dir, steps = self.run_dir(name), steps or self.steps(kind)
        return self.stage(
            name,
            f"train {name}",
            "train.py",
            *("--config", self.configs / f"{kind}.yaml"),
            *("--checkpoint.dir", run_dir, "--checkpoint.resume", "true"),
            *("--data.train", json.dumps(data), "--data.valid", json.dumps(valid)),
            *("--data.tokenizer", self.data / "tokenizer", "--data.seed", str(1234 + self.seed)),
            *("--train.seed", str(self.seed), "--train.steps", str(steps)),
            *overrides,
            needs=needs,
            metrics=run_dir,
            total_steps=steps,
            makes=run_dir,
            resumes=True,
            exclusive=exclusive,
        )

    def member_stages(self, needs: tuple[str, ...], *, exclusive: bool) -> list[Stage]:
        """The seed and, branched from it, its experts."""
        vocabulary = ("--model.vocab_size", str(self.vocab_size))
        stages = [self.train("seed", "seed", self.mixtures.seed, needs, *vocabulary, exclusive=exclusive)]
        for domain in self.mixtures.experts:
            start = ("--checkpoint.init_from", self.run_dir("seed"))
            stages.append(self.train(f"expert-{domain}", "expert", self.mixtures.expert(domain), ("seed",), *start))
        return stages

    def soup_stage(self, needs: tuple[str, ...]) -> Stage:
        """The average of all members."""
        members = [self.run_dir("seed"), *self.experts.values()]
        arguments: list[str | Path] = [item for member in members for item in ("--member", member)]
        out = self.run_dir("soup")
        arguments += ["--out", out]
        return self.stage("soup", "average the members", "merge.py", "soup", *arguments, needs=needs, makes=out)


def data_stage(
    experiment: Experiment, name: str, title: str, tool: str, *arguments: str | Path, **options: object
) -> Stage:
    """A command whose result is of the data alone."""
    return _stage(experiment.data, name, title, tool, *arguments, **options)


def preprocess_stage(experiment: Experiment, domain: str, split: str, file: Path, needs: tuple[str, ...]) -> Stage:
    """A domain's split, tokenized."""
    return data_stage(
        experiment,
        f"data-{domain}-{split}",
        f"tokenize {domain} {split}",
        "preprocess_data.py",
        *("--input", file, "--output-prefix", str(experiment.prefix(domain, split)).removesuffix("_text_document")),
        *("--tokenizer", experiment.data / "tokenizer", "--append-eod", "--workers", "1"),
        needs=needs,
    )


def _stage(out: Path, name: str, title: str, tool: str, *arguments: str | Path, **options: object) -> Stage:
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    done, log = out / "done" / f"{name}.json", out / "logs" / f"{name}.log"
    return Stage(name, title, command, done, log=log, **options)  # type: ignore[arg-type]


@cache
def _config(path: Path) -> RunConfig:
    return load_config(["--config", str(path)])
