"""Mixtures of experts in transformers' own classes, against megabts and against the dense models they are made of."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from megabts import assemble
from megabts.build import load_model
from megabts.checkpoint.manifest import MODEL_FILE
from megabts.checkpoint.reader import load_tensors
from megabts.config.methods import MoEConfig
from megabts.config.model import ModelConfig
from megabts.config.run import RunConfig
from megabts.convert.moe import export_moe, moe_family
from megabts.convert.verify import fixed_tokens, model_logits
from megabts.errors import UserError
from megabts.parallel.mesh import ParallelMesh
from tests.convert.hf_models import make
from tests.convert.stitched import QUIET, distance, greedy_ours, greedy_theirs, load_ours, rewrite

NAMES = ("seed", "code", "math")
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("llama", {"top_k": 2}, {}),
    "mixtral-tied": ("mistral", {"top_k": 3}, {"tie_word_embeddings": True}),
    "mixtral-split": ("llama", {"split": 2, "top_k": 3}, {}),
    "mixtral-blend": ("llama", {"blend": True}, {}),
    "mixtral-soft": ("llama", {"routing": "soft"}, {}),
    "qwen3_moe": ("qwen3", {"top_k": 2}, {}),
    "flex_olmo": ("olmo2", {"top_k": 2}, {}),
}
MEMBERS = {name: name for name in NAMES}


def upcycled(root: Path, family: str, settings: dict[str, Any], **sizes: Any) -> Path:
    """A checkpoint of three members of a family."""
    for seed, name in enumerate(NAMES):
        make(root / name, family, seed=seed, **sizes)
    return mixture(root, {name: str(root / name) for name in NAMES}, settings)


def mixture(root: Path, folders: dict[str, str], settings: dict[str, Any]) -> Path:
    """A checkpoint of members, whose routers' logits are as far apart as a trained one's."""
    checkpoint = root / "moe"
    assemble.upcycle(RunConfig(method="moe", moe=MoEConfig(folders, **settings)), checkpoint)
    tensors = load_tensors(checkpoint, MODEL_FILE)
    rewrite(checkpoint, {name: tensor * (40 if ".router." in name else 1) for name, tensor in tensors.items()})
    return checkpoint


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_transformers_computes_the_same(tmp_path: Path, case: str) -> None:
    family, settings, sizes = CASES[case]
    checkpoint = upcycled(tmp_path, family, settings, **sizes)
    export_moe(checkpoint, tmp_path / "hf", QUIET)
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.model_type == case.split("-")[0]
    ours = load_ours(checkpoint)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = fixed_tokens(ours.config)
    expected = model_logits(ours, tokens)
    assert distance(theirs.eval()(input_ids=tokens).logits, expected) < 1e-5
    assert greedy_theirs(theirs) == greedy_ours(checkpoint)
    gate = "block_sparse_moe" if case.startswith("mixtral") else "mlp"
    assert f"model.layers.0.{gate}.gate.weight" in load_file(tmp_path / "hf" / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
@torch.no_grad()
def test_identical_experts_are_the_dense_model(tmp_path: Path, family: str) -> None:
    dense = make(tmp_path / "seed", family)
    checkpoint = mixture(tmp_path, {name: str(tmp_path / "seed") for name in ("seed", "two", "three")}, {})
    export_moe(checkpoint, tmp_path / "hf", replace(QUIET, max_shard_bytes=4000))
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(53, (2, 40), generator=torch.Generator().manual_seed(3))
    assert distance(theirs(input_ids=tokens).logits, dense(input_ids=tokens).logits) < 1e-5


def test_types_and_tensors(tmp_path: Path) -> None:
    lines: list[str] = []
    checkpoint = upcycled(tmp_path, "llama", {})
    half = replace(QUIET, dtype=torch.bfloat16, say=lines.append)
    export_moe(checkpoint, tmp_path / "half", half)
    export_moe(checkpoint, tmp_path / "bits", replace(half, check="tensors"))
    assert sum(line.startswith("checked") for line in lines) == 2
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(UserError, match="exists already"):
        export_moe(checkpoint, tmp_path / "bits", QUIET)


def test_a_wrong_export_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up changed about: transformers loads it, and computes something else."""
    from megabts.convert import moe

    wrong = replace(moe.MOE_FAMILIES["llama"], matrices=("w3", "w1", "w2"))
    monkeypatch.setitem(moe.MOE_FAMILIES, "llama", wrong)  # type: ignore[arg-type]
    checkpoint = upcycled(tmp_path, "llama", {})
    with pytest.raises(UserError, match=r"does not compute the same"):
        export_moe(checkpoint, tmp_path / "hf", QUIET)
    assert not (tmp_path / "hf").exists()


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"attention_experts": True}, {}, r"^moe\.attention_experts \(bam\) has no Hugging Face form; upcycle"),
    (
        {"routing": "switch"},
        {},
        r"^moe\.routing switch \(one ffn expert, with its probability\) .*; train on with --moe",
    ),
    ({"routing": "sample"}, {}, r"^moe\.routing sample \(.*; train on with --moe"),
    ({"top_k": 1}, {}, r"^moe\.top_k 1 has no Hugging Face form .*; train on with --moe\.top_k 2$"),
    ({}, {"qkv_bias": True}, r"^members of the qwen2 family have no Hugging Face mixture .*; export the members one"),
    ({}, {"qkv_bias": True, "qk_norm": True}, r"^no Hugging Face family has"),
]


@pytest.mark.parametrize("settings, model, message", REFUSED, ids=[message[1:22] for *_, message in REFUSED])
def test_what_has_no_form_is_refused(settings: dict[str, Any], model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        moe_family(ModelConfig(**model), MoEConfig(MEMBERS, **settings))
    assert "\n" not in str(caught.value)


def test_refused_before_anything_is_written(tmp_path: Path) -> None:
    checkpoint = upcycled(tmp_path, "qwen2", {})
    with pytest.raises(UserError, match="qwen2"):
        export_moe(checkpoint, tmp_path / "hf", QUIET)
    assert load_model(checkpoint, ParallelMesh(), torch.float32, "cpu")
    assert [path.name for path in tmp_path.iterdir() if "hf" in path.name] == []
