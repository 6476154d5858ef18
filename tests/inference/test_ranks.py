"""Generation on several ranks: the first decides, and the tokens are those of one rank."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megabts.bts.model import BTSModel
from megabts.config.methods import BTSConfig, MoEConfig
from megabts.config.model import ModelConfig
from megabts.config.run import ParallelConfig
from megabts.errors import UsageError
from megabts.inference.decoding import Admission, Step
from megabts.inference.engine import Engine
from megabts.inference.generate import complete
from megabts.inference.ranks import _pack, _unpack, check_mesh, follow
from megabts.inference.rows import Request
from megabts.inference.settings import GenerationSettings
from megabts.model.decoder import Decoder
from megabts.model.torch_backend import TorchBackend
from megabts.moe.model import MoEModel
from megabts.parallel.mesh import Axis, ParallelMesh, build_mesh
from megabts.parallel.sharding import initialise, named_metas
from tests.inference.models import SIZES
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
HUB = ROOT / "tests" / "golden" / "bts" / "members" / "hub"
MEMBERS = {"seed": "seed", "code": "code", "math": "math", "law": "law"}
LONG = [(7 * place) % 61 for place in range(300)]
"""Does not fit into a step's first message."""
SETTINGS = [
    GenerationSettings(9),
    GenerationSettings(5, temperature=1.2, seed=3, repetition_penalty=1.5, logprobs=1),
    GenerationSettings(7, temperature=0.8, top_k=20),
]
PROMPTS = [[5, 17, 42, 3], LONG, [9]]
CASES = ["dense", "mqa", "bts", "mixture", "btx", "bam"]


def local_model(case: str, mesh: ParallelMesh) -> Any:
    """This rank's part; what it starts with does not depend on the mesh."""
    sizes: dict[str, Any] = {**SIZES, "num_layers": 2, "max_seq_len": 400, "num_kv_heads": 1 if case == "mqa" else 2}
    config, backend = ModelConfig(**sizes), TorchBackend(torch.float32, "cpu", mesh.tp)
    model: Any
    if case in ("dense", "mqa"):
        model = Decoder(config, backend)
    elif case in ("btx", "bam"):
        mesh = mesh.routed
        moe = MoEConfig(MEMBERS, attention_experts=case == "bam")
        model = MoEModel(config, moe, backend, experts=mesh.experts)
    else:
        given: dict[str, Any] = {"output": "mixture", "evidence": 3} if case == "mixture" else {}
        bts = BTSConfig("hub", {"code": "code", "math": "math"}, num_stitch_layers=2, **given)
        model = BTSModel(config, bts, backend, ep=mesh.ep)
    initialise(named_metas(model), 3, mesh)
    return model


def asked() -> list[Request]:
    return [Request(p, s, row) for row, (p, s) in enumerate(zip(PROMPTS, SETTINGS, strict=True))]


def arriving(model: Any, mesh: ParallelMesh) -> list[list[int]]:
    """Tokens where requests arrive one by one, beside one that is cancelled; [] on ranks that follow."""
    if mesh.rank > 0:
        follow(model, 350, mesh)
        return []
    with Engine(model, 2, 350, mesh=mesh) as engine:
        rows, stranger = [], engine.submit(Request([1, 2], GenerationSettings(20)))
        for request in asked():
            rows.append(engine.submit(request))
            engine.step()
        engine.cancel(stranger)
        while engine.busy:
            engine.step()
        assert engine.step() == []  # what a server does while nobody asks
    return [row.tokens for row in rows]


def work(rank: int, cases: list[tuple[str, int, int]]) -> list[tuple[list[list[int]], list[list[int]]]]:
    found = []
    for case, tensor, expert in cases:
        mesh = build_mesh(ParallelConfig(tensor=tensor, expert=expert), tensor * expert, rank)
        model = local_model(case, mesh)
        mesh = mesh.routed if case in ("btx", "bam") else mesh
        together = [row.tokens for row in complete(model, asked(), mesh=mesh)]
        found.append((together, arriving(model, mesh)))
    return found


def check(num_ranks: int, cases: list[tuple[str, int, int]]) -> None:
    found = run_ranks(num_ranks, work, cases)
    for number, case in enumerate(cases):
        model = local_model(case[0], ParallelMesh())
        expected = [complete(model, [request])[0].tokens for request in asked()]
        assert found[0][number] == (expected, expected), case
        assert all(other[number] == ([], []) for other in found[1:])


def test_two_ranks() -> None:
    tensor = [(case, 2, 1) for case in CASES]
    check(2, [*tensor, ("bts", 1, 2), ("btx", 1, 2)])


def test_four_ranks() -> None:
    check(4, [("bts", 2, 2)])


def test_a_step_arrives_as_it_was_sent() -> None:
    sent = Step([0, 2], [7, 60], [Admission(31, LONG, None), Admission(2, [5], 9)])
    assert _unpack(_pack(sent)) == sent
    assert _unpack(_pack(Step())) == Step([], [], [])


def test_degrees_without_a_use_are_refused() -> None:
    with pytest.raises(UsageError, match="is 2; generation has no pipeline"):
        check_mesh(ParallelMesh(pp=Axis("pp", 2)))
    with pytest.raises(UsageError, match="2 ranks are more than the model's parts"):
        check_mesh(ParallelMesh(dp=Axis("dp", 2)))


def generate(num_ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """tools/generate.py as a user starts it on several ranks."""
    launcher = ["-m", "megabts.runtime.torchrun", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [sys.executable, *(launcher if num_ranks > 1 else []), str(ROOT / "tools" / "generate.py")]
    given = ["--checkpoint", str(HUB), "--tokenizer", "null:97", "--dtype", "float32", "--max-new-tokens", "9"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *given, *arguments], capture_output=True, text=True, timeout=200, env=environment, cwd=ROOT
    )


def test_the_tool_on_two_ranks() -> None:
    """The same output as on one, once; and what all ranks refuse is one line."""
    prompts = ["--prompt", "5 17 3", "--prompt", "9", "--repetition-penalty", "1.3"]
    alone, together = generate(1, *prompts), generate(2, *prompts, "--parallel.tensor", "2")
    assert together.returncode == 0, together.stderr
    assert together.stdout == alone.stdout
    assert alone.stdout.startswith("[1]\n5 17 3 ")
    assert together.stderr.count("tokens/s") == 1
    refused = generate(2, "--parallel.expert", "2", "--prompt", "1")
    assert refused.returncode != 0
    assert refused.stderr.count("\n") == 1, refused.stderr
    assert refused.stderr.startswith("error: parallel.expert is 2, but a dense model has no experts")


def test_an_error_on_the_first_rank_ends_all(tmp_path: Path) -> None:
    """It alone looks at logits; the other one waits for its next step meanwhile."""
    broken = tmp_path / "hub"
    shutil.copytree(HUB, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    failed = generate(2, "--checkpoint", str(broken), "--parallel.tensor", "2", "--prompt", "5")
    assert failed.returncode != 0
    assert failed.stderr.count("\n") == 1, failed.stderr
    assert failed.stderr.startswith("error: the model's logits are not finite")
