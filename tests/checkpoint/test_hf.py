"""Hugging Face folders, against transformers' own loading."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from megabts.checkpoint import hf, hf_config
from megabts.checkpoint.folder import write_checkpoint
from megabts.checkpoint.manifest import CheckpointError, MemberRecord, check_member, content_hash, read_manifest
from megabts.checkpoint.reader import load_tensors
from megabts.config.model import ModelConfig
from megabts.errors import UserError
from tests.checkpoint.saves import save_step

MEMBERS = Path(__file__).parent.parent / "golden" / "bts" / "members"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
}


def make(folder: Path, dtype: torch.dtype = torch.bfloat16, shard: str = "5GB", **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **options}))
    for parameter in model.parameters():
        parameter.data = parameter.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def expected(state: dict[str, torch.Tensor], layers: int, tied: bool) -> dict[str, torch.Tensor]:
    """The mapping written out a second time, from the names in the documents."""
    result = {"embedding.weight": state["model.embed_tokens.weight"], "final_norm.weight": state["model.norm.weight"]}
    for i in range(layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        q, k, v, o = (state[f"{theirs}.self_attn.{x}_proj.weight"] for x in "qkvo")
        gate, up, down = (state[f"{theirs}.mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
        result |= {
            f"{ours}.attention_norm.weight": state[f"{theirs}.input_layernorm.weight"],
            f"{ours}.attention.qkv.weight": torch.cat([q, k, v]),
            f"{ours}.attention.out.weight": o,
            f"{ours}.mlp_norm.weight": state[f"{theirs}.post_attention_layernorm.weight"],
            f"{ours}.mlp.gate_up.weight": torch.cat([gate, up]),
            f"{ours}.mlp.down.weight": down,
        }
    return result if tied else result | {"head.weight": state["lm_head.weight"]}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("member", ["hub", "code", "math", "words"])
def test_golden_members(member: str) -> None:
    folder = MEMBERS / member
    assert hf_config.is_hf_folder(folder)
    assert hf_config.config_from_hf(folder) == ModelConfig(
        vocab_size=97,
        hidden_size=32,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_size=64,
        max_seq_len=64,
        rope_theta=10000.0,
        rope_scaling={},
        norm_eps=1e-05,
        tie_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
    )
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert_equal(dict(hf.weights_from_hf(folder)), expected(stored, 8, tied=False))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "4KB"])
def test_what_transformers_saves(tmp_path: Path, tied: bool, shard: str) -> None:
    model = make(tmp_path, shard=shard, tie_word_embeddings=tied)
    assert ((tmp_path / "model.safetensors.index.json").exists()) == (shard == "4KB")
    config = hf_config.config_from_hf(tmp_path)
    assert (config.tie_embeddings, config.head_dim) == (tied, 6)
    assert hf_config.dtype_from_hf(tmp_path) == "bfloat16"
    weights = dict(hf.weights_from_hf(tmp_path))
    assert_equal(weights, expected(model.state_dict(), 3, tied))
    back = dict(hf.weights_to_hf(config, weights.items()))
    stored = {name: t for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    assert_equal(back, stored)
    write_checkpoint(tmp_path / "ours", {"model.safetensors": weights}, {}, {})
    assert_equal(load_tensors(tmp_path / "ours", "model.safetensors"), weights)


def edit(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw = {key: value for key, value in {**raw, **changes}.items() if value != "remove"}
    (folder / "config.json").write_text(json.dumps(raw))


def test_rope_in_both_forms(tmp_path: Path) -> None:
    llama3 = {**LLAMA3, "original_max_position_embeddings": 64}
    ours = {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position": 64,
    }
    make(tmp_path, rope_parameters={**llama3, "rope_theta": 5e5})
    new = hf_config.config_from_hf(tmp_path)
    assert (new.rope_theta, new.rope_scaling) == (5e5, ours)
    edit(tmp_path, rope_parameters="remove", dtype="remove", rope_theta=5e5, rope_scaling=llama3, torch_dtype="float16")
    assert hf_config.config_from_hf(tmp_path) == new
    assert hf_config.dtype_from_hf(tmp_path) == "float16"
    edit(tmp_path, rope_scaling={"type": "linear", "factor": 2.0})
    assert hf_config.config_from_hf(tmp_path).rope_scaling == {"type": "linear", "factor": 2.0}
    edit(tmp_path, rope_scaling=None, rope_theta="remove")
    plain = hf_config.config_from_hf(tmp_path)
    assert (plain.rope_theta, plain.rope_scaling) == (10000.0, {})


def test_left_out_keys_mean_what_transformers_means(tmp_path: Path) -> None:
    make(tmp_path, tie_word_embeddings=True)
    names = ["num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"]
    edit(tmp_path, **dict.fromkeys(names, "remove"), rope_parameters="remove")
    config, theirs = hf_config.config_from_hf(tmp_path), LlamaConfig.from_pretrained(tmp_path)
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.head_dim == theirs.head_dim
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.max_seq_len == theirs.max_position_embeddings
    assert config.tie_embeddings == theirs.tie_word_embeddings
    assert config.rope_theta == theirs.to_dict()["rope_parameters"]["rope_theta"]


WINDOWS: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": "remove"}, ""),
    ("mistral", {"sliding_window": "remove", "max_position_embeddings": 8192}, "sliding_window 4096"),
    ("mistral", {"sliding_window": "remove", "max_position_embeddings": "remove"}, "than the 131072 tokens"),
    ("mistral", {"sliding_window": 127}, "sliding_window 127 is shorter than the 128 tokens"),
    ("mistral", {"sliding_window": 128}, ""),
    ("mistral", {"sliding_window": None}, ""),
    ("mistral", {"sliding_window": 127, "layer_types": ["full_attention"] * 3}, "sliding_window 127"),
    ("qwen2", {"sliding_window": 16}, ""),
    ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3}, ""),
    ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}, "sliding_window 16"),
    ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["full_attention"] * 3}, ""),
    ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["sliding_attention"]}, "window 16"),
    ("qwen3", {"layer_types": ["chunked_attention"]}, "layer_types chunked_attention are not supported"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("olmo2", {"attention_bias": True}, "attention_bias"),
    ("mistral", {"attention_bias": True}, ""),  # not a key of this family: transformers passes it over
]


@pytest.mark.parametrize(("family", "changes", "message"), WINDOWS)
def test_windows_and_biases_of_families(tmp_path: Path, family: str, changes: dict[str, Any], message: str) -> None:
    raw = {"model_type": family, **SMALL, "max_position_embeddings": 128, "layer_types": "remove", **changes}
    raw = {key: value for key, value in raw.items() if value != "remove"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    if message:
        with pytest.raises(UserError, match=message):
            hf_config.config_from_hf(tmp_path)
    else:
        assert hf_config.config_from_hf(tmp_path).num_layers == 3


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "olmo2"])
def test_left_out_keys_mean_what_each_family_means(tmp_path: Path, family: str) -> None:
    required = {key: 4 * SMALL[key] for key in hf_config.REQUIRED_KEYS.values()}
    required |= {"num_attention_heads": 32, "hidden_size": 64, "use_sliding_window": False}
    own = {"sliding_window": None} if family == "mistral" else {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **required, **own}))
    config, theirs = hf_config.config_from_hf(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.head_dim == (getattr(theirs, "head_dim", None) or 2)
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.max_seq_len == theirs.max_position_embeddings
    assert config.tie_embeddings == theirs.tie_word_embeddings
    assert config.rope_theta == theirs.to_dict()["rope_parameters"]["rope_theta"]


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, "model_type 'gpt2'"),
    ({"model_type": "remove"}, "model_type None"),
    ({"model_type": "megabts_bts"}, "give the run it was exported from"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"sliding_window": 64}, "sliding_window 64 is shorter than the 128 tokens"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "needs low_freq_factor"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope type"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_parameters": "remove", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ({"intermediate_size": "remove"}, "intermediate_size missing"),
    ({"hidden_size": 32}, r"embed_tokens.weight has shape \[50, 16\], config.json says \[50, 32\]"),
    ({"num_hidden_layers": 4}, r"model.layers.3.input_layernorm.weight is missing \(9 such\)"),
    ({"num_hidden_layers": 2}, r"model.layers.2.input_layernorm.weight is not part of this family \(9 such\)"),
]


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED)
def test_what_is_not_supported_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        list(hf.weights_from_hf(tmp_path))


def drop_shard(folder: Path) -> None:
    sorted(folder.glob("model-*"))[1].unlink()


def cut_shard(folder: Path) -> None:
    path = sorted(folder.glob("model-*"))[1]
    path.write_bytes(path.read_bytes()[:-1])


def repeat_shard(folder: Path) -> None:
    first, second = sorted(folder.glob("model-*"))[:2]
    shutil.copy(first, second)


def empty_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def broken_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def no_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_shard, r"shard model-00002-of-\d+\.safetensors is missing"),
        (cut_shard, r"model-00002-of-\d+\.safetensors is damaged"),
        (repeat_shard, "in more than one shard"),
        (empty_index, "no weight_map"),
        (broken_index, "not JSON"),
        (no_index, "neither model.safetensors nor"),
        (no_config, "cannot read"),
        (list_config, "not a JSON object"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    make(tmp_path, shard="4KB")
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        list(hf.weights_from_hf(tmp_path))


def rewrite(folder: Path, **tensors: torch.Tensor) -> None:
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file({**stored, **named}, folder / "model.safetensors")


def test_tied_head_that_is_stored_too_must_be_the_embedding(tmp_path: Path) -> None:
    model = make(tmp_path, tie_word_embeddings=True)
    head = model.state_dict()["lm_head.weight"].clone()
    rewrite(tmp_path, lm_head__weight=head)
    assert "head.weight" not in dict(hf.weights_from_hf(tmp_path))
    head[3, 4] += 1
    rewrite(tmp_path, lm_head__weight=head)
    with pytest.raises(UserError, match=r"tie_word_embeddings is true but lm_head\.weight"):
        list(hf.weights_from_hf(tmp_path))
    edit(tmp_path, tie_word_embeddings=False)
    assert torch.equal(dict(hf.weights_from_hf(tmp_path))["head.weight"], head)


def test_extra_tensors_are_named_and_computed_buffers_passed_over(tmp_path: Path) -> None:
    make(tmp_path)
    rewrite(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(3))
    assert len(dict(hf.weights_from_hf(tmp_path))) == 3 * 6 + 3
    rewrite(tmp_path, model__layers__0__self_attn__q_norm__weight=torch.ones(6))
    with pytest.raises(UserError, match=r"q_norm\.weight is not part of this family \(1 such\)"):
        list(hf.weights_from_hf(tmp_path))


def test_parts_of_different_type_are_refused(tmp_path: Path) -> None:
    model = make(tmp_path)
    half = model.state_dict()["model.layers.1.self_attn.k_proj.weight"].float()
    rewrite(tmp_path, model__layers__1__self_attn__k_proj__weight=half)
    with pytest.raises(UserError, match="differ in type"):
        list(hf.weights_from_hf(tmp_path))


def test_export_of_an_unknown_parameter(tmp_path: Path) -> None:
    config = hf_config.config_from_hf(MEMBERS / "hub")
    with pytest.raises(UserError, match=r"stitch\.0\.gate has no name in the llama family"):
        list(hf.weights_to_hf(config, [("stitch.0.gate", torch.ones(1))]))


def test_content_hash_sees_weights_and_configuration(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(MEMBERS / "hub", tmp_path / name)
    assert hf.hf_content_hash(tmp_path / "a") == hf.hf_content_hash(tmp_path / "b")
    (tmp_path / "b" / "notes.txt").write_text("x")
    before = hf.hf_content_hash(tmp_path / "b")
    assert before == content_hash(tmp_path / "a")
    edit(tmp_path / "b", rms_norm_eps=1e-6)
    data = bytearray((tmp_path / "a" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a" / "model.safetensors").write_bytes(data)
    hashes = {before, hf.hf_content_hash(tmp_path / "a"), hf.hf_content_hash(tmp_path / "b")}
    assert len(hashes) == 3


def test_hf_member_of_a_checkpoint(tmp_path: Path) -> None:
    shutil.copytree(MEMBERS / "hub", tmp_path / "hub")
    record = MemberRecord("hub", str(tmp_path / "hub"), content_hash(tmp_path / "hub"))
    folder = save_step(tmp_path / "run", 1, {}, {}, {}, members=[record])
    assert not hf_config.is_hf_folder(folder)
    assert check_member(read_manifest(folder).members[0], folder) == tmp_path / "hub"
    edit(tmp_path / "hub", vocab_size=98)
    with pytest.raises(CheckpointError, match=r"member 'hub' .* has changed"):
        check_member(read_manifest(folder).members[0], folder)


def test_each_family_has_names_and_limits() -> None:
    assert hf.FAMILIES.keys() == hf_config.FAMILY.keys()
