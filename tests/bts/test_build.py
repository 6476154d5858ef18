"""Which members fit together, and what adding and removing do to a configuration and its stitches."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megabts.bts.build import add_expert, load_member, open_members, remove_expert, with_members
from megabts.checkpoint.folder import write_checkpoint
from megabts.checkpoint.manifest import MODEL_FILE, CheckpointError
from megabts.config.methods import BTSConfig
from megabts.errors import UsageError, UserError
from megabts.parallel.mesh import ParallelMesh
from tests.bts.folders import write_dense, write_members
from tests.bts.reference import config_of, random_model

LLAMA3 = {"type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 16}


def test_members_in_order(tmp_path: Path) -> None:
    paths = write_members(tmp_path, "seed", "code", "math")
    sources = open_members(BTSConfig(paths["seed"], {"math": paths["math"], "code": paths["code"]}))
    assert [(name, source.folder.name) for name, source in sources.items()] == [
        ("hub", "seed"),
        ("math", "math"),
        ("code", "code"),
    ]


DIFFERENCES: list[tuple[str, dict[str, Any], str, str]] = [
    ("hidden_size", {"hidden_size": 32, "head_dim": 4}, "16", "32"),
    ("num_layers", {"num_layers": 4}, "5", "4"),
    ("num_heads", {"num_heads": 2, "head_dim": 4}, "4", "2"),
    ("num_kv_heads", {"num_kv_heads": 1}, "2", "1"),
    ("head_dim", {"head_dim": 8}, "4", "8"),
    ("ffn_size", {"ffn_size": 32}, "24", "32"),
    ("vocab_size", {"vocab_size": 33}, "31", "33"),
    ("rope_theta", {"rope_theta": 5e5}, "10000.0", "500000.0"),
    ("rope_scaling", {"rope_scaling": LLAMA3}, "{}", "llama3"),
    ("norm_eps", {"norm_eps": 1e-6}, "1e-05", "1e-06"),
    ("tie_embeddings", {"tie_embeddings": True}, "False", "True"),
    ("qkv_bias", {"qkv_bias": True}, "False", "True"),
    ("qk_norm", {"qk_norm": True}, "False", "True"),
]


@pytest.mark.parametrize("field, sizes, hub, expert", DIFFERENCES, ids=[case[0] for case in DIFFERENCES])
def test_members_of_different_models(tmp_path: Path, field: str, sizes: dict[str, Any], hub: str, expert: str) -> None:
    seed, code = write_dense(tmp_path / "seed", 1), write_dense(tmp_path / "code", 2)
    other = write_dense(tmp_path / "other", 3, **sizes)
    with pytest.raises(UsageError, match="the members differ and cannot be combined") as error:
        open_members(BTSConfig(str(seed), {"code": str(code), "other": str(other)}))
    assert error.value.exit_code == 2
    _, head, *rows = str(error.value).splitlines()
    assert head.split() == ["hub", "code", "other"]
    (row,) = rows
    cells = row.split()
    assert cells[:3] == [field, hub, hub]
    assert expert in row


def test_table_of_several_differences(tmp_path: Path) -> None:
    seed = write_dense(tmp_path / "seed", 1)
    other = write_dense(tmp_path / "other", 2, vocab_size=40, num_layers=3, rope_theta=1.5)
    with pytest.raises(UsageError) as error:
        open_members(BTSConfig(str(seed), {"other": str(other)}))
    rows = [line.split() for line in str(error.value).splitlines()[2:]]
    assert rows == [["vocab_size", "31", "40"], ["num_layers", "5", "3"], ["rope_theta", "10000.0", "1.5"]]


def test_members_of_different_tokenizers(tmp_path: Path) -> None:
    seed = write_dense(tmp_path / "seed", 1, fingerprint="a" * 64)
    other = write_dense(tmp_path / "other", 2, fingerprint="b" * 64)
    unknown = write_dense(tmp_path / "unknown", 3)
    open_members(BTSConfig(str(seed), {"unknown": str(unknown)}))
    with pytest.raises(UsageError, match=r"tokenizer +aaaaaaaaaaaa +bbbbbbbbbbbb"):
        open_members(BTSConfig(str(seed), {"other": str(other), "unknown": str(unknown)}))


def test_settings_of_training_may_differ(tmp_path: Path) -> None:
    seed = write_dense(tmp_path / "seed", 1)
    other = write_dense(tmp_path / "other", 2, max_seq_len=9, init_std=0.1, cross_document_attention=False)
    assert len(open_members(BTSConfig(str(seed), {"other": str(other)}))) == 2


def test_one_model_twice(tmp_path: Path) -> None:
    paths = write_members(tmp_path, "seed", "code")
    with pytest.raises(UsageError, match="members code and more have the same weights"):
        open_members(BTSConfig(paths["seed"], {"code": paths["code"], "more": paths["code"]}))
    copied = write_dense(tmp_path / "copy", 1)  # another folder, the seed's weights
    with pytest.raises(UsageError, match="members hub and copy have the same weights"):
        open_members(BTSConfig(paths["seed"], {"copy": str(copied)}))


def test_members_that_are_not_there(tmp_path: Path) -> None:
    paths = write_members(tmp_path, "seed", "code")
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        open_members(BTSConfig(paths["seed"], {"code": str(tmp_path / "nowhere")}))
    for bts in (BTSConfig("", {"code": paths["code"]}), BTSConfig(paths["seed"])):
        with pytest.raises(UsageError, match=r"needs bts\.hub DIR and at least one"):
            open_members(bts)
    with pytest.raises(UsageError, match=r"bts.trainable names \['cod'\]; the members are hub, code"):
        open_members(BTSConfig(paths["seed"], {"code": paths["code"]}, trainable=["cod"]))


def test_damaged_member(tmp_path: Path) -> None:
    paths = write_members(tmp_path, "seed", "code")
    file = tmp_path / "code" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model.safetensors: its content does not match"):
        open_members(BTSConfig(paths["seed"], {"code": paths["code"]}))


def test_with_members() -> None:
    bts = config_of(2, num_stitch_layers=2, start="hub_leaning")
    moved = with_members(bts, {"hub": Path("a"), "e1": Path("b"), "e2": Path("c")})
    assert (moved.hub, moved.experts) == ("a", {"e1": "b", "e2": "c"})
    assert (moved.num_stitch_layers, moved.start) == (2, "hub_leaning")


def test_load_member_passes_over_an_experts_output_layers(tmp_path: Path) -> None:
    model, mesh = random_model(config_of(1, num_stitch_layers=1)), ParallelMesh()
    weights = {name: torch.full_like(tensor, 2.0) for name, tensor in model.hub.state_dict().items()}
    whole = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    write_checkpoint(tmp_path / "DIR", {MODEL_FILE: weights}, {}, {})
    for name in ("hub", "e1"):
        load_member(model, name, tmp_path / "DIR", whole, mesh)
    assert all((p == 2.0).all() for name, p in model.named_parameters() if name.startswith("members."))
    for name in ("layers.3.mlp.down.weight", "head.weight"):
        some = {key: tensor for key, tensor in weights.items() if key != name}
        write_checkpoint(tmp_path / "DIR", {MODEL_FILE: some}, {}, {})
        with pytest.raises(UserError, match=f"DIR does not fit the model: it lacks {name}"):
            load_member(model, "e1", tmp_path / "DIR", whole, mesh)


def test_add_and_remove_in_a_configuration() -> None:
    bts = config_of(2)
    added = add_expert(bts, "law", "DIR")
    assert (added.members, added.trainable) == (("hub", "e1", "e2", "law"), ["law"])
    assert add_expert(bts, "law", "DIR", train_all=True).trainable == ["*"]
    for name in ("e1", "hub"):
        with pytest.raises(UserError, match=f"there is a member '{name}' already"):
            add_expert(bts, name, "DIR")
    stitches = dict(random_model(config_of(2, num_stitch_layers=2), num_layers=2).named_parameters())
    own = {name: p.detach() for name, p in stitches.items() if name.startswith("stitches.")}
    left, kept = remove_expert(added, own, "e1")
    assert (left.members, left.trainable) == (("hub", "e2", "law"), ["*"])
    assert kept.keys() == {name for name in own if ".e1." not in name}
    with pytest.raises(UserError, match="no expert 'hub' to remove; the experts are e1, e2"):
        remove_expert(bts, own, "hub")
    with pytest.raises(UserError, match="e1 is the only expert"):
        remove_expert(config_of(1), own, "e1")


@pytest.mark.parametrize(
    "form", [{"placement": [4, 5]}, {"projection_rank": 2}, {"gate": "token", "output": "mixture", "evidence": 3}]
)
def test_what_is_left_of_any_form_is_all_that_the_smaller_model_has(form: dict[str, Any]) -> None:
    bts = config_of(3, num_stitch_layers=2, **form)
    own = {name: p.detach() for name, p, _ in random_model(bts).own_parameters()}
    left, kept = remove_expert(bts, own, "e2")
    assert kept.keys() == {name for name, _, _ in random_model(left).own_parameters()}
    new = {name for name, p, _ in random_model(add_expert(left, "e4", "path")).own_parameters() if p.requires_grad}
    assert {name.replace("e4", "e2") for name in new} == own.keys() - kept.keys()
