"""BAM and its adapters: a loop over tokens and heads, identical members, published sizes, FLOPs, upcycling, caches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megabts.build import num_parameters, whole_model
from megabts.checkpoint.manifest import MODEL_FILE
from megabts.checkpoint.reader import load_tensors
from megabts.config.load import load_config
from megabts.config.methods import MoEConfig
from megabts.config.model import ModelConfig
from megabts.config.run import RunConfig
from megabts.errors import UsageError
from megabts.inference.generate import generate, generate_uncached, score
from megabts.inference.settings import GenerationSettings
from megabts.model.attention import Context, make_context
from megabts.model.decoder import sequence_loss
from megabts.moe.adapters import Adapters
from megabts.moe.attention import RoutedAttention
from megabts.moe.flops import moe_costs, moe_flops
from megabts.moe.model import MoEModel, RoutedFeedForward
from megabts.moe.router import Router
from megabts.moe.upcycle import upcycle, wanted
from tests.bts.folders import write_dense
from tests.moe.models import SIZES, dense_model, moe_model, tokens
from tests.tools import RunTool

TEXT = [3, 7, 1, 30, 12, 4, 0, 29, 5]
BAM: dict[str, Any] = {"attention_experts": True}
ADAPTERS: dict[str, Any] = {**BAM, "adapters": True}
METHODS = [pytest.param(BAM, id="bam"), pytest.param(ADAPTERS, id="adapters")]
S, B, D, HEADS, KV, HD, EPS = 6, 2, 16, 4, 2, 4, 1e-5


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def upcycled(members: list[dict[str, Tensor]], dtype: torch.dtype, sizes: dict[str, Any], **settings: Any) -> MoEModel:
    """A MoE model of these members' weights."""
    model = moe_model(dtype=dtype, sizes=sizes, **settings).train(False)
    metas = {name: meta for name, _, meta in model.own_parameters()}
    orders = [wanted(metas, index, len(members)) for index in range(len(members))]
    streams = [[(name, one[name]) for name in order] for one, order in zip(members, orders, strict=True)]
    model.load_state_dict(dict(upcycle(metas, model.moe, streams, 0)))
    return model


def trained(model: MoEModel) -> MoEModel:
    """With adapters and norms away from their start."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters" in name or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator), alpha=0.3)
    return model


def turned(head: Tensor, position: int, theta: float) -> Tensor:
    """Rotary positions by complex numbers: dimension j is the real, j + hd / 2 the imaginary part.

    Angles, their cosines and sines are of float32, as Llama defines them.
    """
    half = len(head) // 2
    angles = position * (1 / theta ** (torch.arange(half) / half))
    number = torch.complex(head[:half], head[half:]) * torch.complex(angles.cos().double(), angles.sin().double())
    return torch.cat([number.real, number.imag])


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean() + EPS).sqrt() * weight


def attention_by_head(expert: Any, x: Tensor, config: ModelConfig) -> Tensor:
    """One attention expert on one text [s, D]."""
    queries, keys, values = [], [], []
    for position, row in enumerate(x):
        heads = (expert.qkv.weight @ row + expert.qkv.bias).split(HD)
        q, k = heads[:HEADS], heads[HEADS : HEADS + KV]
        queries.append([turned(normed(head, expert.q_norm.weight), position, config.rope_theta) for head in q])
        keys.append([turned(normed(head, expert.k_norm.weight), position, config.rope_theta) for head in k])
        values.append(heads[HEADS + KV :])
    rows = []
    for t in range(len(x)):
        mixed = []
        for head in range(HEADS):
            group = head * KV // HEADS
            scores = torch.stack([queries[t][head] @ keys[u][group] / HD**0.5 for u in range(t + 1)])
            weights = scores.exp() / scores.exp().sum()
            mixed.append(sum(weights[u] * values[u][group] for u in range(t + 1)))
        rows.append(expert.out.weight @ torch.cat(mixed))
    return torch.stack(rows)


@pytest.mark.parametrize("settings", METHODS)
def test_a_loop_over_tokens_gives_the_same_attention(settings: dict[str, Any]) -> None:
    sizes = {**SIZES, "qk_norm": True, "qkv_bias": True, "norm_eps": EPS}
    model = trained(moe_model(sizes=sizes, **settings))
    routed = model.layers["1"].attention
    assert isinstance(routed, RoutedAttention)
    routed.requires_grad_(True)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(S, B, D, dtype=torch.float64, generator=generator, requires_grad=True)
    columns = []
    for b in range(B):
        experts = [attention_by_head(expert, x[:, b], model.config) for expert in routed.experts]
        rows = []
        for s in range(S):
            logits = routed.router.weight @ x[s, b]
            p = logits.exp() / logits.exp().sum()
            total = torch.zeros(D, dtype=torch.float64)
            for i, expert in enumerate(experts):
                adapted = expert[s] if routed.adapters is None else routed.adapters.weight[i] @ expert[s]
                total = total + p[i] * adapted
            rows.append(total)
        columns.append(torch.stack(rows))
    expected = torch.stack(columns, 1)
    found = routed(x, make_context(model.config, torch.arange(S), torch.float64), 1)
    assert torch.allclose(found, expected, rtol=1e-11, atol=1e-12)
    weight = torch.randn(S, B, D, dtype=torch.float64, generator=generator)
    variables = [x, *routed.parameters()]
    ours = torch.autograd.grad((found * weight).sum(), variables)
    theirs = torch.autograd.grad((expected * weight).sum(), variables)
    for our, their in zip(ours, theirs, strict=True):
        assert their.abs().max() > 0
        assert (our - their).abs().max() <= 1e-10 * their.abs().max()


@pytest.mark.parametrize("routing", ["soft", "topk"])
def test_adapters_of_ffn_experts(routing: str) -> None:
    model = trained(moe_model(routing=routing, balance=0.0, **ADAPTERS)).requires_grad_(True)
    feed = model.layers["0"].mlp
    assert isinstance(feed, RoutedFeedForward)
    x = torch.randn(S, B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    rows = []
    for row in x.flatten(0, 1):
        logits = feed.router.weight @ row
        chosen = logits.topk(2 if routing == "topk" else 3).indices.tolist()
        total = torch.zeros(D, dtype=torch.float64)
        for i in chosen:
            gate, up = (feed.experts.gate_up[i] @ row).chunk(2)
            out = feed.experts.adapters.weight[i] @ (feed.experts.down[i] @ (gate * gate.sigmoid() * up))
            total = total + logits[i].exp() / sum(logits[j].exp() for j in chosen) * out
        rows.append(total)
    expected = torch.stack(rows).view(S, B, D)
    found = feed(x, Context((x, x)), 0)
    assert torch.allclose(found, expected, rtol=1e-11, atol=1e-12)
    variables = [x, *feed.parameters()]
    ours, theirs = (torch.autograd.grad(out.square().sum(), variables) for out in (found, expected))
    for our, their in zip(ours, theirs, strict=True):
        assert (our - their).abs().max() <= 1e-10 * their.abs().max()


@pytest.mark.parametrize("settings", METHODS)
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_members_give_the_dense_logits(settings: dict[str, Any], copies: int, dtype: torch.dtype) -> None:
    sizes = {**SIZES, "qk_norm": True, "qkv_bias": True}
    dense = dense_model(dtype, sizes=sizes)
    model = upcycled([state(dense)] * copies, dtype, sizes, routing="soft", **settings)
    with torch.no_grad():
        found, expected = score(model, TEXT), score(dense, TEXT)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("settings", METHODS)
@pytest.mark.parametrize("routing", ["soft", "topk"])
def test_generation_with_caches_equals_generation_without(settings: dict[str, Any], routing: str) -> None:
    model = trained(moe_model(routing=routing, **settings)).train(False)
    assert model.num_local_members == 3
    how = GenerationSettings(max_new_tokens=6, temperature=0.8)
    prompts = [[5, 6, 7], [1, 2, 3, 4, 5, 6], [9]]
    assert generate(model, prompts, how) == generate_uncached(model, prompts, how)


def paper(**settings: Any) -> RunConfig:
    members = {name: name for name in ("seed", "code", "math", "languages")}
    config = load_config(["--model.preset=paper-2.7b", "--method=moe"])
    return replace(config, moe=MoEConfig(members, routing="soft", **settings))


def test_the_published_sizes() -> None:
    assert num_parameters(whole_model(paper(**BAM))) == (8_399_711_232, 8_399_711_232)
    model = whole_model(paper(**ADAPTERS))
    assert num_parameters(model) == (1_509_949_440 + 491_520, 9_909_660_672)
    adapters = [p for m in model.modules() if isinstance(m, Adapters) for p in m.parameters()]
    routers = [p for m in model.modules() if isinstance(m, Router) for p in m.parameters()]
    assert sum(p.numel() for p in adapters) == 1_509_949_440
    assert sum(p.numel() for p in routers) == 491_520
    assert all(p.requires_grad for p in (*adapters, *routers))


def test_flops_by_hand() -> None:
    d, f, s, n, layers, vocab = 3072, 8192, 1024, 4, 20, 128_000
    attention = 2 * d * (26 * 128 + d) + 2 * s * d  # of a member: matrices, products with causality credited
    feed, router, adapter, head = 6 * d * f, 2 * d * n, 2 * d * d, 2 * d * vocab
    config = paper(**BAM)
    forward = layers * (n * (attention + feed) + 2 * router) + head
    flops = moe_flops(config.model, config.moe, s)
    assert (flops.forward, flops.total) == (forward, 3 * forward)
    config = paper(**ADAPTERS)
    first = n * (attention + adapter) + router  # of the first layer: nothing before it trains
    forward += layers * 2 * n * adapter
    flops = moe_flops(config.model, config.moe, s)
    assert flops.forward == forward
    assert flops.backward_activation == forward - first
    assert flops.backward_weight == layers * 2 * (n * adapter + router)
    costs = moe_costs(config.model, config.moe, s)
    assert (costs.embedding.backward, costs.head.backward) == (0, head)
    assert sum(layer.backward for layer in costs.layers) == flops.total - forward - head
    once = moe_costs(config.model, config.moe, s, recompute=True)
    assert once.layers[1].backward - costs.layers[1].backward == costs.layers[1].forward


def test_with_adapters_no_gradient_goes_through_the_first_attentions() -> None:
    model, passes = moe_model(routing="soft", **ADAPTERS), {}
    for index, layer in model.layers.items():
        for expert in layer.attention.experts:
            expert.register_forward_hook(lambda *call, index=index: passes.update({index: call[-1].requires_grad}))
    sequence_loss(model, tokens(), tokens(), torch.ones(2, 12)).backward()
    assert passes == {"0": False, "1": True}
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["bam", "bam-adapters"])
def test_the_tool(tmp_path: Path, run_tool: RunTool, method: str) -> None:
    folders = {name: write_dense(tmp_path / name, seed, **SIZES) for seed, name in enumerate(("seed", "code"), 1)}
    members = [argument for name, folder in folders.items() for argument in ("--member", f"{name}={folder}")]
    code, said, error = run_tool("upcycle.py", "--method", method, "--out", tmp_path / "out", *members)
    assert code == 0, error
    assert "2 ffn experts a layer, 2 attention experts" in said
    found = load_tensors(tmp_path / "out", MODEL_FILE)
    theirs = [load_tensors(folder, MODEL_FILE) for folder in folders.values()]
    for index, weights in enumerate(theirs):
        for part in ("qkv", "out"):
            ours = found[f"layers.1.attention.experts.{index}.{part}.weight"]
            assert torch.equal(ours, weights[f"layers.1.attention.{part}.weight"])
        assert torch.equal(found["layers.1.mlp.experts.down"][index], weights["layers.1.mlp.down.weight"])
    for name in ("layers.1.attention_norm.weight", "embedding.weight"):
        assert torch.allclose(found[name], (theirs[0][name] + theirs[1][name]) / 2)
    adapters = [tensor for name, tensor in found.items() if name.endswith("adapters.weight")]
    assert len(adapters) == (4 if method == "bam-adapters" else 0)
    assert all(torch.equal(tensor, torch.eye(16).expand(2, 16, 16)) for tensor in adapters)
    config = load_config(["--config", str(tmp_path / "out" / "config.yaml")])
    assert (config.moe.routing, config.moe.adapters) == ("soft", method == "bam-adapters")


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match=r"set moe.attention_experts true too"):
        load_config(["--method=moe", "--moe.members={a: x, b: y}", "--moe.adapters=true"])
