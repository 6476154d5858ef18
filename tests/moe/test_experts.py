"""ffn experts on two ranks with different tokens, and their products in one kernel, against one after another."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megabts.config.run import ParallelConfig
from megabts.model.torch_backend import TorchBackend
from megabts.moe.adapters import Adapters
from megabts.moe.experts import FFNExperts
from megabts.moe.router import Routes, soft, top_k
from megabts.parallel.mesh import Axis, ParallelMesh, build_mesh
from megabts.parallel.sharding import initialise, named_metas
from tests.ranks import run_ranks

N, D, WIDTH = 4, 16, 24
TOKENS = {"uneven": (7, 3), "one rank's ffn experts have no tokens": (5, 4), "soft, uneven": (6, 2), "adapters": (4, 4)}


def ffn_experts(
    experts: Axis, *, adapters: bool = False, dtype: torch.dtype = torch.float64, recompute: str = "none"
) -> FFNExperts:
    """Random ones: on `experts`, a share of those that there are on one rank."""
    backend = TorchBackend(dtype, "cpu", Axis("tp"))
    adapter = Adapters(N, D, backend, experts) if adapters else None
    module = FFNExperts(N, D, WIDTH, (0.3, 0.3), backend, recompute, experts, adapters=adapter)  # type: ignore[arg-type]
    initialise(named_metas(module), 1, ParallelMesh())
    if adapter:
        full = torch.randn(N, D, D, generator=torch.Generator().manual_seed(3), dtype=dtype)
        adapter.weight.data.copy_(adapter.metas["weight"].shard(full, Axis("tp")))
    return module


def inputs(case: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of both ranks: tokens [T, D], logits [T, N], gradients of the output [T, D]."""
    generator = torch.Generator().manual_seed(len(case))
    draw = [[torch.randn(t, size, generator=generator).double() for t in TOKENS[case]] for size in (D, N, D)]
    if "no tokens" in case:
        for logits in draw[1]:
            logits[:, 2:] -= 100
    return draw[0], draw[1], draw[2]


def routes(case: str, logits: Tensor) -> Routes:
    return soft(logits) if "soft" in case else top_k(logits, 2)


def work(rank: int) -> dict[str, list[Tensor]]:
    """Of every case: output, gradients of tokens, logits and parameters."""
    axis = build_mesh(ParallelConfig(expert=2), 2, rank).routed.experts
    found = {}
    for case in TOKENS:
        module = ffn_experts(axis, adapters=case == "adapters")
        hidden, logits, grad = (both[rank].requires_grad_() for both in inputs(case))
        out = module(hidden, routes(case, logits))
        out.backward(grad)
        gradients = [parameter.grad for parameter in (hidden, logits, *module.parameters())]
        assert all(gradient is not None for gradient in gradients)
        found[case] = [out.detach(), *(gradient for gradient in gradients if gradient is not None)]
    return found


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, list[Tensor]]]:
    return run_ranks(2, work)


@pytest.mark.parametrize("case", TOKENS)
def test_ranks_with_different_tokens_equal_the_formula(two_ranks: list[dict[str, list[Tensor]]], case: str) -> None:
    module = ffn_experts(Axis("experts"), adapters=case == "adapters")
    hidden, logits, grad = (torch.cat(both).requires_grad_() for both in inputs(case))
    outputs = []
    for index in range(N):
        gate, up = F.linear(hidden, module.gate_up[index]).chunk(2, -1)
        output = F.linear(F.silu(gate) * up, module.down[index])
        outputs.append(F.linear(output, module.adapters.weight[index]) if module.adapters else output)
    out = torch.einsum("tn,ntd->td", routes(case, logits).gates(), torch.stack(outputs))
    out.backward(grad)
    expected = [out, hidden.grad, logits.grad, *(parameter.grad for parameter in module.parameters())]
    for whole, *parts in zip(expected, *(found[case] for found in two_ranks), strict=True):
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_one_kernel_equals_one_after_another(monkeypatch: pytest.MonkeyPatch, recompute: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, grad = (torch.randn(40, D, generator=generator).bfloat16() for _ in range(2))
    logits = torch.randn(40, N, generator=generator)
    logits[:, 1] -= 100  # nobody's choice
    found = []
    for grouped in (False, True):
        monkeypatch.setattr(FFNExperts, "_groups", lambda *_, grouped=grouped: grouped)
        module = ffn_experts(Axis("experts"), dtype=torch.bfloat16, recompute=recompute)
        x = hidden.clone().requires_grad_()
        out = module(x, top_k(logits, 2))
        out.backward(grad)
        found.append([out, x.grad, module.gate_up.grad, module.down.grad])
    assert not found[0][2][1].any()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=0.01, atol=0.01 * one.detach().abs().max().item())
