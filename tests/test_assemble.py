"""Assembling, adding, removing and averaging on disk: what is written runs, and what must stay stays."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megabts import assemble
from megabts.bts.model import BTSModel
from megabts.build import load_model
from megabts.checkpoint.folder import write_checkpoint
from megabts.checkpoint.hf import weights_from_hf
from megabts.checkpoint.manifest import MODEL_FILE, CheckpointError, read_manifest
from megabts.checkpoint.source import CONFIG_FILE
from megabts.config.load import to_yaml
from megabts.config.methods import BTSConfig
from megabts.config.model import ModelConfig
from megabts.errors import UsageError, UserError
from megabts.parallel.mesh import ParallelMesh
from megabts.tokenizers.build import build_tokenizer
from megabts.tokenizers.protocol import checkpoint_files
from tests.bts.folders import TOKENS, write_dense, write_members
from tests.bts.reference import SIZES, reference_logits, run
from tests.tools import RunTool

ROOT = Path(__file__).parents[1]
HF_MEMBERS = ROOT / "tests" / "golden" / "bts" / "members"
PLAN = [(1, True), (2, False), (5, True)]


def load(folder: Path) -> BTSModel:
    model = load_model(folder, ParallelMesh(), None, "cpu").model
    assert isinstance(model, BTSModel)
    return model.eval()


def own(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / MODEL_FILE)


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def tree_digest(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of runs with the members, and `bts`: three experts, K = 3, random stitches."""
    root = tmp_path_factory.mktemp("once") / "runs"
    paths = write_members(root, "seed", "code", "math", "law")
    bts = BTSConfig(paths["seed"], {name: paths[name] for name in ("code", "math", "law")}, 3)
    config = assemble.stitch(bts, root / "start")
    generator = torch.Generator().manual_seed(8)
    noisy = {name: t + 0.2 * torch.randn(t.shape, generator=generator) for name, t in own(root / "start").items()}
    members = read_manifest(root / "start").members
    write_checkpoint(root / "bts", {MODEL_FILE: noisy}, {CONFIG_FILE: to_yaml(config).encode()}, {"step": 5}, members)
    return root


@pytest.fixture
def trained(runs: Path, tmp_path: Path) -> Path:
    """The BTS checkpoint `bts` in a copy of the tree, which finds its members by relative paths."""
    return shutil.copytree(runs, tmp_path / "runs") / "bts"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stitch_from_checkpoints(tmp_path: Path, dtype: str) -> None:
    paths = write_members(tmp_path, "seed", "code")
    before = tree_digest(tmp_path)
    bts = BTSConfig(paths["seed"], {"code": paths["code"]}, 3, start="hub_leaning", hub_bias=2.0)
    assemble.stitch(bts, tmp_path / "bts", dtype=dtype)  # type: ignore[arg-type]
    after = tree_digest(tmp_path)
    assert {path: after[path] for path in before} == before
    eye = torch.eye(16)
    for name, tensor in own(tmp_path / "bts").items():
        assert tensor.dtype == getattr(torch, dtype)
        constant = 2.0 if name.endswith("hub_bias") else 0.0
        expected = eye if ".projections." in name else torch.full(tensor.shape, constant)
        assert torch.equal(tensor.float(), expected), name
    model = load(tmp_path / "bts")
    assert model.dtype == getattr(torch, dtype)
    assert model.config == ModelConfig(**SIZES)
    for name, folder in paths.items():
        member = model.members["hub" if name == "seed" else name].state_dict()
        stored = own(Path(folder))
        assert all(torch.equal(stored[key].to(model.dtype), tensor) for key, tensor in member.items())


def test_stitch_from_hugging_face_folders(tmp_path: Path) -> None:
    bts = BTSConfig(str(HF_MEMBERS / "hub"), {"code": str(HF_MEMBERS / "code"), "math": str(HF_MEMBERS / "math")})
    assemble.stitch(bts, tmp_path / "bts")
    model = load(tmp_path / "bts")
    assert (model.config.hidden_size, model.config.num_layers) == (32, 8)
    for name in ("hub", "code", "math"):
        weights = dict(weights_from_hf(HF_MEMBERS / name))
        assert all(torch.equal(weights[key], tensor) for key, tensor in model.members[name].state_dict().items())
    assert [record.path for record in read_manifest(tmp_path / "bts").members] == [
        str(HF_MEMBERS / name) for name in ("hub", "code", "math")
    ]


def test_add_leaves_the_old_slices(trained: Path, tmp_path: Path) -> None:
    new = write_dense(tmp_path / "new", 9)
    assemble.add(trained, "new", str(new), tmp_path / "wide")
    before, after = own(trained), own(tmp_path / "wide")
    fresh = after.keys() - before.keys()
    assert {name: digest(after[name]) for name in before} == {name: digest(t) for name, t in before.items()}
    assert fresh == {f"stitches.{i}.{kind}.new.weight" for i in range(3) for kind in ("projections", "gates")}
    for name in fresh:
        assert torch.equal(after[name], torch.eye(16) if "projections" in name else torch.zeros(16, 16))
    model = load(tmp_path / "wide")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == fresh
    assemble.add(trained, "new", str(new), tmp_path / "all", train_all=True)
    trains = {name for name, p in load(tmp_path / "all").named_parameters() if p.requires_grad}
    assert trains == after.keys()


def test_remove_renormalises_the_softmax_over_the_others(trained: Path, tmp_path: Path) -> None:
    """Runs at once and equals the loops over a model made by hand of what is left."""
    assemble.remove(trained, "math", tmp_path / "less")
    model, full = load(tmp_path / "less"), load(trained)
    assert model.bts.members == ("hub", "code", "law")
    kept = {name: p.double() for name, p in full.named_parameters() if ".math." not in name}
    assert kept.keys() == dict(model.named_parameters()).keys()
    bts = BTSConfig("hub", {"code": "", "law": ""}, 3)
    logits = reference_logits(full.config, bts, kept, TOKENS, PLAN)
    ours = model.logits(run(model, TOKENS))
    assert ((ours - logits).abs().max() / logits.abs().max()).item() < 2e-5
    assert not torch.allclose(ours, full.logits(run(full, TOKENS)), rtol=1e-2)


def test_remove_down_to_one_expert_and_no_further(trained: Path, tmp_path: Path) -> None:
    assemble.remove(trained, "math", tmp_path / "two")
    assemble.remove(tmp_path / "two", "law", tmp_path / "one")
    assert load(tmp_path / "one").bts.members == ("hub", "code")
    with pytest.raises(UserError, match="code is the only expert"):
        assemble.remove(tmp_path / "one", "code", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_add_then_remove_is_where_it_began(trained: Path, tmp_path: Path) -> None:
    assemble.add(trained, "new", str(write_dense(tmp_path / "new", 9)), tmp_path / "wide")
    assemble.remove(tmp_path / "wide", "new", tmp_path / "back")
    assert {n: digest(t) for n, t in own(tmp_path / "back").items()} == {n: digest(t) for n, t in own(trained).items()}
    assert torch.equal(load(tmp_path / "back").logits(run(load(tmp_path / "back"), TOKENS)), logits_of(trained))


def logits_of(folder: Path) -> Tensor:
    model = load(folder)
    return model.logits(run(model, TOKENS))


def test_a_checkpoint_of_precision_auto(trained: Path, tmp_path: Path) -> None:
    manifest, text = read_manifest(trained), (trained / CONFIG_FILE).read_text()
    auto = tmp_path / "auto"
    text = text.replace("dtype: float32", "dtype: auto")
    write_checkpoint(auto, {MODEL_FILE: own(trained)}, {CONFIG_FILE: text.encode()}, manifest.state, manifest.members)
    assemble.add(auto, "new", str(write_dense(tmp_path / "new", 9)), tmp_path / "wide")
    assert load(tmp_path / "wide").bts.members[-1] == "new"


def test_the_models_own_tokenizer_is_kept(trained: Path, tmp_path: Path) -> None:
    """Training may have set one although the hub's folder has none."""
    manifest, tokenizer = read_manifest(trained), build_tokenizer("null:31")
    blobs = {CONFIG_FILE: (trained / CONFIG_FILE).read_bytes(), **checkpoint_files(tokenizer)}
    state = {"step": 5, "tokenizer_fingerprint": tokenizer.fingerprint}
    owner = tmp_path / "owner"
    write_checkpoint(owner, {MODEL_FILE: own(trained)}, blobs, state, manifest.members)
    assemble.remove(owner, "math", tmp_path / "less")
    assemble.add(owner, "new", str(write_dense(tmp_path / "new", 9)), tmp_path / "wide")
    for name in ("less", "wide"):
        assert build_tokenizer(tmp_path / name / "tokenizer").name == "null:31"
        assert read_manifest(tmp_path / name).state["tokenizer_fingerprint"] == tokenizer.fingerprint


def test_changed_and_missing_members(trained: Path, tmp_path: Path) -> None:
    root = trained.parent
    (root / "law").rename(root / "gone")
    with pytest.raises(CheckpointError, match=r"member 'law' of .* is not at .*law any more; move it back") as error:
        load(trained)
    assert "\n" not in str(error.value)
    write_dense(root / "law", 77)
    with pytest.raises(CheckpointError, match=r"member 'law' of .* has changed: .* restore the recorded weights"):
        load(trained)
    for action in (
        lambda: assemble.remove(trained, "math", tmp_path / "out"),
        lambda: assemble.add(trained, "new", str(root / "gone"), tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match="member 'law' of"):
            action()
    assert not (tmp_path / "out").exists()


def test_flipped_bit_in_a_member(trained: Path) -> None:
    file = trained.parent / "code" / MODEL_FILE
    data = bytearray(file.read_bytes())
    data[-9] ^= 4
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"code is damaged: model\.safetensors"):
        load(trained)


def test_changed_hugging_face_member(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("hub", "code")}
    for name, path in paths.items():
        path.mkdir()
        for file in ("config.json", MODEL_FILE):
            (path / file).write_bytes((HF_MEMBERS / name / file).read_bytes())
    assemble.stitch(BTSConfig(str(paths["hub"]), {"code": str(paths["code"])}), tmp_path / "bts")
    data = bytearray((paths["code"] / MODEL_FILE).read_bytes())
    data[-1] ^= 1
    (paths["code"] / MODEL_FILE).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"member 'code' of .* has changed"):
        load(tmp_path / "bts")


def test_a_moved_tree_of_runs(trained: Path, tmp_path: Path) -> None:
    before = logits_of(trained)
    (tmp_path / "elsewhere").mkdir()
    moved = trained.parent.rename(tmp_path / "elsewhere" / "runs")
    assert torch.equal(logits_of(moved / trained.name), before)
    assemble.remove(moved / trained.name, "code", moved / "less")
    assert load(moved / "less").bts.experts["law"] == str(moved / "law")


def test_nothing_is_overwritten(trained: Path, tmp_path: Path) -> None:
    paths = write_members(tmp_path, "a", "b")
    before = tree_digest(tmp_path)
    for action in (
        lambda: assemble.stitch(BTSConfig(paths["a"], {"b": paths["b"]}), trained),
        lambda: assemble.add(trained, "new", paths["a"], trained),
        lambda: assemble.remove(trained, "law", trained),
        lambda: assemble.soup({"a": (paths["a"], 1), "b": (paths["b"], 1)}, trained),
    ):
        with pytest.raises(UserError, match="exists already; give another --out"):
            action()
    assert tree_digest(tmp_path) == before


def test_only_stitched_models_have_experts(trained: Path, tmp_path: Path) -> None:
    dense = trained.parent / "seed"
    with pytest.raises(UserError, match="holds a model of method dense; only a BTS model has experts"):
        assemble.remove(dense, "code", tmp_path / "out")
    with pytest.raises(UserError, match="holds a model of method bts, not a dense one; members must be dense"):
        assemble.add(trained, "new", str(trained), tmp_path / "out")
    with pytest.raises(UsageError, match="num_stitch_layers 6 is more than the members' 5 layers"):
        assemble.stitch(BTSConfig(str(dense), {"code": str(trained.parent / "code")}, 6), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_soup_of_checkpoints(tmp_path: Path) -> None:
    paths = write_members(tmp_path, "a", "b", "c")
    weights = {"a": 1.0, "b": 2.0, "c": 1.0}
    assemble.soup({name: (path, weights[name]) for name, path in paths.items()}, tmp_path / "soup")
    parts = [own(Path(path)) for path in paths.values()]
    soup = own(tmp_path / "soup")
    for name, tensor in soup.items():
        expected = np.average([part[name].numpy() for part in parts], axis=0, weights=list(weights.values()))
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-5, atol=1e-7)
    loaded = load_model(tmp_path / "soup", ParallelMesh(), None, "cpu")
    assert (loaded.config.method, loaded.members) == ("dense", [])
    assert all(torch.equal(soup[name], p) for name, p in loaded.model.named_parameters())


def test_soup_of_low_precision_and_unfit_members(tmp_path: Path) -> None:
    paths = write_members(tmp_path, "a", "b", dtype=torch.bfloat16)
    assemble.soup({name: (path, 1) for name, path in paths.items()}, tmp_path / "soup")
    assert {tensor.dtype for tensor in own(tmp_path / "soup").values()} == {torch.bfloat16}
    other = write_dense(tmp_path / "other", 5, ffn_size=40)
    with pytest.raises(UsageError, match=r"ffn_size +24 +40"):
        assemble.soup({"a": (paths["a"], 1), "other": (str(other), 1)}, tmp_path / "out")
    with pytest.raises(UsageError, match="have the same weights"):
        assemble.soup({"a": (paths["a"], 1), "again": (paths["a"], 1)}, tmp_path / "out")


def test_stitch_tool(tmp_path: Path, run_tool: RunTool) -> None:
    seed, code, math = write_members(tmp_path, "seed", "code", "math").values()
    out, wide, less, other = (tmp_path / name for name in ("bts", "wide", "less", "other"))
    arguments = ("--hub", seed, "--expert", f"code={code}", "--num-stitch-layers", 2, "--out", out)
    rc, text, _ = run_tool("stitch.py", *arguments)
    # 2 D x D matrices per expert and layer, and the hub's gate slice in the one Experts-into-Hub layer.
    assert (rc, text.splitlines()[0]) == (0, f"wrote {out}")
    assert text.splitlines()[1].startswith("trained 1,280 of ")
    assert "the paper counts 1,536 of " in text
    rc, text, _ = run_tool("stitch.py", "add", "--checkpoint", out, "--expert", f"math={math}", "--out", wide)
    assert rc == 0
    assert "\ntrained 1,024 of " in text
    assert run_tool("stitch.py", "remove", "--checkpoint", wide, "--expert", "code", "--out", less)[0] == 0
    assert load(less).bts.members == ("hub", "math")
    options = ["--start", "hub_leaning", "--experts-into-hub-only", "--expert-stream", "unchanged"]
    options += ["--num-stitch-layers", "3", "--placement", "1", "4", "5"]
    assert run_tool("stitch.py", "--hub", seed, "--expert", f"a={code}", *options, "--out", other)[0] == 0
    bts = load(other).bts
    assert (bts.start, bts.alternating, bts.expert_stream) == ("hub_leaning", False, "unchanged")
    assert [point.after for point in load(other).plan] == bts.placement == [1, 4, 5]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two dense models and a folder that does not exist, by the words used for them below."""
    root = tmp_path_factory.mktemp("places")
    paths = write_members(root, "seed", "code")
    return {"SEED": paths["seed"], "CODE": paths["code"], "NOWHERE": str(root / "nowhere"), "OUT": str(root / "out")}


MISTAKES = [
    ("stitch --expert code=CODE --out OUT", 2, "give --hub DIR and at least one --expert"),
    ("stitch --hub SEED --out OUT", 2, "give --hub DIR and at least one --expert"),
    ("stitch --hub SEED --expert CODE --out OUT", 2, "is not of the form NAME=DIR"),
    ("stitch --hub SEED --expert a=CODE --expert a=SEED --out OUT", 2, "an expert is named twice"),
    ("stitch --hub SEED --expert a=CODE --num-stitch-layers 9 --out OUT", 2, "num_stitch_layers 9 is more than"),
    ("stitch --hub SEED --expert a=CODE --num-stitch-layers 0 --out OUT", 2, "it must be at least 1"),
    ("stitch --hub SEED --expert a=CODE --placement 4 5 --out OUT", 2, "set bts.num_stitch_layers 2, or another"),
    ("stitch --hub SEED --expert hub=CODE --out OUT", 2, "a member named 'hub'"),
    ("stitch --hub SEED --expert train=CODE --out OUT", 2, "a member named 'train'"),
    ("stitch --hub SEED --expert a=SEED --out OUT", 2, "have the same weights"),
    ("stitch --hub SEED --expert a=NOWHERE --out OUT", 1, "there is no folder"),
    ("stitch --hub SEED --expert a=CODE --out SEED", 1, "exists already"),
    ("stitch remove --expert a --out OUT", 2, "remove needs --checkpoint DIR and one --expert"),
    ("stitch remove --checkpoint SEED --expert a --out OUT", 1, "only a BTS model has experts"),
    ("merge soup --member SEED --out OUT", 2, "at least two --member"),
    ("merge soup --member=-1=SEED --member CODE --out OUT", 2, "at least 0 and have a positive sum"),
    ("merge soup --member nan=SEED --member CODE --out OUT", 2, "must be finite"),
    ("merge soup --member SEED --member CODE --out SEED", 1, "exists already"),
    ("merge soup --member SEED --member NOWHERE --out OUT", 1, "there is no folder"),
]


@pytest.mark.parametrize("line, code, message", MISTAKES, ids=[case[0] for case in MISTAKES])
def test_mistakes_on_the_command_line(
    places: dict[str, str], run_tool: RunTool, line: str, code: int, message: str
) -> None:
    name, *arguments = line.split()
    for word, path in places.items():
        arguments = [argument.replace(word, path) for argument in arguments]
    found, _, error = run_tool(f"{name}.py", *arguments)
    assert found == code
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not Path(places["OUT"]).exists()


def test_mistake_in_a_process_of_its_own(places: dict[str, str]) -> None:
    command = [sys.executable, str(ROOT / "tools/stitch.py"), "--hub", places["SEED"], "--expert", "nameless"]
    done = subprocess.run([*command, "--out", places["OUT"]], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --expert nameless is not of the form NAME=DIR\n"


def test_merge_tool(tmp_path: Path, run_tool: RunTool) -> None:
    a, b = write_members(tmp_path, "a", "b").values()
    out = tmp_path / "soup"
    assert run_tool("merge.py", "soup", "--member", a, "--member", f"3={b}", "--out", out)[:2] == (0, f"wrote {out}\n")
    first, second, mixed = own(Path(a)), own(Path(b)), own(out)
    torch.testing.assert_close(mixed["head.weight"], (first["head.weight"] + 3 * second["head.weight"]) / 4)
