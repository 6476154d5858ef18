"""The quickstart: mixtures, stages, claims, and the whole of it on a few pages of text."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megabts.errors import UserError
from megabts.experiment.quickstart import DENSE_RATES, Quickstart, open_quickstart
from megabts.experiment.recipe import Mixtures, find_corpora
from megabts.experiment.results import checks, oracle_average

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]


def write_corpora(folder: Path, domains: dict[str, str]) -> Path:
    """Domains of generated sentences over each domain's own words."""
    rng = random.Random(0)
    for domain, words in domains.items():
        (folder / domain).mkdir(parents=True)
        for split, documents in (("train", 60), ("valid", 12)):
            with gzip.open(folder / domain / f"{split}.jsonl.gz", "wt") as file:
                for _ in range(documents):
                    text = " ".join(rng.choices(words.split(), k=200))
                    file.write(json.dumps({"text": text}) + "\n")
    return folder


WORDS = {
    "general": "the day was long and no one came to see what the river had left upon the old stones by night",
    "law": "whereas hereby the party of first part shall indemnify plaintiff tort statute clause section appeal",
    "song": "la dee dum hey ho sing again chorus refrain baby love tonight moon june tune drum beat dance",
}


def test_mixtures_with_general() -> None:
    mixtures = Mixtures(("general", "code", "math", "multilingual"))
    assert mixtures.experts == ("code", "math", "multilingual")
    assert mixtures.seed == pytest.approx({"general": 0.7, "code": 0.1, "math": 0.1, "multilingual": 0.1})
    assert mixtures.stitch == pytest.approx({"general": 0.55, "code": 0.15, "math": 0.15, "multilingual": 0.15})
    assert mixtures.expert("code") == pytest.approx({"code": 0.9, "general": 0.1})


def test_mixtures_without_general() -> None:
    mixtures = Mixtures(("code", "math", "prose"))
    assert mixtures.experts == ("code", "math", "prose")
    assert mixtures.seed == mixtures.stitch == pytest.approx(dict.fromkeys(mixtures.domains, 1 / 3))
    assert mixtures.expert("math") == pytest.approx({"math": 0.9, "code": 0.05, "prose": 0.05})


def test_find_corpora(tmp_path: Path) -> None:
    found = find_corpora(write_corpora(tmp_path / "c", WORDS))
    assert list(found) == ["general", "law", "song"]
    (tmp_path / "c" / "law" / "valid.jsonl.gz").unlink()
    with pytest.raises(UserError, match=r"law must hold exactly one of valid.jsonl and valid.jsonl.gz"):
        find_corpora(tmp_path / "c")
    with pytest.raises(UserError, match="there is no folder"):
        find_corpora(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="at least two"):
        find_corpora(tmp_path / "empty")


def test_stages_form_one_job(tmp_path: Path) -> None:
    quickstart = Quickstart(tmp_path, tmp_path / "corpora", ("code", "math", "prose"), 12, 0)
    stages = quickstart.stages(built_in=True)
    before: set[str] = set()
    for stage in stages:
        assert before.issuperset(stage.needs), stage.name
        before.add(stage.name)
    assert stages[-1].name == "report"
    assert len(DENSE_RATES) >= 3
    assert {f"evaluate-{name}" for name in (*quickstart.runs, "soup")} < before
    half = Quickstart(tmp_path, tmp_path / "corpora", ("code", "math", "prose"), 6, 0)
    assert half.steps("seed") == round(quickstart.steps("seed") / 2)


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    Quickstart(tmp_path, tmp_path / "corpora", ("a", "b"), 12, 0).write_settings()
    assert open_quickstart(tmp_path).domains == ("a", "b")
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        Quickstart(tmp_path, tmp_path / "corpora", ("a", "b"), 12, 1).write_settings()


def test_claims() -> None:
    models = {
        "seed": {"a": 4.0, "b": 4.0, "average": 4.0},
        "expert-a": {"a": 3.0, "b": 5.0, "average": 4.0},
        "expert-b": {"a": 5.0, "b": 3.8, "average": 4.4},
        "soup": {"a": 3.9, "b": 3.9, "average": 3.9},
        "bts": {"a": 3.1, "b": 3.9, "average": 3.5},
    }
    domains = ("a", "b")
    assert oracle_average(models, domains, domains) == pytest.approx(3.4)
    held = {claim: holds for claim, holds, _ in checks(models, domains, domains)}
    assert [claim for claim, holds in held.items() if not holds] == [
        "The b expert's loss on its domain is at most 0.93 of the seed's"
    ]


def test_whole_quickstart(tmp_path: Path) -> None:
    """On tiny corpora with the shortest runs: every stage, the results' schema, and a second call that keeps all."""
    corpora = write_corpora(tmp_path / "corpora", WORDS)
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tools/quickstart.py"), "--data", str(corpora), "--out", str(out)]
    command += ["--minutes", "0.1", "--vocab-size", "300"]
    first = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert first.returncode == 0, first.stdout + first.stderr

    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"domains", "models", "seconds", "tokens"}
    assert results["domains"] == ["general", "law", "song"]
    assert list(results["models"]) == ["seed", "expert-law", "expert-song", "soup", "dense-data-matched", "bts"]
    for losses in results["models"].values():
        assert set(losses) == {"general", "law", "song", "average"}
        assert losses["average"] == pytest.approx(sum(losses[d] for d in results["domains"]) / 3)
    assert results["tokens"]["seed"] > 0
    assert results["seconds"]["bts"] > 0
    page = (out / "report.html").read_text()
    assert "dense-data-matched" in page
    assert "Experts-into-Hub" in page

    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0
    assert again.stdout.count("kept") >= len(results["seconds"])
    assert json.loads((out / "results.json").read_text()) == results
