"""tools/evaluate.py and tools/generate.py on a mixture of ffn experts and on expert routing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megabts import assemble
from megabts.build import load_model
from megabts.checkpoint.folder import write_checkpoint
from megabts.checkpoint.manifest import MODEL_FILE, read_manifest
from megabts.checkpoint.reader import load_tensors
from megabts.checkpoint.source import CONFIG_FILE
from megabts.config.methods import MoEConfig
from megabts.config.run import RunConfig
from megabts.inference.generate import generate, score
from megabts.inference.settings import GenerationSettings
from megabts.merge.routing import Routing
from megabts.model.decoder import Model
from megabts.moe.model import MoEModel
from megabts.parallel.mesh import ParallelMesh
from tests.bts.folders import write_members
from tests.tools import RunTool
from tests.train.runs import make_ids

SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 16, "num_layers": 2, "ffn_size": 24, "init_std": 0.3}
SEQ, WINDOWS, PROMPT, NEW = 16, 6, [5, 17, 3], 7


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints `moe` and `routing` of the same members, their routers random, and a dataset `ids`."""
    folder = tmp_path_factory.mktemp("models")
    make_ids(folder / "ids")
    members = write_members(folder, "seed", "code", "math", **SIZES)
    assemble.upcycle(RunConfig(moe=MoEConfig(members)), folder / "moe")
    assemble.combine("routing", members, folder / "start")
    tensors = load_tensors(folder / "start", MODEL_FILE)
    tensors["router.weight"] = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    blobs = {CONFIG_FILE: (folder / "start" / CONFIG_FILE).read_bytes()}
    records = read_manifest(folder / "start").members
    write_checkpoint(folder / "routing", {MODEL_FILE: tensors}, blobs, {"step": 0}, records)
    return {name: folder / name for name in ("ids", "moe", "routing", *members)}


def load(folder: Path) -> Any:
    return load_model(folder, ParallelMesh(), torch.float32, "cpu").model


def window_loss(model: Model, window: list[int]) -> float:
    with torch.inference_mode():
        return float(F.cross_entropy(score(model, window[:-1]), torch.tensor(window[1:]), reduction="sum"))


def choice(routing: Routing, tokens: list[int]) -> int:
    """The member whose router row agrees most with the mean embedding, by the first member's."""
    return int((routing.router.weight @ routing.decoders()[0].embedding.weight[tokens].mean(0)).argmax())


@pytest.mark.parametrize("name", ["moe", "routing"])
def test_evaluate(run_tool: RunTool, models: dict[str, Path], tmp_path: Path, name: str) -> None:
    text = np.fromfile(f"{models['ids']}.bin", np.uint16).tolist()
    count = (len(text) - 1) // SEQ
    starts = [number * count // WINDOWS * SEQ for number in range(WINDOWS)]
    windows = [text[start : start + SEQ + 1] for start in starts]
    given = [
        "--data",
        f"ids={models['ids']}",
        "--seq-length",
        str(SEQ),
        "--samples",
        str(WINDOWS),
        "--micro-batch",
        "4",
    ]
    code, _, err = run_tool("evaluate.py", "--checkpoint", models[name], *given, "--json", tmp_path / "losses.json")
    assert code == 0, err
    found = json.loads((tmp_path / "losses.json").read_text())["ids"]
    judges = [load(models[name])] * WINDOWS
    if name == "routing":
        members = [load(models[member]) for member in ("seed", "code", "math")]
        chosen = [choice(judges[0], window[:-1]) for window in windows]
        assert len(set(chosen)) > 1
        judges = [members[index] for index in chosen]
    losses = [window_loss(judge, window) for judge, window in zip(judges, windows, strict=True)]
    assert found["tokens"] == SEQ * WINDOWS
    assert found["loss"] == pytest.approx(sum(losses) / found["tokens"], rel=1e-5)


@pytest.mark.parametrize("name", ["moe", "routing"])
def test_generate(run_tool: RunTool, models: dict[str, Path], name: str) -> None:
    arguments = ("--tokenizer", "null:97", "--temperature", "0", "--max-new-tokens", NEW, "--prompt", "5 17 3")
    code, out, err = run_tool("generate.py", "--checkpoint", models[name], *arguments)
    assert code == 0, err
    judge = load(models[name])
    if name == "routing":
        judge = load(models[("seed", "code", "math")[choice(judge, PROMPT)]])
    settings = GenerationSettings(NEW, stop_ids=(96,))
    assert [int(token) for token in out.split()] == generate(judge, [PROMPT], settings)[0]
    code, _, err = run_tool("generate.py", "--checkpoint", models["routing"], *arguments, "--gates")
    assert code == 2
    assert "is a routing model and has no gates" in err


def test_gates_of_a_mixture(run_tool: RunTool, models: dict[str, Path]) -> None:
    arguments = (
        "--tokenizer",
        "null:97",
        "--temperature",
        "0",
        "--max-new-tokens",
        NEW,
        "--prompt",
        "5 17 3",
        "--gates",
    )
    code, out, err = run_tool("generate.py", "--checkpoint", models["moe"], *arguments)
    assert code == 0, err
    completion, title, names, first, last, second_title, *rows = [line for line in out.splitlines() if line]
    tokens = [*PROMPT, *map(int, completion.split())]
    model, inputs = load(models["moe"]), []
    assert isinstance(model, MoEModel)
    hook = model.layers["1"].mlp.register_forward_pre_hook(lambda _, given: inputs.append(given[0][:, 0]))
    with torch.no_grad():
        score(model, tokens)
    hook.remove()
    p = (inputs[0] @ model.layers["1"].mlp.router.weight.T).softmax(-1).tolist()
    best = [sorted(range(3), key=lambda index, row=row: -row[index])[:2] for row in p]
    weights = [[row[index] / sum(row[i] for i in pair) for index in pair] for row, pair in zip(p, best, strict=True)]
    members = ("seed", "code", "math")
    assert f" {len(tokens)} tokens" in title
    assert names.split() == ["layer", *members, "entropy"]
    assert first.split()[0] == "0"
    shares = [sum(pair.count(index) for pair in best) / len(tokens) / 2 for index in range(3)]
    assert last.split()[2:7:2] == [f"{share:.1%}" for share in shares]
    means = [
        sum(w for row, pair in zip(weights, best, strict=True) for w, i in zip(row, pair, strict=True) if i == index)
        for index in range(3)
    ]
    assert [float(cell) for cell in last.split()[1:7:2]] == pytest.approx([m / len(tokens) for m in means], abs=6e-4)
    assert float(last.split()[-1]) == pytest.approx(-sum(q * np.log(q) for row in p for q in row) / len(p), abs=6e-4)
    assert second_title.startswith("last layer")
    for token, row, pair, share in zip(tokens, rows, best, weights, strict=True):
        assert row.split()[0] == repr(str(token))
        assert row.split()[1::2] == [members[index] for index in pair]
        assert [float(cell) for cell in row.split()[2::2]] == pytest.approx(share, abs=6e-4)
