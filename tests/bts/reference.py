"""BTS a second time: loops over members, heads, positions and stitches, written from the equations alone.

It shares parameters (by name) with a `BTSModel` and nothing else: own decoder, rotation, softmax, sigmoid, loss.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megabts.bts.model import BTSModel
from megabts.config.methods import BTSConfig
from megabts.config.model import ModelConfig
from megabts.model.attention import make_context
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh
from megabts.parallel.sharding import initialise, named_metas

SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_layers": 5,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_size": 24,
    "init_std": 0.3,
}

Weights = Mapping[str, Tensor]


def config_of(experts: int = 2, **settings: Any) -> BTSConfig:
    """A hub and `experts` experts, without dropout."""
    return BTSConfig("hub", {f"e{i}": f"e{i}" for i in range(1, experts + 1)}, **{"gate_dropout": 0.0, **settings})


def random_model(
    bts: BTSConfig,
    dtype: torch.dtype = torch.float32,
    *,
    frozen: torch.dtype | None = None,
    shake: float = 0.2,
    **sizes: Any,
) -> BTSModel:
    """A model of random, differing members; stitches at their start, plus noise of size `shake`."""
    mesh = ParallelMesh()
    model = BTSModel(ModelConfig(**{**SIZES, **sizes}), bts, TorchBackend(dtype, "cpu", mesh.tp, frozen=frozen))
    initialise(named_metas(model), 1, mesh)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = shake if name.startswith("stitches.") else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return model


def run(model: BTSModel, tokens: Tensor, dropout_seeds: list[int] | None = None) -> Tensor:
    """Hidden [1, s, b, D] of tokens [b, s]."""
    context = make_context(model.config, torch.arange(tokens.shape[1]), model.dtype, dropout_seeds=dropout_seeds)
    return model.run_layers(0, model.config.num_layers, model.embed(tokens), context)


def softmax(logits: list[Tensor]) -> list[Tensor]:
    """Over the list, element by element."""
    powers = [torch.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def rotated(x: Tensor, position: int, config: ModelConfig) -> Tensor:
    """One head [hd] turned by its position, pair (i, i + hd/2) by position * theta^(-2i/hd)."""
    half, out = config.head_dim // 2, [torch.empty(0)] * config.head_dim
    for i in range(half):
        angle = position * config.rope_theta ** (-2 * i / config.head_dim)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return torch.stack(out)


def layer(x: list[Tensor], weights: Weights, prefix: str, config: ModelConfig) -> list[Tensor]:
    """One Transformer layer on a sequence of [D]."""
    heads, groups, hd = config.num_heads, config.num_kv_heads, config.head_dim
    qkv = []
    for state in x:
        normed = rms_norm(state, weights[f"{prefix}attention_norm.weight"], config.norm_eps)
        qkv.append((weights[f"{prefix}attention.qkv.weight"] @ normed).view(heads + 2 * groups, hd))
    out = []
    for t, state in enumerate(x):
        mixed = []
        for head in range(heads):
            group = head * groups // heads
            query = rotated(qkv[t][head], t, config)
            scores = [query @ rotated(qkv[u][heads + group], u, config) / math.sqrt(hd) for u in range(t + 1)]
            shares = softmax(scores)
            mixed.append(sum(shares[u] * qkv[u][heads + groups + group] for u in range(t + 1)))
        state = state + weights[f"{prefix}attention.out.weight"] @ torch.cat(mixed)  # type: ignore[arg-type]
        normed = rms_norm(state, weights[f"{prefix}mlp_norm.weight"], config.norm_eps)
        gate, up = (weights[f"{prefix}mlp.gate_up.weight"] @ normed).split(config.ffn_size)
        out.append(state + weights[f"{prefix}mlp.down.weight"] @ (gate / (1 + torch.exp(-gate)) * up))
    return out


def stitch(h: list[Tensor], weights: Weights, prefix: str, into_hub: bool, bts: BTSConfig) -> list[Tensor]:
    """One stitch layer on one token's states (hub, *experts), each [D]."""
    experts = list(bts.experts)
    read = h[0] / torch.sqrt((h[0] * h[0]).mean()) if bts.gate_input == "normalised" else h[0]
    gates = {name: weights[f"{prefix}gates.{name}.weight"] @ read for name in (["hub"] * into_hub + experts)}

    def project(name: str, x: Tensor) -> Tensor:
        if bts.projection_rank == 0:
            return weights[f"{prefix}projections.{name}.weight"] @ x
        down, up = (weights[f"{prefix}projections.{name}.{part}.weight"] for part in ("down", "up"))
        return x + up @ (down @ x)

    if not into_hub:
        out = [h[0]]
        for name, state in zip(experts, h[1:], strict=True):
            gate = 1 / (1 + torch.exp(-gates[name]))
            out.append((1 - gate) * state + gate * project(name, h[0]))
        return out
    if bts.start == "hub_leaning":
        gates["hub"] = gates["hub"] + weights[f"{prefix}hub_bias"]
    g = softmax(list(gates.values()))
    projected = [project(name, s) for name, s in zip(experts, h[1:], strict=True)]
    hub = g[0] * h[0]
    for gate, state in zip(g[1:], projected, strict=True):
        hub = hub + gate * state
    if bts.start == "hub_preserving":
        hub = h[0] + weights[f"{prefix}mix"] * (hub - h[0])
    return [hub, *(projected if bts.expert_stream == "projected" else h[1:])]


def reference_logits(
    model: ModelConfig, bts: BTSConfig, weights: Weights, tokens: Tensor, plan: list[tuple[int, bool]]
) -> Tensor:
    """Logits [b, s, V] of tokens [b, s]; `plan` is (layers before the stitch, whether it is Experts-into-Hub)."""
    names = ["hub", *bts.experts]
    rows = []
    for ids in tokens.tolist():
        states: list[list[Tensor]] = [[weights[f"members.{name}.embedding.weight"][i] for i in ids] for name in names]
        for depth in range(model.num_layers):
            states = [
                layer(x, weights, f"members.{name}.layers.{depth}.", model)
                for name, x in zip(names, states, strict=True)
            ]
            for number, (after, into_hub) in enumerate(plan):
                if after != depth + 1:
                    continue
                columns = [
                    stitch([x[t] for x in states], weights, f"stitches.{number}.", into_hub, bts)
                    for t in range(len(ids))
                ]
                states = [[column[member] for column in columns] for member in range(len(names))]
        rows.append(torch.stack(answers(ids, states, weights, model, bts)))
    return torch.stack(rows)


def answers(
    ids: list[int], states: list[list[Tensor]], weights: Weights, model: ModelConfig, bts: BTSConfig
) -> list[Tensor]:
    """Logits [V] of every position, from the members' last states, given the tokens read there."""
    out: list[Tensor] = []
    known: list[list[Tensor]] = []  # of every token read, the log-probability that each member gave it
    following: list[Tensor] = []  # each member's probabilities of the next token
    for t, token in enumerate(ids):
        columns = [x[t] for x in states]
        zero = torch.zeros((), dtype=columns[0].dtype)
        known.append([zero for _ in columns] if t == 0 else [powers[token].log() for powers in following])
        evidence = [zero for _ in columns]
        for j in range(min(bts.evidence, t + 1)):
            tap = weights["output.evidence"][j]
            evidence = [e + tap * k.detach() for e, k in zip(evidence, known[t - j], strict=True)]
        logits, following = answer(columns, weights, model, bts, evidence)
        out.append(logits)
    return out


def answer(
    h: list[Tensor], weights: Weights, model: ModelConfig, bts: BTSConfig, evidence: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Logits [V] of one token's last states: the hub's, or the logarithm of the members' mixed probabilities.

    Also the members' probabilities [V].
    """
    names = ["hub", *(bts.experts if bts.output == "mixture" else ())]
    normed = [
        rms_norm(x, weights[f"members.{name}.final_norm.weight"], model.norm_eps)
        for name, x in zip(names, h, strict=False)
    ]
    if bts.output == "hub":
        logits = weights["members.hub.head.weight"] @ normed[0]
        return logits, [logits.softmax(-1)] * len(h)
    gates = softmax(
        [weights[f"output.gates.{name}.weight"][0] @ normed[0] + e for name, e in zip(names, evidence, strict=True)]
    )
    spoken = []
    mixed = torch.zeros(model.vocab_size, dtype=h[0].dtype)
    for name, gate, state in zip(names, gates, normed, strict=True):
        powers = torch.exp(weights[f"members.{name}.head.weight"] @ state)
        spoken.append(powers / powers.sum())
        mixed = mixed + gate * spoken[-1]
    return torch.log(mixed), spoken


def reference_loss(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Sum over positions of -log softmax(logits)[label]."""
    total = torch.zeros((), dtype=logits.dtype)
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1]):
            powers = torch.exp(logits[row, t])
            total = total - mask[row, t] * torch.log(powers[labels[row, t]] / powers.sum())
    return total
