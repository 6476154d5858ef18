"""Dense models in from Hugging Face folders and out again, against what transformers stored and computes."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megabts.assemble import combine, soup
from megabts.build import load_model
from megabts.checkpoint.folder import write_checkpoint
from megabts.checkpoint.hf_config import config_from_hf, config_to_hf, family_of
from megabts.checkpoint.source import open_dense
from megabts.config.load import to_yaml
from megabts.config.model import ModelConfig
from megabts.config.run import RunConfig
from megabts.convert import verify
from megabts.convert.dense import export_dense, import_dense
from megabts.convert.export import export
from megabts.convert.options import Options
from megabts.errors import UserError
from megabts.parallel.mesh import ParallelMesh
from tests.convert.hf_models import FAMILIES, LLAMA3, VERSION_4, YARN, as_version_4, edit, make
from tests.tools import RunTool

QUIET = Options(check="tensors", say=lambda line: None)
TOKENS = torch.randint(53, (2, 40), generator=torch.Generator().manual_seed(3))


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, in whatever files they are."""
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= safetensors.torch.load_file(path)
    return found


def same_bytes(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        a.dtype == right[name].dtype and torch.equal(a.view(torch.uint8), right[name].view(torch.uint8))
        for name, a in left.items()
    )


@torch.no_grad()
def theirs(folder: Path) -> Tensor:
    logits: Tensor = AutoModelForCausalLM.from_pretrained(folder).float().eval()(TOKENS).logits
    return logits


def ours(folder: Path) -> Tensor:
    return verify.model_logits(load_model(folder, ParallelMesh(), torch.float32, "cpu").model.eval(), TOKENS)


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same_bytes(tmp_path: Path, family: str, tied: bool) -> None:
    hf, back, run = tmp_path / "hf", tmp_path / "back", tmp_path / "run"
    for case, (shard, version) in enumerate([("2KB", 5), ("5GB", 4)] if tied else [("5GB", 5), ("2KB", 4)]):
        dtype = torch.bfloat16 if case % 2 else torch.float32
        make(hf, family, seed=case, dtype=dtype, shard=shard, tie_word_embeddings=tied)
        if version == 4:
            as_version_4(hf)
        import_dense(hf, run, QUIET)
        export_dense(run, back, Options(max_shard_bytes=2000 if shard == "2KB" else 10**9, check="tensors", say=str))
        assert (back / "model.safetensors.index.json").exists() == (shard == "2KB")
        assert same_bytes(stored(back), stored(hf)), (shard, version)
        assert config_from_hf(back) == config_from_hf(hf) == open_dense(run).config
        if case == 0:
            assert distance(ours(run), theirs(hf)) < 1e-5
            assert torch.equal(theirs(back), theirs(hf))
        for folder in (hf, back, run):
            shutil.rmtree(folder)


@pytest.mark.parametrize("rope", [{}, {"rope_type": "linear", "factor": 2.0}, LLAMA3, YARN], ids=str)
def test_config_is_read_in_either_form(tmp_path: Path, rope: dict[str, Any]) -> None:
    """Written for both majors of transformers: what is left without the other's keys says the same."""
    make(tmp_path / "hf", "llama", rope_parameters={"rope_type": "default", "rope_theta": 5e4, **rope})
    config = config_from_hf(tmp_path / "hf")
    assert config.rope_theta == 5e4
    assert bool(config.rope_scaling) == bool(rope)
    import_dense(tmp_path / "hf", tmp_path / "run", Options(say=str))
    export_dense(tmp_path / "run", tmp_path / "back", Options(say=str))
    assert torch.equal(theirs(tmp_path / "back"), theirs(tmp_path / "hf"))
    for keys in (["rope_parameters", "dtype"], ["rope_theta", "rope_scaling", "torch_dtype"]):
        shutil.copytree(tmp_path / "back", tmp_path / keys[0])
        edit(tmp_path / keys[0], **dict.fromkeys(keys, "remove"))
        assert config_from_hf(tmp_path / keys[0]) == config
        if "rope_parameters" in keys or not VERSION_4:
            assert torch.equal(theirs(tmp_path / keys[0]), theirs(tmp_path / "hf")), "transformers reads it alike, too"


def test_a_soup_in_another_type(tmp_path: Path) -> None:
    models = [make(tmp_path / str(seed), "olmo2", seed=seed) for seed in (1, 2)]
    soup({str(seed): (str(tmp_path / str(seed)), 1.0) for seed in (1, 2)}, tmp_path / "soup")
    said: list[str] = []
    export(tmp_path / "soup", tmp_path / "out", Options(torch.bfloat16, say=said.append))
    assert any(line.startswith("checked: largest relative difference of logits") for line in said)
    found = stored(tmp_path / "out")
    first, second = (model.state_dict() for model in models)
    for name, tensor in found.items():
        assert torch.equal(tensor, ((first[name] + second[name]) / 2).bfloat16()), name
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_shards_keep_to_their_size(tmp_path: Path) -> None:
    make(tmp_path / "hf", "qwen2")
    import_dense(tmp_path / "hf", tmp_path / "run", QUIET)
    export_dense(tmp_path / "run", tmp_path / "out", Options(max_shard_bytes=4096, check="tensors", say=str))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    sizes = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        assert {name for name, file in index["weight_map"].items() if file == path.name} == tensors.keys()
        sizes[path.name] = sum(tensor.nbytes for tensor in tensors.values())
    assert max(sizes.values()) <= 4096
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    assert sorted(sizes) == [f"model-{n:05d}-of-{len(sizes):05d}.safetensors" for n in range(1, len(sizes) + 1)]


def test_hugging_face_models_are_stitched_as_they_are(tmp_path: Path, run_tool: RunTool) -> None:
    """With the hub-preserving start the stitched model is its hub: transformers' logits."""
    for seed, name in enumerate(("base", "code", "math")):
        make(tmp_path / name, "olmo2", seed=seed)
    make(tmp_path / "other", "llama")

    def stitch(out: str, *experts: str) -> tuple[int, str, str]:
        named = [word for name in experts for word in ("--expert", f"{name}={tmp_path / name}")]
        form = ("--num-stitch-layers", 3, "--start", "hub_preserving")
        return run_tool("stitch.py", "--hub", tmp_path / "base", "--out", tmp_path / out, *form, *named)

    code, _, error = stitch("bts", "code", "math")
    assert code == 0, error
    assert distance(ours(tmp_path / "bts"), theirs(tmp_path / "base")) < 1e-5
    code, _, error = stitch("no", "code", "other")
    assert code == 2
    assert "norm_position" in error


REFUSED_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"qkv_bias": True, "qk_norm": True}, "model.qk_norm True.*model.qkv_bias True together"),
    ({"norm_position": "post"}, "model.norm_position post"),
    ({"qk_norm": True, "qk_norm_span": "full"}, "model.qk_norm_span full"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED_OPTIONS)
def test_options_that_no_family_has(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_to_hf(ModelConfig(**options), "float32")


def test_family_that_fits() -> None:
    assert family_of(ModelConfig()) == family_of(ModelConfig(tie_embeddings=True, head_dim=32)) == "llama"
    assert family_of(ModelConfig(qkv_bias=True)) == "qwen2"
    assert family_of(ModelConfig(qk_norm=True)) == "qwen3"
    assert family_of(ModelConfig(qk_norm=True, qk_norm_span="full", norm_position="post")) == "olmo2"


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    for seed in (1, 2):
        make(tmp_path / str(seed), "llama", seed=seed)
    combine("btm", {"a": str(tmp_path / "1"), "b": str(tmp_path / "2")}, tmp_path / "btm")
    with pytest.raises(UserError, match="of method btm, which has no Hugging Face form"):
        export(tmp_path / "btm", tmp_path / "out", QUIET)
    with pytest.raises(UserError, match="is a Hugging Face folder already"):
        export(tmp_path / "1", tmp_path / "out", QUIET)
    with pytest.raises(UserError, match="there is no folder"):
        export(tmp_path / "none", tmp_path / "out", QUIET)
    with pytest.raises(UserError, match="exists already"):
        import_dense(tmp_path / "1", tmp_path / "2", QUIET)
    with pytest.raises(UserError, match="is not a Hugging Face folder"):
        import_dense(tmp_path / "btm", tmp_path / "out", QUIET)
    config = RunConfig(model=ModelConfig(qkv_bias=True, qk_norm=True))
    write_checkpoint(tmp_path / "odd", {"model.safetensors": {}}, {"config.yaml": to_yaml(config).encode()}, {})
    with pytest.raises(UserError, match="no Hugging Face family has"):
        export(tmp_path / "odd", tmp_path / "out", QUIET)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("check", ["logits", "tensors"])
def test_a_wrong_result_has_no_name(tmp_path: Path, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value of one matrix is changed on its way."""
    make(tmp_path / "hf", "qwen3")
    import_dense(tmp_path / "hf", tmp_path / "run", QUIET)
    dense = sys.modules["megabts.convert.dense"]
    right = dense.weights_to_hf

    def wrong(*args: Any) -> Any:
        for name, tensor in right(*args):
            if name == "model.layers.1.self_attn.k_norm.weight":
                tensor = tensor.clone()
                tensor[2] *= 1.5
            yield name, tensor

    monkeypatch.setattr(dense, "weights_to_hf", wrong)
    expected = "does not compute the same" if check == "logits" else "the values of layers.1.attention.k_norm.weight"
    with pytest.raises(UserError, match=expected):
        export_dense(tmp_path / "run", tmp_path / "out", Options(check=check, say=str))
    monkeypatch.undo()
    monkeypatch.setattr(dense, "weights_from_hf", lambda *args: wrong_import(*args))
    from megabts.checkpoint.hf import weights_from_hf

    read = iter(range(10))

    def wrong_import(*args: Any) -> Any:
        second = next(read) == 1  # the first reading is for the type, the second for the checkpoint
        for name, tensor in weights_from_hf(*args):
            yield name, (tensor * 1.5 if second and name.endswith("k_norm.weight") else tensor)

    with pytest.raises(UserError, match=expected.replace("layers.1", "layers.0")):
        import_dense(tmp_path / "hf", tmp_path / "in", Options(check=check, say=str))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_the_check_sees_a_rotary_scaling_of_long_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor 8 of long wavelengths written as 9: nothing in the first tokens tells."""
    rope = {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 8192}
    make(tmp_path / "hf", "llama", rope_parameters=rope, max_position_embeddings=65_536)
    import_dense(tmp_path / "hf", tmp_path / "run", Options(say=str))
    dense = sys.modules["megabts.convert.dense"]

    def wrong(config: ModelConfig, dtype: str) -> dict[str, Any]:
        return config_to_hf(replace(config, rope_scaling={**config.rope_scaling, "factor": 9.0}), dtype)

    monkeypatch.setattr(dense, "config_to_hf", wrong)
    with pytest.raises(UserError, match="does not compute the same"):
        export_dense(tmp_path / "run", tmp_path / "out", Options(say=str))


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "hf", "llama")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[hf\]'"):
        import_dense(tmp_path / "hf", tmp_path / "run", Options())
    import_dense(tmp_path / "hf", tmp_path / "run", QUIET)
    with pytest.raises(UserError, match=r"pip install -e '\.\[hf\]'"):
        export_dense(tmp_path / "run", tmp_path / "out", Options())
    assert not list(tmp_path.glob("*out*"))


def test_transformers_names_what_it_misses(tmp_path: Path) -> None:
    make(tmp_path / "hf", "qwen3")
    tensors = stored(tmp_path / "hf")
    tensors["model.layers.0.self_attn.nobody.weight"] = tensors.pop("model.layers.0.self_attn.q_norm.weight")
    safetensors.torch.save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"missing_keys: model\.layers\.0\.self_attn\.q_norm\.weight \(1 such\)"):
        verify.transformers_logits(tmp_path / "hf", TOKENS)


def test_tool(tmp_path: Path, run_tool: RunTool) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        """(exit code, everything it said)."""
        code, out, error = run_tool("convert_checkpoint.py", *arguments)
        return code, out + error

    hf, mine, out = tmp_path / "hf", tmp_path / "run", tmp_path / "out"
    make(hf, "mistral", sliding_window=64)
    code, said = run("import", "--hf", hf, "--out", mine)
    assert (code, said.count("\n")) == (1, 1)
    assert "import --max-seq-len 64" in said
    code, said = run("import", "--hf", hf, "--out", mine, "--max-seq-len", 64)
    assert code == 0, said
    assert "checked: largest relative difference of logits" in said
    assert open_dense(mine).config.max_seq_len == 64
    code, said = run("export", "--checkpoint", mine, "--out", out, "--check", "tensors")
    assert code == 0, said
    assert "checked: 21 tensors, bit for bit" in said
    assert same_bytes(stored(out), stored(hf))
    assert run("export", "--hf", hf, "--out", out) == (2, "error: --hf is not of export; leave it out\n")
    assert run("import", "--out", out) == (2, "error: import needs --hf DIR\n")
    code, said = run("export", "--checkpoint", mine, "--out", out)
    assert (code, said.count("\n")) == (1, 1)
    assert "exists already" in said
