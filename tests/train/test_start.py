"""How runs begin: from other weights, or not at all, with one line that says why."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megabts import assemble
from megabts.build import load_model
from megabts.config.load import explicit_keys, load_config
from megabts.config.methods import BTSConfig
from megabts.config.run import ParallelConfig, RunConfig
from megabts.errors import UsageError, UserError
from megabts.parallel.mesh import ParallelMesh
from megabts.runtime.device import Launch
from megabts.runtime.metrics import read_metrics
from megabts.train.setup import adopt_sizes, open_start, start_ranks
from tests.train.runs import BTS_SETTINGS, MEMBERS, SETTINGS, SIZES, arguments, build, error_lines, shell, train

Blend = dict[str, float]
NO_SIZES = {name: value for name, value in SETTINGS.items() if not name.startswith(("model.", "data.tokenizer"))}


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory, blend: Blend) -> Path:
    """A finished run of 3 steps, with documents kept apart."""
    run_dir = tmp_path_factory.mktemp("seed") / "run"
    assert train(arguments(run_dir, blend, train__steps=3, model__cross_document_attention=False)) == 0
    return run_dir


def adopted(args: list[str]) -> RunConfig:
    config = load_config(args)
    return adopt_sizes(config, explicit_keys(args), open_start(config, ParallelMesh()))


def test_weights_alone_are_taken(seed: Path, blend: Blend, tmp_path: Path) -> None:
    args = arguments(tmp_path / "run", blend, NO_SIZES, checkpoint__init_from=seed, train__steps=4)
    run = build(args)
    saved = load_file(seed / "step_00000003/model.safetensors")
    assert all(torch.equal(p, saved[name]) for name, p, _ in run.model.own_parameters())
    assert {name: getattr(run.config.model, name) for name in SIZES} == SIZES
    assert run.config.model.cross_document_attention is False
    assert run.tokenizer is not None
    assert run.tokenizer.name == "bytes"
    assert all(not value.any() for kind, _, _, value in run.optimizer.shards() if kind != "master")
    assert train(args) == 0
    rows = read_metrics(tmp_path / "run")[0]
    assert [(row["step"], row["consumed_samples"]) for row in rows] == [(n, 4 * n) for n in range(1, 5)]
    assert rows[0]["loss"] < read_metrics(seed)[0][0]["loss"] - 0.3


def test_settings_that_contradict_the_weights_are_refused(seed: Path, blend: Blend) -> None:
    base = {**NO_SIZES, "checkpoint.init_from": seed}
    with pytest.raises(UsageError, match=r"model.hidden_size is 64, but the weights in .* have 32; leave it out"):
        adopted(arguments("", blend, base, model__hidden_size=64))
    with pytest.raises(UsageError, match=r"method is bts, but .* holds a model of method dense"):
        adopted(arguments("", blend, base, method="bts"))
    free = adopted(arguments("", blend, base, model__hidden_size=32, model__cross_document_attention=True))
    assert free.model.cross_document_attention is True


def test_from_a_hugging_face_folder(data: Path, tmp_path: Path) -> None:
    ids = {str(data / "ids"): 1.0}
    more = {"checkpoint__init_from": MEMBERS / "hub", "data__tokenizer": "null:97", "train__steps": 2}
    args = arguments(tmp_path / "run", ids, NO_SIZES, **more)
    run = build(args)
    original = load_file(MEMBERS / "hub/model.safetensors")
    weights = {name: p for name, p, _ in run.model.own_parameters()}
    assert run.config.model.vocab_size == 97
    assert torch.equal(weights["embedding.weight"], original["model.embed_tokens.weight"])
    assert torch.equal(weights["head.weight"], original["lm_head.weight"])
    assert train(args) == 0
    assert load_model(tmp_path / "run", ParallelMesh(), None, "cpu").config.model.num_layers == 8


def test_stitches_go_on_from_stitches(data: Path, tmp_path: Path) -> None:
    ids = {str(data / "ids"): 1.0}
    assert train(arguments(tmp_path / "first", ids, BTS_SETTINGS, train__steps=3, bts__start="hub_leaning")) == 0
    base = {**NO_SIZES, "data.tokenizer": "null:97", "checkpoint.init_from": tmp_path / "first"}
    config = adopted(arguments("", ids, base))
    assert (config.method, config.bts.start, config.bts.gate_dropout) == ("bts", "hub_leaning", 0.1)
    config = adopted(arguments("", ids, base, bts__gate_dropout=0.3, bts__trainable='["math"]'))
    assert (config.bts.gate_dropout, config.bts.trainable) == (0.3, ["math"])
    with pytest.raises(UsageError, match=r"bts.start is uniform, but the weights in .* have hub_leaning"):
        adopted(arguments("", ids, base, bts__start="uniform"))

    args = arguments(tmp_path / "second", ids, base, bts__trainable='["math"]', train__steps=2)
    assert train(args) == 0
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("first/step_00000003", "second/step_00000002")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.split(".")[3:4] == ["math"]}


def test_a_bts_model_gets_sizes_and_tokenizer_from_its_hub(seed: Path, blend: Blend, tmp_path: Path) -> None:
    other = arguments(tmp_path / "other", blend, train__seed=1, train__steps=1, model__cross_document_attention=False)
    assert train(other) == 0
    settings = {"method": "bts", "bts.hub": seed, "bts.experts": json.dumps({"b": str(tmp_path / "other")})}
    config = adopted(arguments("", blend, {**NO_SIZES, **settings}))
    assert {name: getattr(config.model, name) for name in SIZES} == SIZES
    assert config.data.tokenizer == str(seed / "step_00000003/tokenizer")


@pytest.fixture
def stitched(data: Path, tmp_path: Path) -> list[str]:
    """Arguments that start from a BTS checkpoint whose members are this test's own copies."""
    shutil.copytree(MEMBERS, tmp_path / "members")
    members = {name: str(tmp_path / "members" / name) for name in ("hub", "code", "math")}
    ids = {str(data / "ids"): 1.0}
    settings = {"bts__hub": members.pop("hub"), "bts__experts": json.dumps(members), "train__steps": 1}
    assert train(arguments(tmp_path / "bts", ids, BTS_SETTINGS, **settings)) == 0
    base = {**NO_SIZES, "data.tokenizer": "null:97", "checkpoint.init_from": tmp_path / "bts"}
    return arguments("", ids, base)


def test_a_member_that_moved_is_missed(stitched: list[str], tmp_path: Path) -> None:
    (tmp_path / "members/code").rename(tmp_path / "members/old")
    with pytest.raises(UserError, match=r"member 'code' of .* is not at .*/members/code any more; move it back, or"):
        train(stitched)


def test_a_member_that_changed_is_refused(stitched: list[str], tmp_path: Path) -> None:
    path = tmp_path / "members/code/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"member 'code' of .* has changed: .* has content \w{12}, recorded was \w{12}"):
        train(stitched)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no data": ({"data__train": "{}"}, "data.train names no dataset; give data.train '{PREFIX: WEIGHT}'"),
    "missing data": ({"data__train": '{"/nowhere/a": 1}'}, "dataset /nowhere/a: there is no file /nowhere/a.idx"),
    "tokenizer": ({"data__tokenizer": "null:257"}, "was tokenized with bytes"),
    "vocabulary": ({"model__vocab_size": 200}, "data was tokenized with a vocabulary of 257, model.vocab_size is 200"),
    "batch": ({"train__micro_batch": 3}, "train.global_batch 4 is not a multiple of train.micro_batch 3 x 1"),
    "no source": ({"checkpoint__init_from": "/nowhere"}, "there is no folder /nowhere; give a checkpoint, a run"),
    "no tokenizer": ({"data__tokenizer": "/nowhere/t.model"}, "tokenizer /nowhere/t.model does not exist"),
    "no members": ({"method": "bts"}, "method bts needs bts.hub DIR and at least one bts.experts.NAME DIR"),
    "pattern": ({"optimizer__lr_scale": '{"hed.*": 0}'}, "optimizer.lr_scale pattern 'hed.*' matches no parameter"),
    "folder": ({"checkpoint__dir": "/dev/null/run"}, "cannot lock the run folder: /dev/null/run/.lock"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_trained_is_one_line(case: str, blend: Blend, tmp_path: Path) -> None:
    more, message = BAD[case]
    with pytest.raises(UserError) as caught:
        train(arguments(tmp_path / "run", blend, **more))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").glob("step_*"))


def test_degrees_that_do_not_fit_are_refused_before_the_ranks_meet() -> None:
    config = RunConfig(parallel=ParallelConfig(tensor=3))
    with pytest.raises(UsageError, match=r"= 3 does not divide the 2 ranks"):
        start_ranks(config, Launch(rank=1, world_size=2, local_rank=1))


@pytest.mark.parametrize(
    "extra, code, message",
    [
        (["--train.stepps", "3"], 2, "error: unknown key train.stepps (command line); did you mean train.steps?"),
        (["--data.train", '{"/nowhere/a": 1}'], 1, "error: dataset /nowhere/a: there is no file /nowhere/a.idx"),
        (
            ["--precision.layers", "te"],
            2,
            "error: precision.layers te needs an NVIDIA GPU, and this run is on cpu; set it to torch",
        ),
    ],
    ids=["usage", "input", "library"],
)
def test_in_the_shell_an_error_is_one_line(
    extra: list[str], code: int, message: str, blend: Blend, tmp_path: Path
) -> None:
    done = shell("train.py", [*arguments(tmp_path / "run", blend), *extra])
    assert (done.returncode, done.stderr) == (code, message + "\n")
    assert error_lines(done.stderr) == [message]


def test_a_start_refuses_experts_it_does_not_have(data: Path, tmp_path: Path) -> None:
    """Members of a stitched start are its own: naming them again is fine, another one would be ignored in silence."""
    ids = {str(data / "ids"): 1.0}
    experts = {name: str(MEMBERS / name) for name in ("code", "math")}
    assemble.stitch(BTSConfig(str(MEMBERS / "hub"), experts), tmp_path / "bts")
    base = {**NO_SIZES, "data.tokenizer": "null:97", "checkpoint.init_from": tmp_path / "bts"}
    again = adopted(arguments("", ids, base, bts__experts=json.dumps(experts)))
    assert list(again.bts.experts) == ["code", "math"]
    with pytest.raises(UsageError, match=r"has no expert words; add it with tools/stitch\.py add"):
        adopted(arguments("", ids, base, bts__experts=json.dumps({**experts, "words": str(MEMBERS / "words")})))
    with pytest.raises(
        UsageError, match=r"bts\.placement is \[5, 6, 7, 8\], but the weights in .* have \[\]; leave it"
    ):
        adopted(arguments("", ids, base, bts__placement="[5, 6, 7, 8]"))
    with pytest.raises(UsageError, match=r"bts\.trainable names"):
        adopted(arguments("", ids, base, bts__trainable='["typo"]'))
