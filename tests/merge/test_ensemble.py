"""The ensemble against loops over positions and members with plain softmax; generation against itself uncached."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megabts import assemble
from megabts.build import BUILDERS, load_model, num_parameters, whole_model
from megabts.checkpoint.manifest import read_manifest
from megabts.checkpoint.reader import load_tensors
from megabts.config.load import load_config
from megabts.config.methods import BTMConfig
from megabts.config.run import RunConfig
from megabts.data.indexed import IndexedDatasetBuilder
from megabts.errors import UsageError
from megabts.inference.generate import generate, generate_uncached, score
from megabts.inference.settings import GenerationSettings
from megabts.merge import members as members_module
from megabts.merge.ensemble import Ensemble
from megabts.model.decoder import sequence_loss
from megabts.parallel.layout import check_layout
from tests.bts.folders import write_members
from tests.inference.steps import Batch
from tests.merge.models import MESH, backend, config, dense_like, folders, randomised, windows
from tests.tools import RunTool

PROMPTS = [[5, 17, 30, 3, 12, 8, 1], [9], [21, 21, 7, 4]]


def ensemble(top_k: int = 0, dtype: torch.dtype = torch.float32, *, alike: bool = False, **sizes: object) -> Ensemble:
    btm = BTMConfig(folders(), top_k)
    return randomised(Ensemble(config(**sizes), btm, backend(dtype)), alike=alike).train(False)


def brute_force(model: Ensemble, text: list[int], documents: list[int]) -> Tensor:
    """Probabilities of the next token [s, V] after each position, by Bayes' rule over products of probabilities."""
    tables = []
    for member in model.decoders():
        rows = []
        for t in range(len(text)):  # a member alone, on nothing after t
            rows.append(torch.softmax(score(member, text[: t + 1], eod_id=0)[-1].double(), -1))
        tables.append(rows)
    mixed = []
    for t in range(len(text)):
        posterior = [1.0 / len(tables)] * len(tables)
        for u in range(1, t + 1):
            if documents[u] == documents[t] and documents[u - 1] == documents[t]:
                posterior = [p * float(rows[u - 1][text[u]]) for p, rows in zip(posterior, tables, strict=True)]
        if model.top_k:
            best = sorted(range(len(tables)), key=lambda i: -posterior[i])[: model.top_k]
            posterior = [p if i in best else 0.0 for i, p in enumerate(posterior)]
        shares = [p / sum(posterior) for p in posterior]
        mixed.append(sum((w * rows[t] for w, rows in zip(shares, tables, strict=True)), torch.zeros(())))
    return torch.stack(mixed)


@pytest.mark.parametrize("top_k", [0, 1, 2, 3])
@pytest.mark.parametrize("cross", [True, False])
def test_loss_and_logits_are_bayes_rule(top_k: int, cross: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members_module, "POSITIONS", 6)  # chunks of three positions
    model = ensemble(top_k, torch.float64, cross_document_attention=cross)
    tokens, labels = windows(2, 8)
    tokens = tokens.masked_fill(tokens == 0, 1)
    tokens[0, 3] = tokens[1, 0] = tokens[1, 6] = 0  # documents end
    labels = torch.cat([tokens[:, 1:], labels[:, -1:]], 1)
    ends = (tokens == 0).long()
    documents = ends.cumsum(1) - ends
    mask = torch.ones(2, 8)
    mask[0, 2] = mask[1, 6] = 0
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        numbers = [0] * 8 if cross else documents[row].tolist()
        mixed = brute_force(model, tokens[row].tolist(), numbers)
        logits = score(model, tokens[row].tolist(), eod_id=0)
        torch.testing.assert_close(logits.softmax(-1), mixed, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(logits.exp(), mixed, rtol=1e-9, atol=1e-12)  # they are log-probabilities
        expected -= (mixed.gather(1, labels[row].unsqueeze(1)).squeeze(1).log() * mask[row]).sum()
    found = sequence_loss(model, tokens, labels, mask, document_ids=documents)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@torch.no_grad()
def test_identical_members_are_the_dense_model() -> None:
    model = ensemble(alike=True)
    dense = dense_like(model)
    text = PROMPTS[0]
    torch.testing.assert_close(score(model, text), score(dense, text).log_softmax(-1), rtol=0, atol=1e-6)
    tokens, labels = windows(2, 12)
    mask = torch.ones(2, 12)
    ours, theirs = (sequence_loss(m, tokens, labels, mask) for m in (model, dense))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("top_k", [0, 1])
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_cached_is_uncached_and_batched_is_single(cross: bool, top_k: int, temperature: float) -> None:
    model = ensemble(top_k, cross_document_attention=cross)
    settings = GenerationSettings(max_new_tokens=10, temperature=temperature, eod_id=8)
    fast = generate(model, PROMPTS, settings)
    assert fast == generate_uncached(model, PROMPTS, settings)
    if temperature == 0:
        assert fast == [generate(model, [prompt], settings)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("cross", [True, False])
def test_the_posterior_is_carried_exactly(cross: bool) -> None:
    """Step by step over caches, ragged rows, and with documents that end in prompts and later: as in one pass."""
    model = ensemble(dtype=torch.float64, cross_document_attention=cross)
    following = [8, 12, 8, 14]
    texts = [[*prompt, *following] for prompt in PROMPTS]
    with torch.inference_mode():
        whole = [score(model, text, eod_id=8) for text in texts]
        batch = Batch(model, PROMPTS, 5, eod_id=8)
        logits = batch.begin()
        for step, token in enumerate([*following, 0]):
            expected = torch.stack([row[len(prompt) - 1 + step] for row, prompt in zip(whole, PROMPTS, strict=True)])
            torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
            if step < 4:
                logits = batch.extend(token)


def test_published_size() -> None:
    sizes = load_config(["--model.preset", "paper-2.7b"]).model
    names = ("seed", "code", "math", "law")
    run = RunConfig(method="btm", model=sizes, btm=BTMConfig(folders(names)))
    assert num_parameters(whole_model(run)) == (0, 10_758_893_568)


def test_training_is_refused() -> None:
    run = RunConfig(method="btm", btm=BTMConfig(folders()))
    with pytest.raises(UsageError, match="method btm has nothing to train"):
        check_layout(run, 1)
    with pytest.raises(UsageError, match=r"btm\.top_k is -1"):
        BTMConfig(top_k=-1)
    with pytest.raises(UsageError, match=r"btm\.members has a member named 'a b'"):
        BTMConfig({"a b": "x"})
    with pytest.raises(UsageError, match="a member is named 'train'"):
        BUILDERS["btm"](RunConfig(btm=BTMConfig(folders(("train", "b")))), MESH, backend())


def test_the_tools(tmp_path: Path, run_tool: RunTool) -> None:
    """merge.py writes a manifest that names the members; evaluate.py and generate.py run it."""
    paths = write_members(tmp_path, "seed", "code", max_seq_len=48)
    members = [part for name, path in paths.items() for part in ("--member", f"{name}={path}")]
    out = str(tmp_path / "btm")
    assert run_tool("merge.py", "btm", *members, "--top-k", "1", "--out", out)[0] == 0
    assert load_tensors(Path(out), "model.safetensors") == {}
    assert [record.name for record in read_manifest(Path(out)).members] == ["seed", "code"]
    model = load_model(out, MESH, torch.float32, "cpu").model
    assert isinstance(model, Ensemble)
    assert model.top_k == 1
    with IndexedDatasetBuilder(tmp_path / "ids", np.uint16) as builder:
        builder.add_item(np.arange(65) % 31)
        builder.end_document()
        builder.finalize()
    arguments = ("--checkpoint", out, "--tokenizer", "null:31")
    data = ("--data", f"d={tmp_path / 'ids'}", "--seq-length", "16")
    code, table, _ = run_tool("evaluate.py", *arguments, *data)
    assert code == 0
    tokens = torch.arange(64).view(4, 16) % 31
    loss = sequence_loss(model, tokens, (tokens + 1) % 31, torch.ones(4, 16)).item() / 64
    assert f"{loss:.4f}"[:5] in table
    greedy = ("--prompt", "3 4", "--temperature", "0", "--max-new-tokens", "5")
    code, text, _ = run_tool("generate.py", *arguments, *greedy)
    assert code == 0
    expected = generate(model, [[3, 4]], GenerationSettings(5, stop_ids=(30,), num_ids=31))[0]
    assert text.split() == [str(token) for token in expected]
    code, _, error = run_tool("merge.py", "btm", *members[:2], "--out", out + "2")
    assert code == 2
    assert "needs at least two members" in error
    with pytest.raises(UsageError, match="have the same weights"):
        assemble.combine("btm", {"a": paths["seed"], "b": paths["seed"]}, tmp_path / "twice")
