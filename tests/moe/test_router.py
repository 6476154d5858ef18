"""Every routing and its ffn experts against a loop over tokens, forward and every gradient; the balance loss."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megabts.model.attention import Context
from megabts.moe.model import RoutedFeedForward
from megabts.moe.router import balance_loss, gumbel_noise, route, temperature_at, with_loss
from megabts.parallel.sharding import name_seed
from tests.moe.models import moe_model

S, B, N, STEP = 5, 2, 3, 4000
SEEDS = [11, 12]
ZEROS: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
CASES = [
    ("topk", {"routing": "topk", "top_k": 2}, 1),
    ("topk all", {"routing": "topk", "top_k": 3}, 1),
    ("switch", {"routing": "switch"}, 1),
    ("soft", {"routing": "soft"}, 1),
    ("sample", {"routing": "sample"}, 1),
    ("sample, first layer", {"routing": "sample"}, 0),
    ("split", {"routing": "topk", "top_k": 4, "split": 2}, 1),
    ("recompute", {"routing": "topk", "recompute": "selective"}, 1),
]


def gate(logits: Tensor, settings: dict[str, Any], layer: int, noise: Tensor | None) -> Tensor:
    """Weights of all ffn experts for one token's logits [N], by the definitions."""
    n = len(logits)
    p = logits.exp() / logits.exp().sum()
    kind = settings["routing"]
    if kind == "soft" or (kind == "sample" and layer == 0):
        return p
    order = sorted(range(n), key=lambda i: -logits[i].item())
    if kind == "switch":
        return torch.stack([p[i] if i == order[0] else p[i] * 0 for i in range(n)])
    if kind == "topk":
        best = order[: settings.get("top_k", 2)]
        total = sum(logits[i].exp() for i in best)
        return torch.stack([logits[i].exp() / total if i in best else logits[i] * 0 for i in range(n)])
    if noise is None:
        return torch.eye(n, dtype=logits.dtype)[order[0]]
    y = ((logits + noise) / max(0.5, 2.718281828459045 ** (-1e-4 * STEP))).softmax(0)
    return torch.where(y == y.max(), y, torch.zeros_like(y))


def by_token(feed: RoutedFeedForward, x: Tensor, settings: dict[str, Any], layer: int, seeds: Any) -> Any:
    """(output, balance loss) of hidden states [s, b, D], token after token."""
    n = feed.moe.num_ffn_experts
    out, gates, ps = torch.zeros_like(x), [], []
    noise = None
    if seeds is not None:
        noise = gumbel_noise(S, n, [name_seed(f"router {layer}", seed) for seed in seeds], x.device).to(x.dtype)
    for s in range(S):
        for b in range(B):
            logits = feed.router.weight @ x[s, b]
            g = gate(logits, settings, layer, None if noise is None else noise[s, b])
            total = torch.zeros_like(x[s, b])
            for i in range(n):
                wide = feed.experts.gate_up[i] @ x[s, b]
                a, u = wide.split(len(wide) // 2)
                total = total + g[i] * (feed.experts.down[i] @ (a * torch.sigmoid(a) * u))
            out[s, b] = total
            gates.append(g)
            ps.append(logits.softmax(0))
    u, p = sum(gates) / (S * B), sum(ps) / (S * B)
    return out, feed.moe.balance * n * sum(u[i] * p[i] for i in range(n))


@pytest.mark.parametrize("name, settings, layer", CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("training", [True, False])
def test_a_loop_over_tokens_gives_the_same(name: str, settings: dict[str, Any], layer: int, training: bool) -> None:
    model = moe_model(balance=0.3, **settings).train(training)
    feed = model.layers[str(layer)].mlp
    assert isinstance(feed, RoutedFeedForward)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(S, B, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(S, B, 16, dtype=torch.float64, generator=generator)
    context = Context((x, x), dropout_seeds=SEEDS, step=STEP)
    seeds = SEEDS if training and settings["routing"] == "sample" else None
    wanted, loss = by_token(feed, x, settings, layer, seeds)
    parameters = [x, *feed.parameters()]
    # Of the balance loss the gradient is per token, as the trainer divides by tokens.
    expected = torch.autograd.grad((wanted * weight).sum() + (loss * S * B if training else 0.0), parameters, **ZEROS)
    out = feed(x, context, layer)
    assert torch.allclose(out, wanted, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad((out * weight).sum(), parameters, **ZEROS)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-11 * theirs.abs().max()


def test_ffn_experts_without_tokens_get_zero_gradients() -> None:
    feed = moe_model(routing="switch", balance=0.0).layers["0"].mlp
    assert isinstance(feed, RoutedFeedForward)
    x = torch.ones(1, 1, 16, dtype=torch.float64)
    feed(x, Context((x, x)), 0).sum().backward()
    assert feed.experts.down.grad is not None
    used = [bool(grad.any()) for grad in feed.experts.down.grad]
    assert used.count(True) == 1


def test_balance_loss_by_its_formula() -> None:
    logits = torch.tensor([[[2.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]], dtype=torch.float64)
    routes = route(logits, "topk", 1, layer=0)
    p = logits[:, 0].softmax(-1).mean(0)
    assert balance_loss(routes, 0.01).item() == pytest.approx(0.01 * 3 * (0.5 * p[0] + 0.5 * p[1]).item())
    even = route(torch.zeros(4, 2, 5), "soft", 1, layer=0)
    assert balance_loss(even, 0.01).item() == pytest.approx(0.01)


def test_a_loss_inside_gets_its_own_gradient() -> None:
    x, loss = torch.ones(3, requires_grad=True), torch.ones((), requires_grad=True)
    (with_loss(x, loss, 7.0) * 2).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]
    assert loss.grad is not None
    assert loss.grad.item() == 7


def test_noise_belongs_to_the_sample_and_is_gumbel() -> None:
    both, second = gumbel_noise(7, 3, [1, 2], torch.device("cpu")), gumbel_noise(7, 3, [2], torch.device("cpu"))
    assert torch.equal(both[:, 1:], second)
    many = gumbel_noise(20000, 1, [1], torch.device("cpu"))
    assert many.mean().item() == pytest.approx(0.5772, abs=0.03)
    assert many.var().item() == pytest.approx(1.6449, abs=0.08)


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0]).expand(20000, 1, 3)
    routes = route(logits, "sample", 1, layer=1, seeds=[4])
    shares = routes.chosen.flatten().bincount(minlength=3) / 20000
    assert torch.allclose(shares, logits[0, 0].softmax(0), atol=0.015)


def test_temperature_falls_to_a_half() -> None:
    assert (temperature_at(0), temperature_at(10**6)) == (1.0, 0.5)
    assert temperature_at(1000) == pytest.approx(0.904837418)
