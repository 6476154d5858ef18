"""The comparison's stages: one job in any combination of studies; a whole one on tiny corpora in the slow part."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megabts.errors import UserError
from megabts.experiment.comparison import Comparison
from megabts.experiment.studies import all_stages

STUDIES = ("ablations", "cross-capability", "changes")
NAMES = {
    *("seed", "expert-code", "expert-math", "expert-prose", "dense-data-matched", "dense-compute-matched", "soup"),
    *("btm", "expert-routing", "btx-top2", "btx-switch", "btx-soft", "btx-sample", "sparse-upcycling", "bam"),
    *("bam-adapters", "bts"),
}


def comparison(folder: Path, seed: int = 0, studies: tuple[str, ...] = (), minutes: float = 60) -> Comparison:
    return Comparison(
        folder / f"seed{seed}", folder / "corpora", ("code", "math", "prose"), minutes, seed, studies=studies
    )


@pytest.mark.parametrize("studies", [(), *((study,) for study in STUDIES), STUDIES])
def test_stages_form_one_job(tmp_path: Path, studies: tuple[str, ...]) -> None:
    stages = all_stages([comparison(tmp_path, seed, studies) for seed in (0, 1)], built_in=True)
    before: set[str] = set()
    for stage in stages:
        assert before.issuperset(stage.needs), stage.name
        assert stage.name not in before
        before.add(stage.name)
    for seed in (0, 1):
        assert {f"seed {seed}: evaluate-{name}" for name in NAMES} < before
    assert len({stage.done for stage in stages}) == len(stages)


def test_studies_change_no_stage_that_is_there_without_them(tmp_path: Path) -> None:
    plain = {stage.name: stage for stage in all_stages([comparison(tmp_path)], built_in=True)}
    more = {stage.name: stage for stage in all_stages([comparison(tmp_path, 0, STUDIES)], built_in=True)}
    assert plain.items() < more.items()


def test_some_methods_need_only_their_stages(tmp_path: Path) -> None:
    some = replace(comparison(tmp_path), methods=("btm", "bts"))
    runs = {stage.name for stage in some.stages() if not stage.name.startswith("evaluate-")}
    assert runs == {"seed", "expert-code", "expert-math", "expert-prose", "btm", "bts"}
    commands = {stage.name: stage.command for stage in comparison(tmp_path).stages()}
    assert all(commands[stage.name] == stage.command for stage in some.stages())


def test_methods_train_on_equal_tokens_but_the_compute_matched(tmp_path: Path) -> None:
    """The operations by hand: an expert's step costs a dense one's, a stitched step bts_flops / dense_flops of it."""
    one = comparison(tmp_path)
    steps = {}
    for stage in one.stages():
        if "--train.steps" in stage.command:
            steps[stage.name] = int(stage.command[stage.command.index("--train.steps") + 1])
    equal = {name: count for name, count in steps.items() if name in one.trained and name != "dense-compute-matched"}
    assert set(equal.values()) == {one.steps("stitch")}
    least = 3 * one.steps("expert") + 2 * one.steps("stitch")  # members alone run forward on 4 members: 4 x 2P of 6P
    assert least < steps["dense-compute-matched"] < least + one.steps("stitch")


def test_seeds_and_studies_may_be_added_but_not_minutes(tmp_path: Path) -> None:
    comparison(tmp_path).write_settings()
    comparison(tmp_path, studies=STUDIES).write_settings()
    with pytest.raises(UserError, match="minutes: 60 -> 30"):
        comparison(tmp_path, minutes=30).write_settings()
    assert json.loads((tmp_path / "seed0" / "experiment.json").read_text())["minutes"] == 60
