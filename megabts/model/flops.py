"""Model FLOPs per token: the one definition that logs, benchmark and planner share.

A multiply-add is two operations. Counted are the matrix multiplications with weights (2 x their parameters per token)
and attention's two products (4 x sequence length x query width per token; half of that where causality is credited).
The input embedding is a lookup and costs nothing; norms, rotations, gates' element-wise work and recomputation are not
model FLOPs. Published figures differ by the causal factor, so it is an argument.

A trained part costs its forward three times: forward, activation gradients, weight gradients. A frozen part that
passes gradient costs it twice, a frozen part upstream of every trainable weight once, and a part that nothing reads is
not run. Hence a BTS model costs 2P per member and token, another 2P for the layers downstream of a trainable stitch
and 6P for the stitches, not 6P per member.

Two simplifications, both small. Attention has no weights, so its real backward costs two forwards of activation
gradients; booking one of them as "weight gradient" is exact for trained layers and one attention forward short for
frozen ones. A trained stitch counts three times even where its input needs no gradient (the first stitch, and the gate
of the first Experts-into-Hub).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from megabts.config.methods import HUB, BTSConfig
from megabts.config.model import ModelConfig

StitchKind = Literal["hub_into_experts", "experts_into_hub"]


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token of one training step, by what they compute."""

    forward: float = 0.0
    backward_activation: float = 0.0
    backward_weight: float = 0.0

    @property
    def total(self) -> float:
        """All operations of one training step, per token."""
        return self.forward + self.backward_activation + self.backward_weight

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.forward + other.forward,
            self.backward_activation + other.backward_activation,
            self.backward_weight + other.backward_weight,
        )


def layer_flops(config: ModelConfig, seq_length: int, *, causal: bool = True) -> float:
    """Forward operations of one Transformer layer per token, in sequences of `seq_length` tokens."""
    query_width = config.num_heads * config.head_dim
    qkv_width = sum(config.qkv_heads) * config.head_dim
    weights = config.hidden_size * (qkv_width + query_width + 3 * config.ffn_size)
    attention = 4 * seq_length * query_width
    return 2 * weights + (attention / 2 if causal else attention)


def head_flops(config: ModelConfig) -> float:
    """Forward operations of the output head per token, for the unpadded vocabulary."""
    return 2 * config.hidden_size * config.vocab_size


def dense_flops(config: ModelConfig, seq_length: int, *, causal: bool = True) -> Flops:
    """Operations per token of training one dense decoder: 2P + attention forward, three times that in all."""
    forward = config.num_layers * layer_flops(config, seq_length, causal=causal) + head_flops(config)
    return Flops(forward, forward, forward)


def bts_flops(
    model: ModelConfig,
    bts: BTSConfig,
    seq_length: int,
    plan: Sequence[tuple[int, StitchKind]],
    *,
    causal: bool = True,
) -> Flops:
    """Operations per training token of a BTS model (arXiv 2502.00075, section 2).

    `plan` lists the stitch layers as (number of layers before it, kind), in ascending order, an Experts-into-Hub last.
    The walk carries which members' states need a gradient: members start without, a trainable stitch gives it to the
    members it writes, and the layers a member then passes cost their forward once more. Experts stop at the last
    Experts-into-Hub; their final norms and heads do not run.

    With stitches after every 2 layers and three experts, full attention, this gives 2.07 times the dense model's
    operations at 8 layers x 256 (vocabulary 8192, 8 heads, 4 KV heads, FFN 704, sequences of 256) and 2.46 times at
    12 layers x 512 (FFN 1408); counted causally, 2.06 and 2.46.
    """
    assert plan[-1][1] == "experts_into_hub", "a stitch plan ends with an Experts-into-Hub layer"
    layer = layer_flops(model, seq_length, causal=causal)
    linear = 2 * model.hidden_size**2
    trained = set(bts.members if "*" in bts.trainable else bts.trainable)
    needs: set[str] = set()
    total = Flops()
    depth = 0
    for position, kind in plan:
        assert depth <= position <= model.num_layers, "stitch positions ascend and lie within the layers"
        total += _frozen(len(bts.members) * (position - depth) * layer, len(needs) * (position - depth) * layer)
        total += _stitch(kind, tuple(bts.experts), trained, needs, linear)
        needs |= _gains(kind, bts, trained, needs)
        depth = position
    rest = (model.num_layers - depth) * layer + head_flops(model)
    return total + _frozen(rest, rest if HUB in needs else 0.0)


def _frozen(forward: float, passing: float) -> Flops:
    """Frozen work, of which `passing` lies downstream of a trainable weight."""
    return Flops(forward, passing, 0.0)


def _stitch(
    kind: StitchKind, experts: Sequence[str], trained: Collection[str], needs: Collection[str], linear: float
) -> Flops:
    """One stitch layer: a projection and a gate slice per expert, and the hub's gate slice where it is used.

    Each is one D x D matrix of `linear` forward operations. Projections read the expert (Experts-into-Hub) or the hub
    (Hub-into-Experts), gates always the hub. A frozen one passes gradient only if the state it reads needs it.
    """
    merges = kind == "experts_into_hub"
    readers = [(name, HUB) for name in ((HUB, *experts) if merges else experts)]
    readers += [(name, name if merges else HUB) for name in experts]
    weight = sum(linear for owner, _ in readers if owner in trained)
    passing = sum(linear for owner, source in readers if owner in trained or source in needs)
    return Flops(linear * len(readers), passing, weight)


def _gains(kind: StitchKind, bts: BTSConfig, trained: Collection[str], needs: Collection[str]) -> set[str]:
    """Members whose state needs a gradient once this stitch has written it."""
    if kind == "hub_into_experts":
        return {name for name in bts.experts if name in trained or HUB in needs}
    hub = {HUB} if trained or needs else set()
    projected = set(bts.experts) & set(trained) if bts.expert_stream == "projected" else set()
    return hub | projected
