"""Any model on disk comes back by its folder alone: dense, stitched, Hugging Face; damage is named."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from megabts import assemble
from megabts.bts.model import BTSModel
from megabts.build import load_model, make_backend, new_model, num_parameters, open_model
from megabts.checkpoint.folder import write_checkpoint
from megabts.checkpoint.hf import weights_from_hf
from megabts.checkpoint.manifest import MODEL_FILE, CheckpointError
from megabts.checkpoint.source import CONFIG_FILE
from megabts.checkpoint.storage import LATEST
from megabts.config.load import to_yaml
from megabts.config.methods import BTSConfig
from megabts.config.model import ModelConfig
from megabts.config.run import PrecisionConfig, RunConfig, TrainConfig
from megabts.errors import UserError
from megabts.model.decoder import Decoder
from megabts.model.fp8_linear import E4M3, FP8Weight, quantise
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import ParamMeta
from tests.bts.folders import write_dense, write_members
from tests.bts.reference import SIZES

HF = Path(__file__).parent / "golden" / "bts" / "members"
MESH = ParallelMesh()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def same(ours: dict[str, Tensor], stored: dict[str, Tensor]) -> bool:
    return ours.keys() == stored.keys() and all(torch.equal(ours[name], stored[name]) for name in ours)


def test_dense_checkpoint(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "dense", 1)
    loaded = load_model(folder, MESH, None, "cpu")
    assert isinstance(loaded.model, Decoder)
    assert loaded.config.model == ModelConfig(**SIZES)
    assert (loaded.folder, loaded.members, loaded.tokenizer) == (folder, [], "")
    assert same(tensors(loaded.model), load_file(folder / MODEL_FILE))
    assert num_parameters(loaded.model) == (ModelConfig(**SIZES).num_parameters,) * 2


def test_run_folder_means_its_newest_good_step(tmp_path: Path) -> None:
    for step in (10, 20):
        write_dense(tmp_path / f"step_{step:08d}", step)
    (tmp_path / LATEST).write_text("step_00000020\n")
    loaded = load_model(str(tmp_path), MESH, None, "cpu")
    assert loaded.folder == tmp_path / "step_00000020"
    (tmp_path / "step_00000020" / MODEL_FILE).write_bytes(b"")
    loaded = load_model(tmp_path, MESH, None, "cpu")
    assert loaded.folder == tmp_path / "step_00000010"
    assert same(tensors(loaded.model), load_file(tmp_path / "step_00000010" / MODEL_FILE))


def test_stitched_checkpoint(tmp_path: Path) -> None:
    paths = write_members(tmp_path, "seed", "code")
    assemble.stitch(BTSConfig(paths["seed"], {"code": paths["code"]}, 2), tmp_path / "bts", dtype="bfloat16")
    loaded = load_model(tmp_path / "bts", MESH, None, "cpu")
    assert isinstance(loaded.model, BTSModel)
    assert [record.name for record in loaded.members] == ["hub", "code"]
    assert {tensor.dtype for tensor in tensors(loaded.model).values()} == {torch.bfloat16}
    exact = load_model(tmp_path / "bts", MESH, torch.float32, "cpu").model
    assert isinstance(exact, BTSModel)
    assert same(tensors(exact.hub), load_file(Path(paths["seed"]) / MODEL_FILE))
    stored = open_model(tmp_path / "bts")
    config = stored.config
    assert (config.method, stored.folder, config.bts.hub) == ("bts", tmp_path / "bts", paths["seed"])
    # The same model, built from its members at the start of training instead.
    fresh, records = new_model(config, MESH, make_backend(config, MESH, torch.float32, "cpu"))
    assert same(tensors(fresh), tensors(exact))
    assert records == loaded.members


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_hugging_face_folder(dtype: torch.dtype | None) -> None:
    loaded = load_model(HF / "code", MESH, dtype, "cpu")
    assert loaded.config.method == "dense"
    expected = {name: tensor.to(dtype or torch.float32) for name, tensor in weights_from_hf(HF / "code")}
    assert same(tensors(loaded.model), expected)


def test_hugging_face_folder_is_loaded_as_it_is_stored(tmp_path: Path) -> None:
    shutil.copytree(HF / "code", tmp_path / "hf")
    text = (tmp_path / "hf" / "config.json").read_text()
    (tmp_path / "hf" / "config.json").write_text(text.replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    loaded = load_model(tmp_path / "hf", MESH, None, "cpu")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.tokenizer == str(tmp_path / "hf")


def test_precision_auto_is_what_the_device_multiplies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_dense(tmp_path / "dense", 1)
    run = RunConfig(model=ModelConfig(**SIZES), precision=PrecisionConfig(dtype="auto"))
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("megabts.runtime.device.multiplies_bfloat16", lambda _, native=native: native)
        assert load_model(folder, MESH, None, "cpu", run=run).model.dtype == dtype


def test_with_another_runs_settings(tmp_path: Path) -> None:
    run = RunConfig(model=ModelConfig(**SIZES), train=TrainConfig(recompute="full"))
    loaded = load_model(write_dense(tmp_path / "dense", 1), MESH, None, "cpu", run=run)
    assert loaded.config is run
    larger = RunConfig(model=ModelConfig(**{**SIZES, "vocab_size": 40}))
    with pytest.raises(UserError, match=r"embedding.weight has shape \(31, 16\), the model \(40, 16\)"):
        load_model(tmp_path / "dense", MESH, None, "cpu", run=larger)


def test_damage(tmp_path: Path) -> None:
    paths = write_members(tmp_path, "seed", "code")
    assemble.stitch(BTSConfig(paths["seed"], {"code": paths["code"]}, 1), tmp_path / "bts")
    for folder in (tmp_path / "bts", tmp_path / "seed"):
        file = folder / MODEL_FILE
        good = file.read_bytes()
        for bad in (good[:-1], good[:-1] + bytes([good[-1] ^ 1]), b""):
            file.write_bytes(bad)
            with pytest.raises(CheckpointError, match=rf"{folder.name} is damaged: model\.safetensors") as error:
                load_model(folder, MESH, None, "cpu")
            assert "\n" not in str(error.value)
        file.write_bytes(good)
    (tmp_path / "bts" / "config.yaml").write_text("method: dense\n")
    with pytest.raises(CheckpointError, match=r"bts is damaged: config\.yaml"):
        load_model(tmp_path / "bts", MESH, None, "cpu")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nowhere; give a checkpoint, a run folder or"):
        load_model(tmp_path / "nowhere", MESH, None, "cpu")
    with pytest.raises(UserError, match=str(tmp_path)):
        load_model(tmp_path, MESH, None, "cpu")


def test_a_new_dense_model_depends_on_the_runs_seed_alone() -> None:
    def start(seed: int) -> dict[str, Tensor]:
        config = RunConfig(model=ModelConfig(**SIZES), train=TrainConfig(seed=seed))
        torch.manual_seed(seed + 100)
        model, records = new_model(config, MESH, make_backend(config, MESH, torch.float32, "cpu"))
        assert records == []
        return tensors(model)

    first = start(1)
    torch.rand(1)
    assert same(start(1), first)
    other = start(2)
    assert not torch.equal(other["layers.0.attention.qkv.weight"], first["layers.0.attention.qkv.weight"])
    assert first["layers.0.attention.qkv.weight"].std().item() == pytest.approx(SIZES["init_std"], rel=0.1)


def test_a_library_of_gpus_is_refused_without_one() -> None:
    config = RunConfig(precision=PrecisionConfig(layers="te"))
    with pytest.raises(UserError, match=r"precision\.layers te needs an NVIDIA GPU, and this run is on cpu") as error:
        make_backend(config, MESH, torch.float32, "cpu")
    assert "\n" not in str(error.value)
    assert isinstance(make_backend(config, MESH, torch.float32, "meta"), TorchBackend)


def test_a_run_of_such_a_library_loads_anywhere(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "dense", 1, precision={"layers": "te", "fp8": "current"})
    model = load_model(folder, MESH, None, "cpu").model
    assert same(tensors(model), load_file(folder / MODEL_FILE))
    run = open_model(folder).config
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        load_model(folder, MESH, None, "cpu", run=run)


def test_members_of_a_run_in_fp8_are_rounded_as_they_are_read(tmp_path: Path) -> None:
    """The run's model has what is on disk, rounded, and stores nothing of it; for other uses it loads without FP8."""
    sizes = {"hidden_size": 32, "head_dim": 16, "ffn_size": 32}
    paths = write_members(tmp_path, "seed", "code", **sizes)
    precision = PrecisionConfig(dtype="bfloat16", fp8="current")
    bts = BTSConfig(paths["seed"], {"code": paths["code"]}, 2)
    config = RunConfig("bts", ModelConfig(**{**SIZES, **sizes}), bts, precision=precision)
    model, records = new_model(config, MESH, make_backend(config, MESH, torch.bfloat16, "cpu"))
    held = {name: p for name, p in model.named_parameters() if isinstance(p, FP8Weight)}
    assert len(held) == 2 * 5 * 4
    stored = load_file(Path(paths["code"]) / MODEL_FILE)
    found: dict[str, Tensor] = {name.removeprefix("members.code."): p for name, p in model.named_parameters()}
    assert stored.keys() - found.keys() == {"head.weight", "final_norm.weight"}
    for name in stored.keys() & found.keys():
        ours = found[name]
        if isinstance(ours, FP8Weight):
            values, scale = quantise(stored[name], E4M3)
            assert torch.equal(ours.rounded.values.float(), values.float())
            assert ours.rounded.scale == scale
        else:
            assert torch.equal(ours, stored[name].bfloat16())
    assert not [name for name, _, _ in model.own_parameters() if name.startswith("members.")]
    stitches = {name: parameter.detach() for name, parameter, _ in model.own_parameters()}
    write_checkpoint(
        tmp_path / "bts",
        {MODEL_FILE: stitches},
        {CONFIG_FILE: to_yaml(config).encode()},
        {"step": 0, "tokenizer_fingerprint": ""},
        records,
    )
    loaded = load_model(tmp_path / "bts", MESH, None, "cpu")
    assert loaded.config.precision == PrecisionConfig(dtype="bfloat16")
    assert not [name for name, p in loaded.model.named_parameters() if isinstance(p, FP8Weight)]
    assert same({name: p for name, p in tensors(loaded.model).items() if name in stitches}, stitches)
    again = load_model(tmp_path / "bts", MESH, None, "cpu", run=config).model
    for name, p in again.named_parameters():
        assert isinstance(p, FP8Weight) == (name in held)
        assert torch.equal(p.clone(), model.get_parameter(name).clone())


def test_whole_shapes_need_no_fp8() -> None:
    config = RunConfig("bts", precision=PrecisionConfig(fp8="current"))
    assert make_backend(config, MESH, torch.float32, "meta").frozen().column_linear(ParamMeta((3, 5))).weight.is_meta


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    config = RunConfig("bts", precision=PrecisionConfig(fp8="current"))
    with pytest.raises(UserError, match=r"needs a GPU of compute capability 8\.9 .* this is NVIDIA A100; set") as error:
        make_backend(config, MESH, torch.bfloat16, "cuda:0")
    assert "\n" not in str(error.value)
