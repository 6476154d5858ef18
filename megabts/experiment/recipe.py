"""What experiments train on what, for any set of domains.

With a domain called `general` the seed's mixture is 70% of it and the stitches' 55%, the other domains sharing the rest
(the BTS paper's stitch mixture, arXiv 2502.00075, section 4), and every other domain gets an expert. Without one the
domains count alike and each gets an expert. An expert's mixture is 90% its own domain and 10% `general`, or the others.
"""

from dataclasses import dataclass
from pathlib import Path

from megabts.errors import UserError

GENERAL = "general"
SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Mixtures:
    """Domain weights of each training run."""

    domains: tuple[str, ...]

    @property
    def experts(self) -> tuple[str, ...]:
        """Domains that get an expert."""
        return tuple(domain for domain in self.domains if domain != GENERAL)

    @property
    def seed(self) -> dict[str, float]:
        """The seed's mixture."""
        return self._mixture(0.70)

    @property
    def stitch(self) -> dict[str, float]:
        """The mixture of the stitches, and of the dense runs."""
        return self._mixture(0.55)

    def expert(self, domain: str) -> dict[str, float]:
        """The mixture of one expert."""
        others = [GENERAL] if GENERAL in self.domains else [other for other in self.domains if other != domain]
        return {domain: 0.9} | {other: 0.1 / len(others) for other in others}

    def _mixture(self, general: float) -> dict[str, float]:
        if GENERAL not in self.domains:
            return {domain: 1 / len(self.domains) for domain in self.domains}
        rest = (1 - general) / len(self.experts)
        return {domain: general if domain == GENERAL else rest for domain in self.domains}


def find_corpora(data: Path) -> dict[str, dict[str, Path]]:
    """{domain: {split: file}} of `data`/<domain>/{train,valid}.jsonl[.gz], `general` first.

    Raises UserError when a split is missing, or there are fewer than two domains.
    """
    if not data.is_dir():
        raise UserError(f"there is no folder {data}; --data takes a folder of DOMAIN/train.jsonl[.gz] and valid")
    corpora = {}
    folders = sorted(path for path in data.iterdir() if path.is_dir() and not path.name.startswith("."))
    for folder in sorted(folders, key=lambda path: path.name != GENERAL):
        files = {}
        for split in SPLITS:
            found = [folder / f"{split}.jsonl{end}" for end in ("", ".gz") if (folder / f"{split}.jsonl{end}").exists()]
            if len(found) != 1:
                raise UserError(f"{folder} must hold exactly one of {split}.jsonl and {split}.jsonl.gz")
            files[split] = found[0]
        corpora[folder.name] = files
    if len(corpora) < 2:
        raise UserError(f"{data} holds {len(corpora)} domain folders; at least two are needed to have experts")
    return corpora
