"""The comparison's stages: one job in any combination of studies and for every preset; its ablations; its presets."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megabts.bts.model import BTSModel
from megabts.build import num_parameters
from megabts.config.load import load_config
from megabts.config.methods import BTSConfig
from megabts.config.model import ModelConfig
from megabts.errors import UsageError, UserError
from megabts.experiment.comparison import Comparison
from megabts.experiment.forms import placements
from megabts.experiment.methods import METHODS
from megabts.experiment.scale import parse_scale, preset_names, read_scale
from megabts.experiment.studies import all_stages
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh

STUDIES = ("ablations", "cross-capability", "changes")
NAMES = {
    *("seed", "expert-code", "expert-math", "expert-prose", "dense-data-matched", "dense-compute-matched", "soup"),
    *("btm", "expert-routing", "btx-top2", "btx-switch", "btx-soft", "btx-sample", "sparse-upcycling", "bam"),
    *("bam-adapters", "bts"),
}


PRESETS = ("1b", "small", "tiny")


def comparison(
    folder: Path, seed: int = 0, studies: tuple[str, ...] = (), minutes: float = 60, preset: str = "tiny"
) -> Comparison:
    domains, vocab_size = ("code", "math", "prose"), read_scale(preset).vocab_size
    paths = (folder / f"seed{seed}", folder / "corpora")
    return Comparison(*paths, domains, minutes, seed, vocab_size, preset=preset, studies=studies)


def of_preset(folder: Path, preset: str) -> Comparison:
    return comparison(folder, 0, STUDIES, read_scale(preset).minutes, preset)


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
    equal = {name: count for name, count in steps.items() if name in METHODS and name != "dense-compute-matched"}
    assert set(equal.values()) == {one.steps("stitch")}
    least = 3 * one.steps("expert") + 2 * one.steps("stitch")  # members alone run forward on 4 members: 4 x 2P of 6P
    assert least < steps["dense-compute-matched"] < least + one.steps("stitch")


def test_seeds_and_studies_may_be_added_but_not_minutes(tmp_path: Path) -> None:
    comparison(tmp_path).write_settings()
    comparison(tmp_path, studies=STUDIES).write_settings()
    with pytest.raises(UserError, match="minutes: 60 -> 30"):
        comparison(tmp_path, minutes=30).write_settings()
    assert json.loads((tmp_path / "seed0" / "experiment.json").read_text())["minutes"] == 60


def test_data_are_those_of_any_seeds(tmp_path: Path) -> None:
    def commands(*seeds: int) -> dict[str, list[str]]:
        stages = all_stages([comparison(tmp_path, seed, ("cross-capability",)) for seed in seeds], built_in=True)
        return {stage.name: stage.command for stage in stages if not stage.name.startswith("seed ")}

    assert commands(0) == commands(1, 2)


def test_what_tools_make_and_do_not_overwrite_is_told(tmp_path: Path) -> None:
    """Training goes on with its folder; what merge, upcycle and stitch make is made anew."""
    for stage in comparison(tmp_path, 0, STUDIES).stages():
        tool, arguments = Path(stage.command[1]).name, stage.command
        if tool == "train.py":
            assert stage.resumes
            assert stage.makes == Path(arguments[arguments.index("--checkpoint.dir") + 1])
        elif tool in ("merge.py", "upcycle.py", "stitch.py"):
            assert not stage.resumes
            assert stage.makes == Path(arguments[arguments.index("--out") + 1])
        else:
            assert tool == "evaluate.py"
            assert stage.makes is None


def test_presets_are_what_there_is() -> None:
    assert tuple(preset_names()) == PRESETS
    with pytest.raises(UsageError, match="--preset large is none of 1b, small, tiny"):
        read_scale("large")
    for text in ("minutes: 1", "[", "minutes: 0\nvocab_size: 1\ntokenizer_bytes: 1\nwindows: 1", ""):
        with pytest.raises(UsageError, match=r"x.yaml must give minutes, vocab_size, tokenizer_bytes, windows, each"):
            parse_scale(text, Path("x.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_commands_of_a_preset_are_runs_of_its_size(tmp_path: Path, preset: str) -> None:
    """All training commands, of all studies, parse and are whole; scale and configurations reach the commands."""
    one = of_preset(tmp_path, preset)
    stages = {stage.name: stage for stage in all_stages([one], built_in=True)}
    seed = load_config(stages["seed 0: seed"].command[2:])
    assert seed.model.vocab_size == read_scale(preset).vocab_size
    least = {"tiny": 2e6, "small": 1.2e8, "1b": 1e9}[preset]
    assert least < seed.model.num_parameters < 1.4 * least
    assert seed.data.seq_length == {"tiny": 256, "small": 1024, "1b": 4096}[preset] <= seed.model.max_seq_len
    methods = set()
    for stage in stages.values():
        arguments = stage.command[2:]
        if Path(stage.command[1]).name == "evaluate.py":
            assert arguments[arguments.index("--samples") + 1] == str(read_scale(preset).windows)
            assert arguments[arguments.index("--seq-length") + 1] == str(seed.data.seq_length)
        if Path(stage.command[1]).name != "train.py":
            continue
        config = load_config(arguments)
        methods.add(config.method)
        assert config.data.seq_length == seed.data.seq_length, stage.name
        assert config.precision.dtype == ("auto" if preset == "tiny" else "bfloat16")
        assert config.train.global_batch % config.train.micro_batch == 0
        assert config.train.steps == stage.total_steps > config.optimizer.warmup_steps
        if "matched" not in stage.name:
            kind = Path(arguments[arguments.index("--config") + 1]).stem
            assert config.train.steps == one.config(kind).train.steps
    assert methods == {"dense", "bts", "routing"}  # mixtures take their method from what they start from
    tokenizer = stages["tokenizer"].command
    assert tokenizer[tokenizer.index("--vocab-size") + 1] == str(read_scale(preset).vocab_size)
    assert tokenizer[tokenizer.index("--bytes-per-file") + 1] == str(read_scale(preset).tokenizer_bytes)


def test_the_shortest_runs_are_longer_than_their_warm_up(tmp_path: Path) -> None:
    for preset in PRESETS:
        one = comparison(tmp_path, minutes=0.001, preset=preset)
        for kind in ("seed", "expert", "dense", "moe", "routing", "stitch"):
            assert one.steps(kind) == one.config(kind).optimizer.warmup_steps + 2


def trained_by_form(one: Comparison) -> dict[str, int]:
    """Trained parameters of every stitched model, counted on one built without storage."""
    sizes = one.config("seed").model
    model = ModelConfig(hidden_size=sizes.hidden_size, num_layers=sizes.num_layers, num_heads=sizes.num_heads)
    backend = TorchBackend(torch.bfloat16, "meta", ParallelMesh().tp)
    found = {}
    for stage in one.stages():
        if stage.name in one.stitched:
            bts = load_config(stage.command[2:]).bts
            found[stage.name] = num_parameters(BTSModel(model, bts, backend))[0]
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_forms_beyond_the_paper_train_as_many_parameters(tmp_path: Path, preset: str) -> None:
    trained = trained_by_form(of_preset(tmp_path, preset))
    paper = trained["bts"]
    equal = ["bts, hub code", "bts, hub leaning", "bts, hub preserving", "bts, normalised gate input"]
    equal += ["bts, 3 x lr", "bts, 0.33 x lr", "bts, stream unchanged"]
    equal += ["bts, placed late", "bts, placed early"]
    low_rank = ["bts, low rank, K = 5", "bts, low rank, K = 6", "bts, low rank, token gates, K = L"]
    assert {name for name in trained if "low rank" in name} == set(low_rank)
    for name in (*equal, *low_rank):
        assert abs(trained[name] / paper - 1) < 0.02, name
    if preset == "tiny":
        assert [trained[name] for name in ("bts", *low_rank)] == [425_984, 425_472, 427_008, 427_520]


def test_the_papers_numbers_of_stitch_layers(tmp_path: Path) -> None:
    for preset, expected in {"tiny": {1, 2, 8}, "small": {1, 2, 10, 12}, "1b": {1, 2, 10, 16}}.items():
        forms = of_preset(tmp_path, preset).stitched
        settings = [form for name, form in forms.items() if name.startswith("bts, K = ")]
        assert {int(form["bts.num_stitch_layers"]) for form in settings} == expected
        assert all(set(form) == {"bts.num_stitch_layers"} for form in settings)


def test_late_and_early_places(tmp_path: Path) -> None:
    late = {"tiny": [5, 6, 7, 8], "small": [9, 10, 11, 12], "1b": [13, 14, 15, 16]}
    for preset, places in late.items():
        stages = {stage.name: stage.command[2:] for stage in of_preset(tmp_path, preset).stages()}
        assert load_config(stages["bts, placed late"]).bts.placement == places
        assert load_config(stages["bts, placed early"]).bts.placement == [1, 2, 3, places[-1]]


@pytest.mark.parametrize(("number", "expected"), [(1, {}), (8, {}), (7, {"late": [2, 3, 4, 5, 6, 7, 8]})])
def test_places_that_are_the_even_ones_are_no_ablation(number: int, expected: dict[str, list[int]]) -> None:
    assert placements(ModelConfig(num_layers=8), BTSConfig(num_stitch_layers=number)) == expected


def test_learning_rates_around_the_presets_own(tmp_path: Path) -> None:
    one = of_preset(tmp_path, "tiny")
    rates = {name: float(form["optimizer.lr"]) for name, form in one.stitched.items() if "optimizer.lr" in form}
    assert rates == pytest.approx({"bts, 3 x lr": 9e-3, "bts, 0.33 x lr": 1e-3})
