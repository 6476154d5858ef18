"""What is compiled computes what is not: every element-wise function, through whole models, forward and gradients."""

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megabts.bts.model import BTSModel
from megabts.config.methods import BTSConfig
from megabts.config.model import ModelConfig
from megabts.errors import UserError
from megabts.model.decoder import Decoder, sequence_loss
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh
from megabts.runtime import fusion
from megabts.runtime.fusion import can_compile, choose_fuse, compiled, eager

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=48, max_seq_len=16, qk_norm=True
)
needs_compiler = pytest.mark.skipif(not can_compile("cpu"), reason="needs a C++ compiler")


def loss_and_gradients(kind: str, fuse: fusion.Fuse, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    backend = TorchBackend(dtype, "cpu", ParallelMesh().tp, fuse=fuse)
    bts = BTSConfig("hub", {"code": "code", "math": "math"}, num_stitch_layers=2, gate_dropout=0.3)
    model = Decoder(CONFIG, backend) if kind == "dense" else BTSModel(CONFIG, bts, backend)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    tokens, labels = torch.randint(CONFIG.vocab_size, (2, 2, 16), generator=generator).unbind(0)
    loss = sequence_loss(model, tokens, labels, torch.ones(2, 16), dropout_seeds=[3, 4])
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@needs_compiler
@pytest.mark.parametrize("kind", ["dense", "bts"])
def test_compiled_equals_eager(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "SMALLEST", 0)
    expected_loss, expected = loss_and_gradients(kind, eager, torch.float32)
    loss, found = loss_and_gradients(kind, compiled, torch.float32)
    assert abs(loss - expected_loss) < 1e-5 * expected_loss
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).norm() < 1e-5 * grad.norm(), name


@needs_compiler
def test_compiled_is_as_exact_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float32; what is between the operations of one function is not even rounded."""
    monkeypatch.setattr(fusion, "SMALLEST", 0)
    _, exact = loss_and_gradients("bts", eager, torch.float32)
    errors = {}
    for fuse in (eager, compiled):
        _, found = loss_and_gradients("bts", fuse, torch.bfloat16)
        errors[fuse] = sum(float((found[name] - grad).norm() / grad.norm()) for name, grad in exact.items())
    assert errors[compiled] < 1.2 * errors[eager]


def test_what_is_small_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def double(x: Tensor) -> Tensor:
        return 2 * x

    def compiler(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            calls.append(x.numel())
            return function(x)

        return run

    monkeypatch.setattr(torch, "compile", compiler)
    assert compiled(double)(torch.ones(4)).sum() == 8
    assert calls == []
    compiled(double)(torch.ones(fusion.SMALLEST))
    assert calls == [fusion.SMALLEST]


def test_who_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    assert choose_fuse("off", "cpu", 10**6) is eager
    assert choose_fuse("auto", "cpu", fusion.LONG_RUN - 1) is eager
    assert choose_fuse("auto", "cpu", fusion.LONG_RUN) is compiled
    assert choose_fuse("on", "cpu", 1) is compiled
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert choose_fuse("auto", "cpu", fusion.LONG_RUN) is eager
    assert choose_fuse("auto", "cuda", fusion.LONG_RUN) is compiled
    with pytest.raises(UserError, match=r"train\.compile is on, and there is no C\+\+ compiler"):
        choose_fuse("on", "cpu", 1)
