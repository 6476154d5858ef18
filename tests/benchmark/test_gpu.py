"""The GPU suite on CPU, with next to no model: its rounds train and decode, its yardstick computes alike, its rows."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megabts.benchmark import gpu, gpu_rounds
from megabts.benchmark.contestants import Round
from megabts.benchmark.gpu import FP8, PLAIN, TE, TORCH, TORCH_FP8, Timed
from megabts.benchmark.gpu_rounds import Work, make_model, plain_loss, preset
from megabts.benchmark.suite import Settings
from megabts.bts.model import BTSModel
from megabts.config.model import ModelConfig
from megabts.config.run import PrecisionConfig
from megabts.errors import UserError
from megabts.model.decoder import sequence_loss
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import named_metas
from megabts.planner.gpus import GPUS
from megabts.train.step import StepResult
from tests.tools import RunTool

CPU = torch.device("cpu")
TINY = ModelConfig(vocab_size=61, hidden_size=32, num_layers=8, num_heads=4, num_kv_heads=1, ffn_size=48)
DENSE = Work("dense_tiny", TINY, False, length=16, sequences=8)
STITCHED = Work("bts_tiny", replace(TINY, num_layers=4), True, length=4, sequences=4)
"""Of few tokens and layers: FP8 products are slow on CPU."""


def bytes_kept(work: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What it returns, and how much autograd keeps for its backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return work(), sum(kept.values())


def test_the_plain_step_computes_the_same_and_keeps_all_layers() -> None:
    model = make_model(TINY, True, TorchBackend(torch.float32, CPU, ParallelMesh().tp))
    assert isinstance(model, BTSModel)
    torch.manual_seed(1)
    for _, parameter, _ in model.own_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tokens = torch.randint(TINY.vocab_size, (2, 17))
    inputs, labels, seeds = tokens[:, :-1], tokens[:, 1:], range(3, 5)
    found = []
    for loss_of in (
        lambda: plain_loss(model, inputs, labels, seeds),
        lambda: sequence_loss(model, inputs, labels, torch.ones(2, 16), dropout_seeds=seeds) / labels.numel(),
    ):
        loss, kept = bytes_kept(loss_of)
        loss.backward()
        grads = [parameter.grad.clone() for _, parameter, _ in model.own_parameters() if parameter.grad is not None]
        found.append((loss, grads, kept))
        model.zero_grad()
    (plain, plain_grads, plain_kept), (ours, our_grads, our_kept) = found
    torch.testing.assert_close(plain, ours, rtol=1e-5, atol=0)
    assert len(plain_grads) == len(our_grads) == len(list(model.own_parameters())) == 2 * (6 + 7)
    assert any(grad.abs().max() > 1e-4 for grad in our_grads)
    for mine, other in zip(our_grads, plain_grads, strict=True):
        torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-7)
    assert not [name for name, p in model.members.named_parameters() if p.grad is not None]
    assert plain_kept > 1.2 * our_kept


@pytest.mark.parametrize("stitched", [False, True])
def test_values_are_as_at_the_start(stitched: bool) -> None:
    model = make_model(TINY, stitched, TorchBackend(torch.float32, CPU, ParallelMesh().tp))
    tokens = torch.randint(TINY.vocab_size, (1, 17), generator=torch.Generator().manual_seed(0))
    loss = sequence_loss(model, tokens[:, :-1], tokens[:, 1:], torch.ones(1, 16)) / 16
    assert float(loss.detach()) == pytest.approx(4.11, abs=0.1)  # ln 61
    if stitched:
        values = {name: parameter.detach() for name, parameter, _ in named_metas(model)}
        one, other = (values[f"members.{name}.layers.0.mlp.down.weight"] for name in ("hub", "expert1"))
        assert (one != other).all()
        assert float(one.std()) == pytest.approx(TINY.init_std / 4, rel=0.1)
        assert torch.equal(values["stitches.1.projections.expert2.weight"], torch.eye(32))


def test_operations_of_the_papers_model() -> None:
    config = preset("paper-2.7b")
    d, width, s = config.hidden_size, config.num_heads * config.head_dim, 4096
    weights = config.num_parameters - 2 * config.vocab_size * d - (2 * config.num_layers + 1) * d
    head = 2 * d * config.vocab_size
    for causal, share in ((True, 0.5), (False, 1.0)):
        layer = 2 * weights / config.num_layers + share * 4 * s * width
        dense = 3 * (config.num_layers * layer + head)
        assert Work("", config, False).operations(causal=causal) == pytest.approx(8 * s * dense)
        # Four members of 20 layers run. Gradient passes three experts from layer 5 to 10, then all, to the hub's head.
        # Six matrices of D x D in each Hub-into-Experts layer and seven in each other one train.
        bts = (4 * 20 + 3 * 5 + 4 * 10) * layer + 2 * head + 3 * 2 * 2 * (6 + 7) * d * d
        assert Work("", config, True).operations(causal=causal) == pytest.approx(8 * s * bts)
    matrices = 4 * weights + 2 * (6 + 7) * d * d + config.vocab_size * d
    norms = (4 * 2 * config.num_layers + 1) * d
    assert gpu.read_bytes(config) == 2 * (matrices + norms)


def test_rows_of_known_seconds() -> None:
    work, card = Work("w", preset("paper-2.7b"), True), GPUS["h200"]
    unit = work.operations() / card.bf16  # a step at the peak of bf16
    timed = {
        TORCH: Timed([4 * unit, 4 * unit], 10**9, 4),
        TORCH_FP8: Timed([2.5 * unit, 2.5 * unit], 10**9, 4),
        TE: Timed([2 * unit, 2 * unit], 2 * 10**9, 4),
        FP8: Timed([1 * unit, 2 * unit], 3 * 10**9, 2),
        PLAIN: Timed([5 * unit, 5 * unit], 4 * 10**9, 1),
    }
    rows = {row.name: row for row in gpu.training_rows(work, timed, card, 1.3)}
    assert rows["w.torch_bf16.tokens_per_second"].value.median == pytest.approx(8 * 4096 / (4 * unit))
    assert rows["w.torch_bf16.mfu"].value.median == pytest.approx(0.25)
    assert rows["w.te_fp8.mfu"].value.median == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert rows["w.torch_fp8.mfu"].value.median == pytest.approx(1 / 5)
    assert rows["w.torch_fp8_vs_bf16"].value.median == pytest.approx(1.6)
    assert 0.25 < rows["w.torch_bf16.mfu_full_attention"].value.median < 0.3
    assert rows["w.te_fp8.peak_gb"].value.median == 3
    assert rows["w.plain.tokens_per_second"].note == "micro-batches of 1"
    assert rows["w.bf16_mfu"].value.median == pytest.approx(0.5)
    assert rows["w.bf16_mfu"].note == TE
    fp8, plain = rows["w.fp8_vs_bf16"], rows["w.bf16_vs_plain"]
    assert fp8.value.median == pytest.approx(1.5)
    assert plain.value.median == pytest.approx(2.5)
    assert [row.line and row.line.bound for row in (rows["w.bf16_mfu"], fp8, plain)] == [0.5, 1.3, 1.8]
    alone = {row.name: row for row in gpu.training_rows(work, {TORCH: timed[TORCH]}, card, None)}
    assert len(alone) == 5
    assert "Transformer Engine is not installed" in alone["w.bf16_mfu"].note
    step = Timed([1.0, 1.0], 10**9, 16)
    speed, share, _ = gpu.decode_rows("d", 4_320_000_000, 16, 101, step, card)
    assert speed.value.median == pytest.approx(1600)
    assert share.value.median == pytest.approx(0.1)  # 1 ms of 10


@pytest.mark.parametrize("work", [DENSE, STITCHED], ids=["dense", "stitched"])
def test_training_runs_from_end_to_end(work: Work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "card_of", lambda device: GPUS["h200"])
    monkeypatch.setattr(gpu, "have_te", lambda: False)
    said: list[str] = []
    settings = Settings(scale=0.1, progress=said.append, profile=tmp_path)
    rows = gpu.train(settings, work, plain=work.stitched, device=CPU)
    names = [row.name.removeprefix(f"{work.place}.") for row in rows]
    kinds = ("tokens_per_second", "mfu", "mfu_full_attention", "peak_gb")
    contestants = (TORCH, TORCH_FP8, PLAIN) if work.stitched else (TORCH,)
    expected = [f"{contestant}.{kind}" for contestant in contestants for kind in kinds]
    assert names == [*expected, "bf16_mfu", *(["torch_fp8_vs_bf16", "bf16_vs_plain"] if work.stitched else [])]
    assert all(row.value.median > 0 for row in rows)
    assert rows[0].note == "micro-batches of 4"
    assert said[0] == gpu.NO_TE
    profiles = {f"{work.place}.{contestant}.txt" for contestant in contestants}
    assert {path.name for path in tmp_path.iterdir()} == profiles
    assert said[-1] == f"profile: {tmp_path / f'{work.place}.{contestants[-1]}.txt'}"


def test_decoding_runs_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "card_of", lambda device: GPUS["h200"])
    monkeypatch.setattr(gpu, "BATCHES", (2,))
    rows = gpu.decode(Settings(scale=0.03, profile=tmp_path), TINY, CPU)
    profile = (tmp_path / "decode_bts.batch_2.txt").read_text()
    assert {"prompts", "steps", "aten::bmm"} < set(profile.split())
    kinds = ("tokens_per_second", "bandwidth_share", "peak_gb")
    names = [f"decode_bts.batch_2{way}.{kind}" for way in ("", "_eager") for kind in kinds]
    assert [row.name for row in rows] == [*names, "decode_bts.batch_2_graphs_vs_eager"]
    assert all(row.value.median > 0 for row in rows)


def test_the_plain_step_trains() -> None:
    run = gpu_rounds.make_plain_round(STITCHED, PrecisionConfig(), CPU, 4)
    run()
    run()


def test_a_step_that_does_not_train_is_no_round(monkeypatch: pytest.MonkeyPatch) -> None:
    result = StepResult(float("nan"), 1.0, 1e-4, 128, "the loss is nan")
    monkeypatch.setattr(gpu_rounds, "train_step", lambda *arguments: result)
    run = gpu_rounds.make_round(DENSE, PrecisionConfig(), CPU, 4)
    with pytest.raises(UserError, match=r"^a step did not train: the loss is nan$"):
        run()


def small(largest: int, error: Exception, size: int) -> Round:
    """A round that so many sequences fit into."""

    def run() -> float:
        if size > largest:
            raise error
        return float(size)

    return run


def test_the_largest_micro_batch_that_fits_is_taken() -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    said: list[str] = []
    took = gpu.measured("one", partial(small, 2, full), 2, CPU, Settings(progress=said.append), sizes=(4, 2, 1))
    assert (took.micro_batch, took.seconds) == (2, [2.0, 2.0])
    assert took.peak_bytes > 10**7
    assert said[0] == "one: 4 at one time do not fit"
    with pytest.raises(UserError, match=r"^one: OutOfMemoryError: CUDA out of memory"):
        gpu.measured("one", partial(small, 0, full), 2, CPU, Settings(progress=said.append), sizes=(1,))
    with pytest.raises(UserError, match=r"^one: ValueError: wrong"):
        gpu.measured("one", partial(small, 0, ValueError("wrong")), 2, CPU, Settings())


def test_the_card_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, key in (
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
    ):
        monkeypatch.setattr(gpu, "gpu_model", lambda device, name=name: name)
        assert gpu.card_of(gpu.GPU) is GPUS[key]
    monkeypatch.setattr(gpu, "gpu_model", lambda device: "NVIDIA T4")
    with pytest.raises(UserError, match=r"^the peaks of NVIDIA T4 are not known; run the gpu suite on one of .*h200"):
        gpu.card_of(gpu.GPU)


def test_without_a_gpu_it_ends_with_one_line(run_tool: RunTool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megabts.runtime.device.gpu_names", list)
    for flags in ((), ("--only", "bts-2.7b")):
        code, out, err = run_tool("benchmark.py", "--suite", "gpu", *flags)
        assert (code, out) == (1, "")
        assert err == "error: the gpu suite needs an NVIDIA GPU, and torch finds none here; use --suite cpu\n"
